# A bare checkout needs Python 3.11+ and nothing else: `make demo` and `make test` make their own environment.
# As root, with Go and the Debian packages that .ci/run installs, `make test` also runs a Kubernetes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: demo test test-all test-local chaos e2e check kube images crds manifests clean

demo: $(VENV)/.demo
	@PATH="$(abspath $(BIN)):$$PATH" sh examples/digits/demo.sh $(DEMO)

CAN_RUN_PODS = test "$$(id -u)" = 0 && command -v go containerd buildah promtool >/dev/null
# A process more than cores: some of them wait for a cluster. Their order is that of tests/conftest.py.
PYTEST = $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder
LEFT_OUT = left out: the tests that run a Kubernetes; they need root, Go 1.24+ and the Debian packages in .ci/run

# Two at a time: pip waits for the network where Go's compiler does not.
test:
	@if $(CAN_RUN_PODS); then $(MAKE) --no-print-directory -j2 test-all; elif [ -n "$$CI" ]; then echo "$(LEFT_OUT)"; exit 1; \
	else $(MAKE) --no-print-directory test-local; echo "$(LEFT_OUT)"; fi

test-all: check kube images
	$(PYTEST)

test-local: check
	$(PYTEST) -m "not cluster"

# Every fault under a job of its own: half an hour. Writes docs/reliability.md.
chaos: $(VENV)/.dev kube images
	FEDDIFF_CHAOS=docs/reliability.md $(BIN)/pytest -m "chaos or node" tests/cluster/test_chaos.py

# One whole job of three owners on a node, scraped by a real Prometheus: ten minutes once the images are built. With
# FEDDIFF_E2E_ROW=FILE it appends a row of what it measured. `make test` runs its short form, tests/cluster/test_first_job.py.
e2e: $(VENV)/.dev kube images
	$(BIN)/pytest -m e2e tests/cluster/test_e2e.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The Kubernetes that tests run: 5 minutes at first, then only when tests/cluster changes what it is made of.
kube: | $(VENV)/bin/python
	@PYTHON="$(abspath $(BIN))/python" tests/cluster/build.sh

# The images that the tests' node runs: 7 minutes at first, then only for what changed.
images: | $(VENV)/bin/python
	@PYTHON="$(abspath $(BIN))/python" tests/cluster/images.sh

# The definitions of our kinds, the page about them and the one about `import feddiff`, from the types.
crds: $(VENV)/.dev
	$(BIN)/python -m feddiff.crds crds
	$(BIN)/python docs/generate.py

# install.yaml, the dashboards and the chart's table of values; after every change of the kinds, too.
manifests: crds kube
	$(BIN)/python charts/dashboards.py
	$(BIN)/python charts/generate.py $${FEDDIFF_KUBE:-$$HOME/.cache/feddiff/kube}/helm

# PIP_FIND_LINKS passes through: whoever has a +cpu wheel of torch in such a folder gets it.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[trainer,demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "feddiff needs Python 3.11 or newer, found $$($(PYTHON) --version); try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis
