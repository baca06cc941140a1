# make demo   compress the small model in examples/demo and show what it costs in quality
# make test   lint, types and tests
# make test-all   the same, with the tests that take minutes
# All first make a virtual environment in .venv with the versions of constraints.txt; they need Python 3.11 to 3.14 only.

# The first that starts and can make environments: a version manager may list a command that does not run.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
RUN := $(VENV)/bin
# Two processes with one thread each: on small models, torch's threads cost more than they give.
JOBS ?= 2
# A file of tests stays in one process, which then makes what its tests share once.
PYTEST_ARGS ?= -q -n $(JOBS) --dist loadfile
INPUTS := pyproject.toml constraints.txt tools/install.py

.PHONY: demo test test-all others lint types pytest format wheel clean

demo: $(VENV)/.run
	rm -rf .demo
	$(RUN)/compress run demo examples/demo -o .demo/llama-4bit --evaluate examples/demo/evaluation.jsonl

test: lint types pytest

test-all: export COMPRESS_SLOW = 1
test-all: test

# Minutes for each other Python of this machine: a new environment, the demo, a few tests.
others: $(VENV)/.dev
	$(RUN)/python tools/other_pythons.py

lint: $(VENV)/.dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(VENV)/.dev
	$(RUN)/mypy

pytest: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN)/pytest $(PYTEST_ARGS)

format: $(VENV)/.dev
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

wheel: $(VENV)/.run
	$(RUN)/pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) .demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamps are written last, so a run that was interrupted installs again.
$(VENV)/.run: $(INPUTS) | $(RUN)/pip
	$(RUN)/python tools/install.py
	@touch $@

$(VENV)/.dev: $(INPUTS) | $(RUN)/pip
	$(RUN)/python tools/install.py dev
	@touch $@ $(VENV)/.run

$(RUN)/pip:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.14 that can make virtual environments. Install one" \
		"(on Debian and Ubuntu with its package python3-venv), or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
