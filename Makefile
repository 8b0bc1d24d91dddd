# The one front door. `make demo` and `make test` need cargo, python3 with venv, a C++ compiler and
# the package registries; everything else they make themselves in .venv and target.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
INSTALLED := $(VENV)/.installed
# What pyproject.toml needs for a build, installed once instead of in an isolated environment.
BUILD_REQUIRES := $(shell sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | sed 's/", "/" "/g')

# Binaries of cargo's find libtorch so.
WITH_TORCH = LD_LIBRARY_PATH="$$(python -c 'import os, torch; print(os.path.join(torch.__path__[0], "lib"))')"

export VIRTUAL_ENV := $(VENV)
export PATH := $(VENV)/bin:$(PATH)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# The theme's advertisement for its successor.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help build demo bench evidence conformance docs test test-rust test-python test-gpu lint format clean

help: ## list the targets
	@sed -n -E 's/^([a-z-]+):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 16

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	pip install --quiet $(BUILD_REQUIRES)
	maturin develop --release --extras demo,test,dev,docs
	touch $@

build: $(INSTALLED) ## make .venv and build the extension into it
	maturin develop --release --skip-install

demo: build ## fine-tune MiniLM on BBC news with growing ranks, beside plain LoRA
	increlora-rs demo --out demo

bench: build ## measure everything (some 25 minutes, on a quiet machine); BENCH=--quick for 3
	python -m benches $(BENCH)
	$(WITH_TORCH) cargo bench --quiet

evidence: build ## write the tables and charts of docs/evidence.md from the results beside it
	python docs/evidence/render.py

conformance: build ## run PEFT's own tests on IncreLoraConfig, fresh and grown
	python -m conformance

docs: $(INSTALLED) ## build the site into target/site; a warning is an error
	mkdocs build --strict

test: lint docs test-rust test-python conformance ## everything that CI runs

test-rust: $(INSTALLED)
	$(WITH_TORCH) cargo test --release --quiet

test-python: build
	pytest

test-gpu: ## the kernels' tests, with the interpreter whose packages are at hand
	$(PYTHON) -m pytest tests/cuda

lint: build
	cargo fmt --check
	cargo clippy --release --all-targets --quiet -- -D warnings
	ruff format --check --quiet .
	ruff check --quiet .
	mypy
	python -m mypy.stubtest increlora_rs._core

format: $(INSTALLED) ## format Rust and Python
	cargo fmt
	ruff format --quiet .
	ruff check --fix --quiet .

clean: ## remove what was built, .venv included
	rm -rf $(VENV) target demo
