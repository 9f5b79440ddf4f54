# Everything a newcomer needs. Each target sets up what it uses in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_STAMP := $(VENV)/.installed-to-run
SOURCES = pyproject.toml constraints-dev.txt CMakeLists.txt $(shell find plugins -type f)
NATIVE = $(shell find plugins benchmarks -name "*.cpp" -o -name "*.h")

# On a machine with a GPU: onnxruntime-gpu takes the place of onnxruntime, so a folder of its own.
GPU_VENV := .venv-gpu

.PHONY: demo test test-fast gpu lint types check clean help

help:
	@echo "make demo       compile the demo model and compare all heads with CHAI"
	@echo "make test       run the tests"
	@echo "make test-fast  the tests that take seconds: no other model than tiny ones, nothing compiled"
	@echo "make gpu        on a machine with a GPU: build, run, compare and time everything, one report"
	@echo "make check      lint, types and tests, as CI does"

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }

# What running needs, and (below) what developing needs beyond it.
$(RUN_STAMP): $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints-dev.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints-dev.txt --editable .
	@touch $@

$(STAMP): $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints-dev.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints-dev.txt --editable '.[dev]'
	@touch $(RUN_STAMP) $@

demo: $(RUN_STAMP)
	$(BIN)/chai-export make engines/demo.yaml

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder tests/unit

gpu:
	@[ -n "$$TensorRT_ROOT" ] || echo "TensorRT_ROOT names no headers of TensorRT: its plugin is not built (docs/tensorrt.md)"
	@[ -x $(GPU_VENV)/bin/python ] || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(GPU_VENV)/bin/python -m pip install --quiet -c constraints-dev.txt torch --editable '.[dev]' tensorrt==11.4.*
	$(GPU_VENV)/bin/python -m pip uninstall --quiet --yes onnxruntime
	$(GPU_VENV)/bin/python -m pip install --quiet --force-reinstall --no-deps onnxruntime-gpu
	$(GPU_VENV)/bin/python benchmarks/first_contact.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf build engines/out .mypy_cache .ruff_cache .pytest_cache
