# ARGS="--seed=1 --out_dir=out/seed1" is passed on to what is started.
PYTHON ?= python3
ARGS ?=
BIN = .venv/bin

.PHONY: help run fast test slow lint house reproduce bench

help:             ## these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: .venv/run    ## the default job, a few minutes: pretraining to OSP on the embedded world
	$(BIN)/torchrun train.py $(ARGS)

fast: .venv/dev   ## the core's tests that start no processes: within a minute
	$(BIN)/python -m pytest tests/core -m "not slow and not processes" -n auto --dist loadfile $(ARGS)

test: .venv/dev   ## all tests but the slow ones
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

slow: .venv/dev   ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: .venv/dev   ## ruff, and mypy on the core
	$(BIN)/ruff check .
	$(BIN)/mypy

house:            ## the structure in figures: lines by room, the largest function, who imports whom
	@$(PYTHON) tests/house.py $(ARGS)

reproduce: .venv/dev      ## the papers' claims on a tenth of the steps: does all of it run?
	$(BIN)/python -m experiments.reproduce --quick $(ARGS)

bench: .venv-bench/ready  ## beside TRL and transformers, in an environment of its own
	.venv-bench/bin/python -m experiments.bench $(ARGS)

# What is installed is what Osprey needs, never Osprey itself: it runs from this folder.
.venv/run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt .
	touch $@

.venv/dev: .venv/run
	$(BIN)/python -m pip install --quiet -c constraints.txt ".[dev]"
	touch $@

.venv-bench/ready: pyproject.toml constraints.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet -c constraints.txt ".[bench]"
	touch $@
