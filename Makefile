# make demo and make test do all set-up themselves: a virtual environment in .venv with pinned versions.
#   PYTHON=python3.12 make test         another interpreter (only when .venv does not exist yet)
#   TORCH_INDEX= make demo              torch from the default index (a CUDA build) instead of the CPU build

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ROOMS := weft/dsl weft/compiler weft/codegen weft/runtime weft/specs

# One thread each: workers that all start a thread per core only wait for one another.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-all unit lint types format clean

demo: $(STAMP)
	$(BIN)/python -m examples.demo

test: lint types
	$(PYTEST) -m "not slow"

test-all: lint types
	$(PYTEST)

unit: $(STAMP)
	$(PYTEST) -m "not slow" -x

# `ruff check .` skips links. Named as links, under weft/, the rooms' relative imports resolve, and the banned imports in the
# ruff.toml of each room hold the order dsl <- compiler <- codegen <- runtime <- weft.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff check --select TID251 $(ROOMS)
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy -p weft

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77"
	$(BIN)/python -m pip install --quiet --no-deps --retries 1 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,peers,plot]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache demo-output
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -exec rm -rf {} +
