# `make serve` and `make test` each do everything on a fresh machine; `make help` lists the rest.
SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python
CONFIG ?= configs/embedded.yaml
# The newest Python at hand that the pinned wheels exist for.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)

# torch processes that share two cores must not spin while they wait for each other.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup serve test lint test-fast test-vllm clients test-clients bench clean

help:
	@echo "make serve      set up if needed, then serve the embedded pool on http://127.0.0.1:8000"
	@echo "make test       set up if needed, then lint, type check and run every test"
	@echo "make test-fast  the tests without real models and without Ray"
	@echo "make test-vllm  the vLLM adapter for real, in a virtual environment of its own (CPU build)"
	@echo "make clients    Codex, Claude Code and OpenCode from npm, into build/clients, for the tests"
	@echo "make test-clients  Codex, Claude Code and OpenCode (from npm) and the SDKs against the server"
	@echo "make bench      every script in benchmarks/, quick versions"

setup: $(VENV)/.done
	@HF_HUB_OFFLINE=1 $(PY) -m actors.model_files --quiet

$(VENV)/.done: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; none was found. Set PYTHON=/path/to/python." >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { echo "The venv module is missing; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PY) -m pip install --disable-pip-version-check --progress-bar on -q -c constraints.txt -e ".[test,train]"
	@touch $@

serve: setup
	@exec $(VENV)/bin/fugu serve --config $(CONFIG)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(VENV)/bin/pytest -q --instafail

test-fast: setup
	$(VENV)/bin/pytest -q -m "not ray and not model"

test-vllm:
	sh tests/vllm/run.sh

# The versions that were tried; a newer one may ask for more.
clients:
	npm install --silent --no-audit --no-fund --prefix build/clients @openai/codex@0.169.0 @anthropic-ai/claude-code@2.1.197 opencode-ai@1.18.33

test-clients: setup clients
	$(VENV)/bin/pytest -q tests/clients

bench: setup
	@for script in $$(grep -l 'add_argument("--quick"' benchmarks/*.py); do echo "== $$script"; $(PY) $$script --quick || exit 1; done

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
