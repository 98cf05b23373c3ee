# `make` lists the targets. Every target except clean, help and docs creates .venv first; see scripts/setup_env.sh.

VENV_PYTHON := .venv/bin/python

# Tests run without GPU and network, so that results are the same on every machine.
# OMP_NUM_THREADS is removed because launchers behave differently once it is set.
TEST_ENV := env -u OMP_NUM_THREADS CUDA_VISIBLE_DEVICES= WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## install everything into .venv (needs only Python 3.11 or newer)
	@bash scripts/setup_env.sh

quickstart: setup  ## train and evaluate a small model on synthetic scenes
	$(VENV_PYTHON) scripts/quickstart.py

# Two workers, as most tests wait for processes to start. loadfile keeps a file in one worker for its shared fixtures.
test: setup  ## run all tests, on the CPU and offline
	$(TEST_ENV) $(VENV_PYTHON) -m pytest -q -n 2 --dist loadfile tests

check: setup  ## lint, formatting, types, configs, import direction and words
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy pixel_sail scripts tools
	$(TEST_ENV) $(VENV_PYTHON) -m pytest -q tests/test_configs.py tests/test_import_direction.py tests/test_words.py

format: setup  ## fix and format the code with ruff
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

docs: .venv-docs/.stamp  ## build the documentation into site/ with warnings as errors
	.venv-docs/bin/mkdocs build --strict

.venv-docs/.stamp: requirements/docs.txt
	$${PYTHON:-python3} -m venv --clear .venv-docs
	.venv-docs/bin/pip install --quiet --no-deps -r requirements/docs.txt
	@touch $@

clean:  ## remove .venv and caches; keep runs/ and data/
	rm -rf .venv .venv-docs site build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
