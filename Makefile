# make demo      two clusters of pods on this machine, and a table of the results
# make test      everything that CI runs
# make perf      what a hop costs, beside other proxies
# make bench-control  the directory channel in a large cluster
# make soak      floods, attacks and faults beside a member of the mesh, and their effect on it (as root)
# make compiled  the packages as in the image, with the request path compiled, in build/compiled
# make aws-lc    cryptography as in the image, on AWS-LC, in build/aws-lc
# make kube      Kubernetes for tests: programs and images, built once (as root)
# make test-kube the tests on Kubernetes, on clusters of their own, or on that of KUBECONFIG
# make base      pins the base of the image to the current digest of its tag; needs docker
# The targets set up what they need: a virtual environment in .venv, and, as root on Debian, the
# system packages.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JAEGER := .venv-jaeger
COMPILED := build/compiled
AWS_LC := build/aws-lc
SOURCES := $(shell find control loopguard proxy tracing -name '*.py' | sort)
# Rebuilt when a module changes, or is added or removed.
READY := $(COMPILED)/.ready-$(shell echo $(SOURCES) | cksum | cut -d ' ' -f 1)

# command:package
NEEDED := nft:nftables ip:iproute2 unshare:util-linux setpriv:util-linux venv:python3-venv
PEERS := curl:curl wrk:wrk h2load:nghttp2-client nghttpd:nghttp2-server nginx:nginx-light psql:postgresql-client postgres:postgresql openssl:openssl socat:socat haproxy:haproxy dig:bind9-dnsutils kdig:knot-dnsutils dnsmasq:dnsmasq-base musl-gcc:musl-tools gcc:gcc

.PHONY: demo test lint parts whole compiled aws-lc jaeger kube test-kube perf bench-control soak lock base clean

demo: $(VENV)/.demo
	$(BIN)/isthmus demo

# The linters mostly use one core, and the compiler uses the other. The tests of the parts wait for
# half of their time.
test: $(VENV)/.dev
	$(MAKE) --jobs 2 --output-sync=target lint compiled
	$(MAKE) --jobs 2 --output-sync=target parts aws-lc
	$(MAKE) whole jaeger

# scripts/flake8-async says which rules are off, and why.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/python scripts/flake8-async
	$(BIN)/mypy

# The suite runs in its own network namespaces, so that tests and the machine cannot affect each
# other. There are more pytest processes than cores, because many tests wait.
# The order of the tests is random (pytest-randomly). It stays the same until this number changes.
ORDER ?= 417
SANDBOXED = PATH="$$PATH:/usr/sbin:/sbin" $(BIN)/python -m lab.sandbox -- $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -q --randomly-seed $(ORDER)
# Most of what is compiled, and all tests of whole proxies, run in the form of the image only: with
# the compiled request path, on AWS-LC (docs/decisions/30-compiled.md, 36-aws-lc.md).
IN_THE_IMAGE := $(addprefix tests/,balancing both_paths e2e exchange flows lab routing)
# What is compiled or about TLS, and quick, runs in both forms.
IN_BOTH := $(addprefix tests/,directory enrollment fastpath identity loopguard net tracing wire/h1) \
	$(wildcard tests/wire/test_*.py) tests/telemetry/test_metrics.py
# Whole proxies from the sources, on OpenSSL: with the fast path, and without it
# (docs/decisions/21-fast-path.md).
WITH_FAST_PATH := tests/e2e/test_clients.py tests/both_paths/test_h2_plays.py
ORDINARY := $(addprefix tests/e2e/test_,clients.py failures.py shutdown.py tracing.py)
# Tests that replace a compiled part (tests/kit/build.py), in folders that otherwise run compiled.
INTERPRETED := tests/exchange/test_deadlines.py tests/exchange/test_trace_layer.py
# Measures the branch coverage (CONTRIBUTING.md).
parts: $(VENV)/.dev
	@./scripts/system-packages "$(NEEDED)" "$(PEERS)"
	$(SANDBOXED) --cov --cov-report= $(filter-out $(IN_THE_IMAGE) tests/kube tests/kit,$(patsubst %/,%,$(wildcard tests/*/))) $(wildcard tests/test_*.py)
	$(SANDBOXED) $(WITH_FAST_PATH) $(INTERPRETED)
	$(BIN)/python scripts/coverage

whole: $(VENV)/.dev $(READY) $(AWS_LC)/.ready
	@./scripts/system-packages "$(NEEDED)" "$(PEERS)"
	$(AS_IN_THE_IMAGE) $(SANDBOXED) $(IN_THE_IMAGE) $(IN_BOTH)
	ISTHMUS_FAST_PATH=false $(SANDBOXED) $(ORDINARY)

# The compiled packages, installed from a wheel. No extension module is beside the sources, where
# it would hide an edited module.
AS_IN_THE_IMAGE := ISTHMUS_TEST_COMPILED=1 ISTHMUS_TEST_AWS_LC=1 PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(AWS_LC)/site:$(CURDIR)/$(COMPILED):$(CURDIR)
compiled: $(READY)

# As pip does when it installs a wheel. Programs of the lab may not write here, so without it each
# start of a proxy would compile all modules.
BYTECODE := $(BIN)/python -m compileall -q

$(READY): setup.py pyproject.toml $(SOURCES) | $(VENV)/.dev
	@./scripts/system-packages "gcc:gcc headers:python3-dev"
	rm -rf build/[!a]* # all but build/aws-lc
	ISTHMUS_COMPILE=1 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(BIN)/python -m zipfile -e build/wheel/isthmus-*.whl $(COMPILED)
	rm -r $(COMPILED)/lab  # the tests use the lab of the sources, which is beside the examples
	$(BYTECODE) $(COMPILED)
	touch $@

# Another build of a package of $(VENV), which takes precedence over it.
aws-lc: $(AWS_LC)/.ready

$(AWS_LC)/.ready: scripts/aws-lc requirements/aws-lc.patch requirements/run.txt | $(VENV)/.dev
	@./scripts/system-packages "rust:cargo c++:g++ cmake:cmake libclang:libclang-dev patch:patch"
	./scripts/aws-lc $(BIN)/python $(AWS_LC)
	$(BIN)/python -m zipfile -e $(AWS_LC)/wheel/cryptography-*.whl $(AWS_LC)/site
	$(BYTECODE) $(AWS_LC)/site
	touch $@

# The extra `jaeger` needs an older SDK than everything else, so it has its own environment.
jaeger: $(JAEGER)/.ready
	$(JAEGER)/bin/python -m pytest -q --noconftest -p no:cacheprovider tests/jaeger

$(JAEGER)/.ready: pyproject.toml requirements/jaeger.txt
	test -x $(JAEGER)/bin/python || $(PYTHON) -m venv $(JAEGER)
	$(JAEGER)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/jaeger.txt
	touch $@

# Kubernetes from source, and the image by the steps of its Dockerfile (CONTRIBUTING.md).
# KUBERNETES=1.34 chooses the oldest version.
export KUBERNETES ?= 1.37
KUBE_NEEDED := go:golang-go containerd:containerd runc:runc cni:containernetworking-plugins debootstrap:debootstrap \
	nft:nftables iptables:iptables conntrack:conntrack ip:iproute2 nsenter:util-linux mount:mount
kube: $(VENV)/.dev
	@./scripts/system-packages "$(KUBE_NEEDED)"
	PATH="$$PATH:/usr/sbin:/sbin" $(BIN)/python -m lab.kube build

# TEST_KUBE names files or tests; all of tests/kube without it.
ifdef KUBECONFIG
test-kube: $(VENV)/.dev
	$(BIN)/python -m pytest -q -o faulthandler_timeout=900 $(or $(TEST_KUBE),tests/kube)
else
test-kube: kube
	PATH="$$PATH:/usr/sbin:/sbin" $(BIN)/python -m lab.kube run -- $(BIN)/python -m pytest -q -o faulthandler_timeout=900 $(or $(TEST_KUBE),tests/kube)
endif

perf: $(VENV)/.dev $(READY) $(AWS_LC)/.ready
	@./scripts/system-packages "wrk:wrk nginx:nginx-light h2load:nghttp2-client nghttpd:nghttp2-server curl:curl" "haproxy:haproxy nghttpx:nghttp2-proxy"
	PATH="$$PATH:/usr/sbin:/sbin" $(BIN)/python -m perf $(PERF)

# BENCH="--proxies 100 --seconds 20": another size.
bench-control: $(VENV)/.dev
	$(BIN)/python -m perf.control $(BENCH)

# The tables go into docs/reliability.md. SOAK="--only floods --write", or faults, measures one
# table and keeps the other. SOAK="--only NAME,..." measures a part, and writes nothing.
soak: $(VENV)/.dev $(READY) $(AWS_LC)/.ready
	@./scripts/system-packages "$(NEEDED)"
	PATH="$$PATH:/usr/sbin:/sbin" $(BIN)/python -m perf.reliability $(or $(SOAK),--write)

$(VENV)/.demo: pyproject.toml requirements/demo.txt
	@./scripts/system-packages "$(NEEDED)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/demo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.demo requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	touch $@

# The lock files: exact versions with their hashes, for every supported Python.
lock: $(VENV)/.dev
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --upgrade pyproject.toml -o requirements/run.txt
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header -c requirements/run.txt pyproject.toml --extra demo --group build -o requirements/demo.txt
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header -c requirements/demo.txt pyproject.toml --extra demo --group dev -o requirements/dev.txt
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header -c requirements/dev.txt pyproject.toml --group compile -o requirements/compile.txt
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header pyproject.toml --extra jaeger --group jaeger-test -o requirements/jaeger.txt

# Review and commit the result like any other change. Build and try the image first.
base:
	./scripts/pin-base

clean:
	rm -rf $(VENV) $(JAEGER) build *.egg-info .mypy_cache .ruff_cache .flake8_async_cache .pytest_cache .hypothesis
