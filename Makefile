# `make demo` and `make test` need only make and Python >= 3.11: they create the environment.

VENV ?= .venv
# What of pyproject.toml is installed besides the package.
EXTRAS ?= dev
# The interpreter that creates the environment: the first of these that runs and is new enough. Newer
# ones come first: Python 3.11 has an older JAX, which compiles more slowly.
PYTHONS := $(foreach version,3.13 3.12 3.11,python$(version) $(wildcard $(HOME)/.pyenv/versions/$(version).*/bin/python))
PYTHON ?= $(shell for python in $(PYTHONS) python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
# What the demo trains: panoptic, instance or semantic.
TASK ?= panoptic
DEMO = runs/demo$(if $(filter-out panoptic,$(TASK)),_$(TASK))
# How many test processes, which tests (`make test TESTS=tests/test_page.py`), and the fixtures of
# `parity`.
WORKERS ?= 2
TESTS ?=
FIXTURES ?= fixtures

INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-all lint format parity parity_single parity_double clean

demo: $(INSTALLED)  ## Train a small K-Net on drawn pictures, evaluate it, draw: make demo TASK=instance
	rm -rf $(DEMO)
	$(VENV)/bin/python train.py --config configs/shapes_$(TASK).py --workdir $(DEMO)
	$(VENV)/bin/python eval.py --workdir $(DEMO) --analysis

PYTEST = $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

test: $(INSTALLED)  ## Run the tests but for those marked slow.
	$(PYTEST) -m "not slow" $(TESTS)

test-slow: $(INSTALLED)  ## Run those marked slow.
	$(PYTEST) -m slow $(TESTS)

test-all: $(INSTALLED)  ## Run all tests.
	$(PYTEST) $(TESTS)

lint: $(INSTALLED)  ## Check style.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)  ## Mend style.
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# EXACT: what is compared in double precision, everything unless told otherwise.
parity: parity_single parity_double  ## Compare with the PyTorch reference: make -j2 parity FIXTURES=folder

parity_single: $(INSTALLED)
	$(VENV)/bin/python tests/parity.py --quiet $(FIXTURES)

parity_double: $(INSTALLED)
	$(VENV)/bin/python tests/parity.py --quiet --x64 $(or $(EXACT),$(FIXTURES))

clean:  ## Remove caches and the demo's run; the environment stays.
	rm -rf runs/demo* .jax_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@test -x $(VENV)/bin/pip || test -n "$(PYTHON)" || { \
		echo "No Python >= 3.11 found: install one, or name it with 'make PYTHON=/path/to/python'." >&2; exit 2; }
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[$(EXTRAS)]'
	@touch $@
