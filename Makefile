# Everything a newcomer or CI needs; `make help` lists it. Only a Python of a supported version must be there.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= logical
PROMPT ?= Return the [MASK] of the object.

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Files rather than tests are dealt to the workers, so that what a file sets up once is set up once; in the order that
# tests/conftest.py gives them.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-nightly check docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r t d; do printf '%-18s%s\n' "$$t" "$$d"; done

install: $(VENV)/.installed ## make .venv with the pinned dependencies

demo: install ## train a small BERT for about 90 s, let it fill a [MASK], plan BERT-Large
	$(BIN)/bigtrain launch recipes/quickstart_bert.yaml
	$(BIN)/bigtrain generate runs/quickstart_bert --prompt "$(PROMPT)"
	$(BIN)/bigtrain plan recipes/bert_large.yaml

test: install ## the whole test suite
	$(PYTEST)

test-fast: install ## the tests that take seconds
	$(PYTEST) -m "not gpu and not nightly and not slow"

test-nightly: install ## what takes too long for every change: whole grids, long runs
	$(PYTEST) -m "nightly and not gpu"

check: install ## linters, types, import contracts, generated files
	PYTHON=$(BIN)/python scripts/check

docs: install ## the documentation site, into build/site
	$(BIN)/python scripts/build_docs.py

clean: ## remove the environment and what tools left behind; runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist

# The stamp is older than the lock file only when the lock file changed. torch comes first, so that nothing else
# brings another build of it, and without hashes, since its build differs by machine.
$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"bigtrain needs Python 3.11 to 3.13; $(PYTHON) is {v[0]}.{v[1]}: run make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv"; exit 1; }
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --require-hashes --no-deps -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	$(PIP) check
	@touch $@
