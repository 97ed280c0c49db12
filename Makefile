# Every target prepares what it needs: `make test` in a fresh clone creates .venv and installs into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-libraries validate lint docs bench clean

# The tests that meet other libraries, whose versions differ between Pythons (ArviZ is another program from 3.12 on).
LIBRARIES := $(patsubst %,tests/test_%.py,cli data diagnostics estimators export images imports model optimisers \
	predictive report storage weight_plots wheel)

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.core  ## Run examples/demo.py
	$(BIN)/python examples/demo.py

# One thread a worker, or the workers fight for the cores; a file to one worker, which shares its fixtures.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.test  ## Run the tests and the doctests (minutes on two cores)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-libraries: export OMP_NUM_THREADS := 1
test-libraries: $(VENV)/.test  ## Run the tests that meet other libraries (a second Python: VENV=.venv-3.13 PYTHON=python3.13)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(LIBRARIES)

validate: export OMP_NUM_THREADS := 1
validate: $(VENV)/.test  ## Run the full calibration, coverage and kill tests (long)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 -m validate

lint: $(VENV)/.test  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.docs  ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.bench  ## Run every benchmark in turn
	@set -e; for script in $(sort $(wildcard tests/benchmarks/bench_*.py)); do \
		echo "== $$script"; $(BIN)/python $$script; done

clean:  ## Remove caches and build outputs; .venv and out/ stay
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis .coverage *.egg-info
	find bnnflow tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: .core is the package alone, the others add the extra of the same name.
# The constraints pin torch, so that no loose request can replace the build that is already there.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -q -c constraints.txt -e '.[$*]'
	@touch $@

# laplace-torch asks for torchvision and never imports it; where torch is a CPU build, the one of PyPI breaks on import.
$(VENV)/.laplace: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -q -c constraints.txt -e '.[laplace]'
	$(BIN)/pip uninstall -q -y torchvision
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("bnnflow needs Python 3.11 or newer, \
	and $(PYTHON) is %d.%d; choose another: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
