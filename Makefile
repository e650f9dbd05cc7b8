# make demo    see it work, offline, in about a minute
# make test    everything CI runs: ruff, mypy, import-linter, pytest
# make bench   every benchmark, each against a peer in the same run
# make torture the store's crash, power-cut, race and bit harnesses at full length (half an hour), then every reader of
#              strangers' bytes under a fuzzer (hours); SEED=7 for others, RUNS=100000 for fewer executions a reader
# make matrix  load what we write with PEFT 0.14 to 0.21
# make hub-matrix  huggingface_hub 0.36 to the newest, with Xet and without, against our server
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SET_UP := $(VENV)/.set-up
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test bench torture matrix hub-matrix clean
# Half of what the tests do is to wait, for servers and disks.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(max(4, os.cpu_count()))')
SEED ?= 1
RUNS ?= 10000000

demo: $(SET_UP)
	@$(BIN)/loraforge demo

test: $(SET_UP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

bench: $(SET_UP)
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

torture: $(SET_UP)
	PYTHONPATH=.:registry:cli $(BIN)/python -m tests.crash.store_torture --seed $(SEED)
	PYTHONPATH=.:registry:cli $(BIN)/python -m tests.crash.server_storm --seconds 300 --seed $(SEED)
	PYTHONPATH=.:registry:cli $(BIN)/python -m tests.crash.client_cuts
	-@$(PIP) atheris
	PYTHONPATH=.:registry:cli $(BIN)/python -m tests.fuzz.torture --seed $(SEED) --runs $(RUNS)

matrix: $(SET_UP)
	$(BIN)/python tests/conformance/matrix.py

hub-matrix: $(SET_UP)
	$(BIN)/python tests/conformance/hub_matrix.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Done once, and again when the pins or the metadata change. Every version is in constraints.txt, torch included: an
# unpinned one would bring gigabytes of CUDA.
$(SET_UP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "loraforge needs Python 3.11 or newer; say which: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch hatchling editables
	$(PIP) --no-build-isolation --editable '.[dev,demo]'
	@touch $@
