# Bare Python >= 3.11 and make are enough; everything else comes from the package registries.
# `make VENV=/elsewhere …` builds the environment elsewhere, `PIP_FLAGS=…` reaches every pip call.

VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n auto --maxprocesses 4
BENCH_FLAGS ?=

# The first of these that is Python 3.11 or newer.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$p"; break; fi; done)

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help install dev quickstart test check bench prove builtin-model clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 24

install: $(VENV)/.core ## .venv with what a user needs
dev: $(VENV)/.dev ## .venv with what a developer needs

quickstart: $(VENV)/.core ## align the built-in model and compare its answers, on a CPU
	$(BIN)/trueup quickstart

test: $(VENV)/.dev ## all tests that need no accelerator
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(VENV)/.dev ## lint, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(VENV)/.dev ## the DPO step against its peers, each in its own environment; BENCH_FLAGS=… for options
	$(BIN)/python -m benchmarks.dpo $(BENCH_FLAGS)

prove: $(VENV)/.dev ## repeat the README's measured claims; takes long
	$(BIN)/python -m pytest -m prove

builtin-model: $(VENV)/.core ## train the built-in model again from its seed
	$(BIN)/python -m trueup.builtin.build

clean: ## remove the environment and what tools left behind
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "trueup needs Python 3.11 or newer, and none was found as python3." \
		"Install one, or name it: make PYTHON=/path/to/python3.12 …" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) has no working venv module" \
		"(Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@touch $@

# torch goes first: asked for by another package's range, pip may pick a newer build than the one tested.
$(VENV)/.core: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing into $(VENV). The first time this downloads torch and takes some minutes."
	$(PIP) $(TORCH)
	$(PIP) --quiet -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --quiet -e '.[dev]'
	@touch $@
