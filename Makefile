# make demo    the whole pipeline on a small real language model; needs Python 3.11 or newer, nothing else
# make check   lint, types and the tests that need no other program (under 3 minutes)
# make test    every test, with a real Neo4j, graph-tool and a real browser (under 40 minutes)
# make docs    the documentation's site, in build/docs; its tutorial runs while it is built (about 3 minutes)
# make setup   the Python environment and the system's programs that `make test` needs
# make clean   throw away what was made here, the environment included
#
# Each installs what it needs first, once: the environment is made anew only when uv.lock or pyproject.toml changes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo check test docs setup python system clean

VENV := .venv
# inside the environment, so that a deleted environment is made again
STAMP := $(VENV)/made-from-$(shell cat uv.lock pyproject.toml | cksum | tr -d ' ')

# Small shared machines: two OpenMP threads that spin against each other are 25 times slower than one.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

# A process of tests a core; a file's tests stay in one process, which keeps what they share.
BESIDE := -n logical --maxprocesses 4 --dist loadfile
NEEDS_A_PROGRAM := slow or neo4j or browser or graphtool or smollm2

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: python
	$(VENV)/bin/featlas demo

check: python
	$(VENV)/bin/ruff check .
	scripts/typecheck.sh
	$(VENV)/bin/pytest $(BESIDE) -m "not ($(NEEDS_A_PROGRAM))"

test: python system
	@mkdir -p .make
	@code=0; $(VENV)/bin/pytest -rs $(BESIDE) || code=$$?; echo $$code > .make/pytest-exit-code; exit $$code

docs: python
	$(VENV)/bin/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo 'wrote build/docs/index.html: open it in any browser'

setup: python system

python: $(STAMP)

$(STAMP):
	scripts/setup.sh python
	touch $@

# looks for the programs every time (a fraction of a second) and installs what is missing
system: python
	@scripts/setup.sh system

clean:
	rm -rf $(VENV) .make build dist *.egg-info .mypy_cache .ruff_cache .hypothesis report.html
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
