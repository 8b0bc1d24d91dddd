# The one front door. `make demo` and `make test` need cargo, python3 with venv, a C++ compiler and
# the package registries; everything else they make themselves in .venv and target.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
INSTALLED := $(VENV)/.installed
DEEPSPEED := $(CURDIR)/target/deepspeed
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
# What a build needs, installed once instead of in an isolated environment: the oldest torch that the package runs with.
BUILD_REQUIRES := "maturin>=1.8,<2" "torch==2.13.0" setuptools

# Switches by which torch, our loops, oneDNN and MKL take the kernels of other processors, a run of the tests each;
# what a processor lacks or a library does not know is left as it is. Inductor's cache does not know that the first
# switch changes the code it keeps: each has a cache of its own.
INSTRUCTION_SETS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 \
	ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	MKL_CBWR=COMPATIBLE MKL_CBWR=AVX2 OMP_NUM_THREADS=1
# What a machine's kernels could decide: numbers, not files, pictures and documents.
NUMERIC_TESTS := tests/core tests/layers tests/methods tests/ops tests/training tests/saved/test_export.py \
	tests/saved/test_export_kinds.py tests/saved/test_history_file.py tests/resizing/test_optimizer_state.py \
	tests/tuner/test_adapters.py tests/tuner/test_model.py tests/tuner/test_weighted.py

# Binaries of cargo's find libtorch so.
WITH_TORCH = LD_LIBRARY_PATH="$$(python -c 'import os, torch; print(os.path.join(torch.__path__[0], "lib"))')"

export VIRTUAL_ENV := $(VENV)
export PATH := $(VENV)/bin:$(PATH)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# The theme's advertisement for its successor.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help build wheel demo bench evidence conformance conformance-all docs test test-rust test-python test-torches \
	test-isa test-gpu test-deepspeed lint format clean

help: ## list the targets
	@sed -n -E 's/^([a-z-]+):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 20

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	pip install --quiet $(BUILD_REQUIRES)
	maturin develop --release --extras demo,test,dev,docs
	touch $@

build: $(INSTALLED) ## make .venv and build the extension into it
	maturin develop --release --skip-install

# One wheel for every torch of python/increlora_rs/torches.json.
wheel: ## the file to install elsewhere, in dist; TORCH=2.11.0 or 2.12.0 for one of these versions of torch
ifdef TORCH
	PYTHON=$(PYTHON) torches/older.sh $(TORCH)
else
	$(MAKE) $(INSTALLED)
	maturin build --release --out dist
endif

demo: build ## fine-tune MiniLM on BBC news with growing ranks, beside plain LoRA
	increlora-rs demo --out demo

bench: build ## measure everything (some 25 minutes, on a quiet machine); BENCH=--quick for 3
	python -m benches $(BENCH)
	$(WITH_TORCH) cargo bench --quiet

evidence: build ## write the tables and charts of docs/evidence.md from the results beside it
	python docs/evidence/render.py

conformance: build ## run PEFT's own tests on IncreLoRA, fresh and grown, and a sample on the other methods
	python -m conformance

conformance-all: build ## run PEFT's own tests on every method
	python -m conformance --all

docs: $(INSTALLED) ## build the site into target/site; a warning is an error
	mkdocs build --strict

test: lint docs test-rust test-python conformance test-torches ## everything that CI runs

test-rust: $(INSTALLED)
	$(WITH_TORCH) cargo test --release --quiet

# A process a core, of one thread each (tests/conftest.py), and no more than memory is likely to be there for. Tests
# of one file stay together, for what they share, until a process would have nothing left to do.
test-python: build
	pytest --numprocesses logical --maxprocesses 4 --dist worksteal

test-torches: build ## this build under the newest torch that it may run with, which is fetched
	python -m torches

test-isa: build ## the tests of numbers as on other processors, and on one core
	@set -e; for switch in $(INSTRUCTION_SETS); do \
		echo "== $$switch"; \
		env $$switch TORCHINDUCTOR_CACHE_DIR="$(CURDIR)/target/inductor/$$switch" pytest $(NUMERIC_TESTS); \
	done
	@echo "== one core"; taskset -c 0 pytest $(NUMERIC_TESTS)

test-gpu: ## the kernels' tests, with the interpreter whose packages are at hand
	$(PYTHON) -m pytest tests/cuda

# What .venv has, and DeepSpeed, which .venv is left without.
$(DEEPSPEED)/.installed: $(INSTALLED)
	python -m venv $(DEEPSPEED)
	echo "import site; site.addsitedir('$$(python -c '$(SITE)')')" > "$$($(DEEPSPEED)/bin/python -c '$(SITE)')/venv.pth"
	$(DEEPSPEED)/bin/pip install --quiet wheel
	DS_BUILD_OPS=0 $(DEEPSPEED)/bin/pip install --quiet --no-build-isolation deepspeed==0.19.8
	touch $@

test-deepspeed: build $(DEEPSPEED)/.installed ## the tests under DeepSpeed, in an environment of their own
	$(DEEPSPEED)/bin/python -m pytest tests/training/test_zero.py tests/project/test_docs_code.py -k "zero or deepspeed"

lint: build
	cargo fmt --check
	cargo clippy --release --all-targets --quiet -- -D warnings
	ruff format --check --quiet .
	ruff check --quiet .
	mypy
	python -m mypy.stubtest increlora_rs._core
	actionlint .github/workflows/*.yml

format: $(INSTALLED) ## format Rust and Python
	cargo fmt
	ruff format --quiet .
	ruff check --fix --quiet .

clean: ## remove what was built, .venv included
	rm -rf $(VENV) target demo
