# Every verb makes its own environment when there is none: Python 3.11 and make are all it takes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The rooms whose docstrings name every parameter.
DOCUMENTED := 'solvers/*.py' 'retrain/api/*.py' 'retrain/methods/*.py' 'retrain/bounds/*.py' \
	'retrain/stream/*.py' 'retrain/adapters/*.py' 'retrain/data/*.py' 'retrain/runs/*.py' \
	'retrain/compact/*.py'
READY := $(VENV)/.ready

.PHONY: demo test gpu lint bench-smoke format clean

demo: $(READY)
	$(BIN)/retrain demo --out runs/demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# The tests marked gpu. Without a CUDA device it says so and fails: nothing was tested.
gpu: $(READY)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu: torch " + torch.__version__ + " sees no CUDA device; nothing was tested")'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/numpydoc lint $$(git ls-files $(DOCUMENTED))

bench-smoke: $(READY)
	$(BIN)/python -m bench solvers --smoke

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# constraints.txt pins what a build and a run need, so that every machine gets the same.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
