# Every chore of the project. `make demo` and `make test` do all their own set-up: they need Python, make and pip.

PYTHON ?= python3
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
TYPING := build/typing
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PROJECT := pyproject.toml setup.py constraints.txt
# One core per test worker: more threads than cores make every test slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --timeout=600 --durations=20

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast env lint typing format docs clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

demo: $(VENV)/.core ## Install the core alone, compile the built-in model to int4, run and measure the result
	$(BIN)/qc compile builtin:tiny-llama -o demo/float --recipe float --force
	$(BIN)/qc compile builtin:tiny-llama -o demo/w4 --recipe w4 --force
	$(BIN)/qc bench demo/w4 --vs demo/float
	$(BIN)/qc run demo/w4 --prompt "She had never seen such a thing before;" --max-tokens 60

test: lint ## Install everything, then lint and run every test
	$(PYTEST)

test-fast: $(VENV)/.all ## Run the tests that take seconds
	$(PYTEST) -m "not slow"

env: $(VENV)/.all ## Set up .venv with every extra

lint: $(VENV)/.all typing ## Check format, rules, import directions and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	cd $(TYPING) && $(CURDIR)/$(BIN)/lint-imports --no-logo --config $(CURDIR)/pyproject.toml
	$(BIN)/pyright

format: $(VENV)/.all ## Format the code and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.all typing ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## Remove .venv and everything that was built
	rm -rf $(VENV) build dist site demo *.egg-info

# The import names qc.ir, qc.passes, ... are made by the installer. Tools that only look at directories (pyright,
# import-linter, the documentation) see the same tree through links.
typing: $(VENV)/.core
	@rm -rf $(TYPING)
	@for file in $$(find qc ir passes frontend backends -name '*.py'); do \
	  link=$(TYPING)/qc/$${file#qc/}; mkdir -p $${link%/*} && ln -s $(CURDIR)/$$file $$link; \
	done

# Stamps: installation is repeated only when what is to be installed changes.
$(VENV)/.core: $(PROJECT)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e .
	@$(BIN)/python -m compileall -q qc ir passes frontend backends  # as pip does for what it installs
	@touch $@

# torch goes first and alone, so that no other package's requirement chooses its version.
$(VENV)/.all: $(VENV)/.core
	$(PIP) torch
	$(PIP) --no-build-isolation -e '.[all]'
	@touch $@
