# `make demo` and `make test` set everything up on a fresh machine; the rest assumes nothing either.
PYTHON ?= python3
VENV ?= .venv
# An exact pin, so that pip takes the CPU build where an index offers one.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test test-all docs families lint types setup setup-dev demo-model clean

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/lowtide demo --adapter-path lowtide-demo --overwrite

test: setup-dev
	$(BIN)/python -m pytest -m "not slow and not docs"

# llama.cpp is built from source, which takes some minutes; only slow tests compare with it.
test-all: setup-dev
	$(BIN)/python -m pip install --quiet --editable ".[llama]"
	$(BIN)/python -m pytest

docs: setup-dev
	$(BIN)/python -m pytest -m docs

families: setup-dev
	$(BIN)/python -m lowtide.check.families --out docs/families.md

lint: setup-dev
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/pydoclint --quiet src

types: setup-dev
	$(BIN)/mypy

demo-model: setup-dev
	$(BIN)/python -m lowtide.demo.build --out src/lowtide/demo/assets/model

clean:
	rm -rf $(VENV) lowtide-demo .mypy_cache .ruff_cache .pytest_cache
