# Nothing but python3 (3.11 or newer), pip and make is needed: the first call builds .venv and installs the package.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
OUT ?= demo-out
WORKERS ?= 2

bin := $(VENV)/bin
installed := $(VENV)/.installed
pytest := OMP_NUM_THREADS=1 $(bin)/python -m pytest -n $(WORKERS)

.PHONY: demo test test-all lint format venv clean

demo: venv
	$(bin)/wholeslide demo --out $(OUT) --seed $(SEED)

test: venv
	$(pytest)

test-all: venv
	$(pytest) -m "slow or not slow"

lint: venv
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

format: venv
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

venv: $(installed)

$(installed): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: $(PYTHON) is older than 3.11 (PYTHON): name a newer one, as in make $@ PYTHON=python3.12' >&2; exit 2; }
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(bin)/python install --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
