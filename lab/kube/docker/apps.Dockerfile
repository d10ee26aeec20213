# Applications for tests: gRPC, PostgreSQL, and a load of HTTP requests. Its context is lab/apps.
FROM python:3.13-slim-trixie
RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl postgresql postgresql-client \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --only-binary :all: --root-user-action ignore grpcio==1.85.1
# PostgreSQL does not run as a user without a name.
RUN useradd --uid 1000 --no-create-home --home-dir /work apps
COPY __init__.py grpc_service.py grpc_client.py database load.py /srv/lab/apps/
ENV PYTHONPATH=/srv
USER 1000:1000
WORKDIR /srv
CMD ["sleep", "infinity"]
