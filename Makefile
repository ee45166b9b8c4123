# The same commands on every machine: they need python3 (3.10 or newer) with pip, and set up the rest in .venv.
#
#   make demo       train a small model on packed documents, beside one document at a time
#   make test       the tests that need no GPU
#   make test-gpu   the tests that need one, with a Python whose torch sees it (PYTHON=...)
#   make check      lint, format, types, spelling, generated parts of the documentation
#   make docs       regenerate those parts
#   make bench      the benchmarks: on the GPU that PYTHON's torch sees, else on the CPU
#
# ARGS="..." is passed on: make test ARGS="-k packing", make demo ARGS="--help".
#
# TORCH says what "pip install" gets for torch, where .venv has none yet. Elsewhere than on a machine whose pip is
# configured for it, PyPI's Linux build brings CUDA; the CPU build is
#     make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
STAMPS := $(VENV)/.stamps
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu check lint types spelling docs docs-check bench clean

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

demo: $(STAMPS)/demo
	$(BIN)/anyattn demo $(ARGS)

test: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: lint types spelling docs-check

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/dev
	$(BIN)/mypy

spelling: $(STAMPS)/dev
	$(BIN)/codespell

docs: $(STAMPS)/dev
	$(BIN)/python docs/generate.py

docs-check: $(STAMPS)/dev
	$(BIN)/python docs/generate.py --check

# The GPU targets use a Python that has CUDA torch already, and the sources in place: nothing replaces that torch.
SEES_GPU = $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null

test-gpu:
	@$(SEES_GPU) || { echo 'test-gpu needs a Python whose torch sees a GPU: make test-gpu PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import hypothesis, numpy, packaging, pytest' 2>/dev/null || \
		$(PYTHON) -m pip install -q --disable-pip-version-check hypothesis numpy packaging pytest
	PYTHONPATH=src $(PYTHON) -m pytest -p no:benchmark -m gpu $(ARGS)

bench:
	@if $(SEES_GPU); then PYTHONPATH=src $(PYTHON) benchmarks/suite.py $(ARGS); \
		else $(MAKE) -s $(STAMPS)/test && $(BIN)/python benchmarks/suite.py $(ARGS); fi

# --- set-up ---------------------------------------------------------------------------------------------------------

$(STAMPS)/demo: EXTRAS := cli,plot,transformers
$(STAMPS)/test: EXTRAS := test
$(STAMPS)/dev:  EXTRAS := dev

$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/dev: pyproject.toml | $(STAMPS)/torch
	@echo 'installing anyattn[$(EXTRAS)] into $(VENV)'
	@$(PIP) -e '.[$(EXTRAS)]'
	@touch $@

$(STAMPS)/torch: | $(BIN)/python
	@mkdir -p $(STAMPS)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo 'installing $(TORCH) into $(VENV)'; $(PIP) $(TORCH); }
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'anyattn needs Python 3.10 or newer: make PYTHON=/path/to/python3' >&2; exit 1; }
	@echo 'creating $(VENV)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
