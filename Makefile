# Every target does its own set-up in .venv; all it needs is make, pip and Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Each takes up to two gigabytes.
WORKERS := -n logical --maxprocesses 4 --dist worksteal

# Two installations into one environment must not run at the same time.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-all check format bench docs clean always

help:
	@echo "make demo     see it work: 15 to 30 seconds once installed, a figure"
	@echo "make test     run the tests, 5 to 13 minutes; choose with TESTS='tests/test_patch.py -k runner'"
	@echo "make test-all run them on whole products of cases, compiled as for users; most of an hour"
	@echo "make check    lint, formatting, types"
	@echo "make format   put formatting and imports right"
	@echo "make bench    run the benchmarks"
	@echo "make docs     build the documentation"
	@echo "make clean    remove the environment and everything built"

demo: $(VENV)/.has-demo
	@$(BIN)/python examples/demo.py

test: $(VENV)/.has-test
	@$(BIN)/python -m pytest $(WORKERS) $(TESTS)

test-all: $(VENV)/.has-test
	@FULL_OPTIMIZATION=1 $(BIN)/python -m pytest $(WORKERS) --all $(TESTS)

check: $(VENV)/.has-lint $(VENV)/.has-test
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m pyright --pythonpath $(BIN)/python

format: $(VENV)/.has-lint
	@$(BIN)/python -m ruff check --fix
	@$(BIN)/python -m ruff format

# Each claim in a process of its own; files without a program in them are shared by the others.
bench: $(VENV)/.has-rivals
	@set -e; for claim in $$(grep -l '^if __name__ == "__main__"' benchmarks/*.py); do \
	    echo "== $$claim"; $(BIN)/python $$claim; done

docs: $(VENV)/.has-docs
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf $(VENV) build dist docs/_build .hypothesis .pytest_cache .ruff_cache

# One stamp for each extra of pyproject.toml. What an interrupted installation leaves behind can look
# complete to pip, so the environment has no .folder while one runs, and is made anew without it.
$(VENV)/.has-%: $(VENV)/.folder pyproject.toml
	@echo "Installing perturbax with what '$*' needs into $(VENV), a minute or two ..."
	@mv $(VENV)/.folder $(VENV)/.unfinished
	@$(PIP) install --editable '.[$*]'
	@mv $(VENV)/.unfinished $(VENV)/.folder
	@touch $@

# An environment works in its own folder only, and not without the Python that it was made with:
# after a copy, a move or the removal of that Python it is made anew.
ifneq ($(shell $(BIN)/python -c '' 2>/dev/null && cat $(VENV)/.folder 2>/dev/null),$(CURDIR))
$(VENV)/.folder: always
endif

# Some systems ship Python without what gives a new environment its pip; there the pip outside it
# puts one in.
$(VENV)/.folder:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "No '$(PYTHON)' here. Name a Python: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "perturbax needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	         "Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	    exit 1; }
	@echo "Making the environment $(VENV) ..."
	@$(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 || { \
	    $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	    $(PYTHON) -m pip install --quiet pip --target \
	        "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; }
	@$(PIP) install --upgrade pip
	@echo '$(CURDIR)' > $@
