# `make demo` and `make test` do their whole set-up: a virtual environment in .venv, the pinned packages, the run.

CANDIDATES := python3.11 python3.12 python3.13 python3
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

# Each test worker computes on one core.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format nightly support clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 16

setup: $(STAMP) ## Create .venv and install the pinned packages

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv found; name one: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup ## Generate, edit and compare three pictures; writes demo/contact_sheet.png and demo/report.json
	$(BIN)/fisedit demo --output demo

test: lint ## Lint, types, tests and the documentation's code blocks
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS)

lint: setup ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Mend what lint can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

nightly: setup ## The tests that take minutes
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) -m nightly

support: setup ## Write docs/support.md from the tests that prove it
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) -m "supports and not nightly" --write-support

clean: ## Remove everything that make or a build wrote
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
