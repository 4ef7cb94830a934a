# Each command makes the environment it needs. Nothing has to be installed before but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
VENV_LOWEST ?= .venv-lowest

INSTALL = -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow test-lowest style format

demo: $(VENV)/ready  ## train a tiny model on arithmetic, on the CPU, and show what it learned
	$(VENV)/bin/python -m trl_a3po.demo

test: $(VENV)/ready  ## the tests
	$(VENV)/bin/python -m pytest -m "not slow"

test-slow: $(VENV)/ready  ## those that take minutes
	$(VENV)/bin/python -m pytest -m slow

test-lowest: $(VENV_LOWEST)/ready  ## the tests, with the oldest TRL and transformers that are supported
	$(VENV_LOWEST)/bin/python -m pytest -m "not slow"

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
