# A fresh machine needs python3 (3.10 or later, with venv and pip) and pip's package index.
PYTHON ?= python3
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist worksteal

BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

$(READY): requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/*.h csrc/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "mod_fused needs Python 3.10 or later; name one: make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-e . --no-build-isolation --no-deps
	@touch $@

setup: $(READY)  ## the virtual environment .venv with pinned versions, mod_fused in editable mode

demo: $(READY)  ## steer the embedded models, print the rewards, draw the trade-off curve
	$(BIN)/mod-fused demo

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# One torch thread per worker: the workers share the cores already.
test: lint  ## linters, then the whole test suite; PYTEST_ARGS="-x -k world" narrows it
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS)

clean:  ## remove .venv and everything that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
