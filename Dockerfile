# Isthmus as a container image: the sidecar, and, with another user and command, the init container
# that installs the redirection.
#
#   docker build --tag isthmus:0.1.0 .
#   docker run --rm isthmus:0.1.0 --help
#
# .dockerignore lists the files for the builder. The lab, the tests and the demo are not among them;
# `isthmus demo` then says so in one line.

# The newest Python with which the steps of this file were tested. The digest is that of the index
# of all platforms, with Python 3.13.16. `make base` writes the current digest of the tag. (A digest
# can only name an image of this repository, `python`, or nothing.)
ARG PYTHON=3.13-slim-trixie@sha256:bb2988715db2cf7ace7b53f38f3cffbef7c7046a656bee66245eb0ed386e2e81

FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# Compilers, for the request path (docs/decisions/30-compiled.md) and for TLS
# (docs/decisions/36-aws-lc.md). They stay in this stage.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev cargo cmake libclang-dev make patch \
    && rm -rf /var/lib/apt/lists/*

# The environment of the image, at its final path: exact versions, checked against their hashes,
# wheels only. It has no pip.
COPY requirements/run.txt requirements/compile.txt requirements/aws-lc.patch requirements/
RUN python -m venv --without-pip /opt/isthmus \
    && pip --python /opt/isthmus/bin/python install --only-binary :all: --require-hashes -r requirements/run.txt \
    # The build tools go into this stage's own Python, which is discarded.
    && pip install --only-binary :all: --require-hashes -r requirements/compile.txt

# cryptography is built again, against AWS-LC.
COPY scripts/aws-lc scripts/
RUN scripts/aws-lc python /aws-lc \
    && pip --python /opt/isthmus/bin/python install --no-deps --no-index --force-reinstall /aws-lc/wheel/cryptography-*.whl

# The project's own packages come last, so a change of the source rebuilds only from here.
COPY LICENSE README.md pyproject.toml setup.py ./
COPY loopguard loopguard
COPY tracing tracing
COPY proxy proxy
COPY control control
RUN ISTHMUS_COMPILE=1 pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /opt/isthmus/bin/python install --no-deps --no-index /wheels/isthmus-*.whl


FROM python:${PYTHON}
LABEL org.opencontainers.image.title="isthmus" \
      org.opencontainers.image.description="A service-mesh sidecar in Python: upgrades a pod's traffic to mutual TLS" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"

# The init container (`isthmus intercept`) needs nft. Its version is the distribution's: an older
# one leaves the archive when a newer one arrives, and a pinned build would fail on that day.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends nftables \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 2102 isthmus \
    && useradd --uid 2102 --gid 2102 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin isthmus

COPY --from=build /opt/isthmus /opt/isthmus
# The C library's allocator returns memory after a flood, Python's own does not
# (docs/decisions/48-memory-budget.md).
ENV PATH=/opt/isthmus/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONMALLOC=malloc

# The redirection exempts this user. It is a number, so that Kubernetes can see that it is not root
# (runAsNonRoot).
USER 2102:2102
WORKDIR /

# outbound, inbound, admin
EXPOSE 4140 4143 4191

# After the first SIGTERM, open connections can finish within `shutdown.grace`. A second SIGTERM
# stops the proxy at once.
STOPSIGNAL SIGTERM
ENTRYPOINT ["isthmus"]
CMD ["run"]
