# `make demo`, `make test` and `make lint` build the virtual environment themselves when it is missing.
#   make demo PYTHON=/path/to/python3.12   build it with this interpreter
#   make demo VENV=                        use the current environment (a container) as it is
#   make findings FLAGS=--dry-run          all cells of docs/findings.md with their seconds; without FLAGS, run them

VENV ?= .venv
PYTHON ?=
SHELL := /bin/bash
export PYTHONPATH := $(CURDIR)

# A name alone proves nothing: a pyenv shim exists for every version that pyenv knows, installed or not.
find_python = $(foreach name,$(or $(PYTHON),python3.12 python3),\
	$(shell $(name) -c 'import sys, venv, ensurepip; print(sys.executable if sys.version_info[:2] == (3, 12) else "")' 2>/dev/null))

ifeq ($(strip $(VENV)),)
BIN :=
PY := $(or $(PYTHON),python3)
READY :=
else
BIN := $(VENV)/bin/
PY := $(VENV)/bin/python
READY := $(VENV)/.complete
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif

SCRIPTS = .ci/run $(shell find . -name '*.sh' -not -path './.venv/*' -not -path './runs/*' -not -path './.clients/*')

.PHONY: help venv demo demo-elastic findings test test-all test-clients lint lock clean

help:
	@echo "make venv | demo | demo-elastic | findings | test | test-all | test-clients | lint | lock | clean"

venv: $(READY)

# The stamp comes last: an environment without it was interrupted and is built anew.
$(VENV)/.complete: pyproject.toml
	@python="$(firstword $(find_python))"; \
	if [ -z "$$python" ]; then \
		echo "error: no Python 3.12 with venv found$(if $(PYTHON), at PYTHON=$(PYTHON)); install it or give PYTHON=/path/to/python3.12" >&2; exit 2; \
	fi; \
	clear=--clear; if [ -e "$@" ]; then clear=; fi; \
	set -x; "$$python" -m venv $$clear "$(VENV)" && "$(VENV)/bin/python" -m pip install --disable-pip-version-check -e ".[dev]" && touch "$@"

demo: $(READY)
	PYTHON="$(PY)" bash examples/slimqwen/demo.sh

# With the teacher of `make demo`, which it runs if there is none.
demo-elastic: $(READY)
	test -e runs/demo/teacher || $(MAKE) demo
	PYTHON="$(PY)" bash examples/slimqwen/demo_elastic.sh

# The paper's findings on small models: hours on two cores, continued by the same command after anything. What is there
# is put into docs/findings.md.
#   make findings FLAGS="--only a,c --seeds 1"      part of them; --help has all flags
FLAGS ?=

findings: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.findings --publish docs $(FLAGS)

# Tests wait much, for processes that start and for ranks that meet: one more at a time than a small machine has cores.
WORKERS ?= 3

test: lint
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

# The slow ones have up to eight ranks each, and some of them ports of their own.
test-all: test
	$(PY) -m pytest -m slow

# Outside CI: programs that serve models load our exports, each in an environment of its own (docs/serving.md).
#   make test-clients CLIENTS="transformers vllm"   try these alone; one that cannot be installed is a failure then
#   make test-clients CLIENTS_PYTHON=python3.11     build their environments with this interpreter
CLIENTS ?=
CLIENTS_DIR ?= .clients
CLIENTS_PYTHON ?= $(PY)

test-clients: $(READY)
	$(PY) -m tests.clients.main $(CLIENTS) --work "$(CLIENTS_DIR)" --python "$(CLIENTS_PYTHON)"

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(BIN)shellcheck $(SCRIPTS)
	$(BIN)hadolint --failure-threshold style Dockerfile

# Versions and hashes of the images, after a change in pyproject.toml; needs uv.
lock:
	$(PY) requirements/lock.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis ./*.egg-info
	find . -path "./$(or $(VENV),.venv)" -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
