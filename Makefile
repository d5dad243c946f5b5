# One door to everything. `make demo` and `make test` work on a fresh clone: they create a virtual
# environment in .venv, install into it, and a stamp file makes the next run start at once.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install demo test check test-full sim-nightly hour model soak chaos fuzz bench spec wheel clean

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

install: $(STAMP) ## make .venv and install everything into it

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "swarmtrain needs Python 3.11 or newer on the path"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[train,test,check]'
	@touch $@

demo: $(STAMP)   ## three peers on this machine train a model together
	$(BIN)/swarmtrain demo

check: $(STAMP)  ## lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check      ## check, then the tests (minutes)
	$(PYTEST) -q

test-full: check ## also the tests marked slow
	$(PYTEST) -q -m 'slow or not slow'

SIM_SCHEDULES ?= 10000
sim-nightly: $(STAMP) ## thousands of simulated fault schedules; what was seen; which planted bugs are found
	$(BIN)/python -m tests.nightly --schedules $(SIM_SCHEDULES)

hour: $(STAMP)   ## 300 simulated members for an hour, a third of them lost; wants a C compiler; hour.json
	$(BIN)/python -m benchmarks.hour --output hour.json

model: $(STAMP)  ## every state of small models of the log and of a round; what each guard is for
	$(BIN)/python -m swarmtrain_protocols.testing.model

MINUTES ?= 60
soak: $(STAMP)   ## eight peers train for MINUTES, every ten seconds one is killed; soak.json
	$(BIN)/python -m tests.chaos C1 --minutes $(MINUTES) --output soak.json

CHAOS_MINUTES ?= 2.7
chaos: $(STAMP)  ## every scenario of docs/reliability.md on real processes, in short; chaos.json
	$(BIN)/python -m tests.chaos all --minutes $(CHAOS_MINUTES) --output chaos.json

FUZZ_INPUTS ?= 1000000
fuzz: $(STAMP)   ## hostile bytes into every decoder; prints inputs, rate, what was unexpected
	$(BIN)/python -m tests.fuzz --inputs $(FUZZ_INPUTS)

bench: $(STAMP)  ## all-reduce against gloo, in one run; results in benchmarks/results
	$(BIN)/python benchmarks/allreduce.py

spec: $(STAMP)   ## rewrite the tables of limits and specifications in protocols/
	$(BIN)/python protocols/spec/update.py

wheel: $(STAMP)  ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean:           ## remove the environment and caches
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
