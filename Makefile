# make run     install what is needed into .venv and run the default job: the whole path on the embedded world
# make test    install the development extra too and run the tests
# make slow    the tests that take minutes
# make reproduce   the claims of the papers on the embedded world, a tenth of the steps
# make bench   Osprey beside TRL and transformers, in an environment of its own
# ARGS="--seed=1 --out_dir=out/seed1" is passed on.

PYTHON ?= python3
ARGS ?=

.PHONY: run test slow reproduce bench
run: .venv/run
	.venv/bin/torchrun train.py $(ARGS)

test: .venv/test
	.venv/bin/python -m pytest -n auto --dist loadfile $(ARGS)

slow: .venv/test
	.venv/bin/python -m pytest -m slow $(ARGS)

.venv/run: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable .
	touch $@

.venv/test: .venv/run
	.venv/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

reproduce: .venv/plot
	.venv/bin/python reproduce.py --quick $(ARGS)

.venv/plot: .venv/run
	.venv/bin/python -m pip install --quiet --editable ".[plot]"
	touch $@

bench: .venv-bench/ready
	.venv-bench/bin/python bench.py $(ARGS)

.venv-bench/ready: pyproject.toml
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --editable ".[bench]"
	touch $@
