# Each target sets up what it needs in .venv; a second run reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*) CMakeLists.txt pyproject.toml constraints.txt

# Bytecode of what is imported is written when it is, of all the rest never: nearly half of installing.
INSTALL := $(BIN)/python -m pip install -q --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test bench lint clean

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch  # first and alone: the tested build, not the newest
	$(INSTALL) -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/effopd-train --demo --overwrite_output_dir

# Files side by side, in the order that tests/conftest.py puts them; passive: a thread that waits for its team must not
# keep a core from another file's tests.
test: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

$(VENV)/.bench: $(VENV)/.installed
	$(INSTALL) -e '.[bench]'
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h

clean:
	rm -rf $(VENV) build outputs
