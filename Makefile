# `make demo` and `make test` are all that a fresh machine needs: both set up what is missing first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= $(shell command -v python3.11 || command -v python3)
UV_VERSION := 0.13.9
BIN := .venv/bin
DATA ?=
KILLS ?= 100
NIGHTS ?= 10
SEED ?= 0
DAYS ?= 30
CONFIG ?= $(if $(DATA),conf/kuairand.yaml,conf/demo.yaml)

.PHONY: help setup lock demo check test test-long test-gpu format docs bench-baselines bench-lifelong bench-features bench-item-vectors bench-code-ranker bench-codebooks bench-tokenizer bench-kmeans-on-gpu bench-architectures bench-table-optimizer bench-semantic-ids compare-baselines compare-inputs compare-architectures compare-organisation scaling soak soak-days faults clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: .venv/.ready  ## environment and JARs, from the lock

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "LazyRec needs Python 3.11 or later; set PYTHON=... to one.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION)
	index=$$($(BIN)/python -m pip config get global.index-url 2>/dev/null || true); \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements.lock; \
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	$(BIN)/python -m jobs.session > .venv/jars.log 2>&1 || { tail -n 1 .venv/jars.log; exit 1; }
	touch $@

lock: ## compile requirements.lock from pyproject.toml
	$(BIN)/uv pip compile -q --python-version 3.11 --all-extras --generate-hashes --no-header --no-annotate \
		--no-emit-index-url pyproject.toml -o requirements.lock

demo: setup  ## the whole pipeline on simulated logs; DATA=<folder of KuaiRand-Pure> runs it on real ones
	$(BIN)/lazyrec run --config $(CONFIG) $(if $(DATA),--set source.path=$(abspath $(DATA)))

check: setup  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup  ## every test but the long ones, in two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-long: setup  ## kills, nights, whole backfills, spark-submit, a cluster of two nodes, MLflow on PostgreSQL, Ray servers that end
	$(BIN)/python -m pytest -m long

test-gpu: setup  ## what only a GPU can show
	$(BIN)/python -m pytest tests/model/test_on_gpu.py

format: setup  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## the pages that are made from code
	$(BIN)/python -m schemas.tables_page > docs/tables.md

bench-baselines: setup  ## popularity, ItemKNN and SASRec on the Beauty file
	$(BIN)/python -m benchmarks.baselines

bench-lifelong: setup  ## compression of long histories beside scikit-learn and faiss; FULL=1: more users a cell
	$(BIN)/python -m benchmarks.lifelong

bench-features: setup  ## the feature jobs beside DuckDB and Polars on the same log; FULL=1: the largest size too
	$(BIN)/python -m benchmarks.features

bench-item-vectors: setup  ## ways of making item vectors, by neighbours that users like together; after lazyrec run with CONFIG
	$(BIN)/python -m benchmarks.item_vectors --config $(CONFIG)

bench-code-ranker: setup  ## what quantitative codes add to a click model; DATA=<folder of KuaiRand-Pure>; FULL=1: more seeds, all impressions
	$(BIN)/python -m benchmarks.code_ranker --config $(CONFIG) $(if $(DATA),--set source.path=$(abspath $(DATA)))

bench-tokenizer: setup  ## RQ-Kmeans beside faiss and scikit-learn at equal seeds, codes of a streamed table; FULL=1: up to 10^6 vectors
	$(BIN)/python -m benchmarks.tokenizer

bench-kmeans-on-gpu: setup  ## a level of K-means on a GPU beside flash-kmeans (where installed) and plain PyTorch
	$(BIN)/python -m benchmarks.kmeans_on_gpu

bench-architectures: setup  ## a training step of the lazy decoder beside its peers, and its grid; FULL=1: 20 steps, 30M parameters
	$(BIN)/python -m benchmarks.architectures
	$(BIN)/python -m benchmarks.architectures --grid

bench-table-optimizer: setup  ## a step of a large embedding table by AdamW, row-wise Adagrad and PyTorch's sparse optimisers
	$(BIN)/python -m benchmarks.table_optimizer

bench-semantic-ids: setup  ## recall by item vector, balance and collision rule, CONFIG= and DATA=; about 4 minutes a row
	$(BIN)/python -m benchmarks.semantic_ids --config $(CONFIG) $(if $(DATA),--set source.path=$(abspath $(DATA)))

compare-baselines: setup  ## the model beside its baselines over three seeds, CONFIG= and DATA=: the README's tables
	$(BIN)/python -m benchmarks.compare_baselines --config $(CONFIG) $(if $(DATA),--set source.path=$(abspath $(DATA)))

compare-inputs: setup  ## recall by inputs, codebook and head, CONFIG= and DATA=; about 5 minutes a row; FULL=1: more rows, seeds
	$(BIN)/python -m benchmarks.compare_inputs --config $(CONFIG) $(if $(DATA),--set source.path=$(abspath $(DATA)))

compare-architectures: setup  ## the lazy decoder beside its peers at equal parameters and samples; FULL=1: 256 tokens, seeds
	$(BIN)/python -m benchmarks.compare_architectures --config $(CONFIG) $(if $(DATA),--set source.path=$(abspath $(DATA)))

compare-organisation: setup  ## ways to organise impressions at equal compute, CONFIG= and DATA=; FULL=1: seeds
	$(BIN)/python -m benchmarks.compare_organisation --config $(CONFIG) $(if $(DATA),--set source.path=$(abspath $(DATA)))

scaling: setup  ## loss against parameters and operations, and the law that fits; CONFIG= and DATA=; FULL=1: seeds, a larger one
	$(BIN)/python -m benchmarks.scaling --config $(CONFIG) $(if $(DATA),--set source.path=$(abspath $(DATA)))

bench-codebooks: setup  ## ways to make semantic ids side by side, as in OneRec-V1's Table 11; FULL=1: three seeds
	$(BIN)/python -m benchmarks.codebooks

soak: setup  ## kills at random moments and nights in a row; KILLS=100 NIGHTS=10 SEED=0
	$(BIN)/python -m tests.faults.soak --kills $(KILLS) --nights $(NIGHTS) --seed $(SEED)

soak-days: setup  ## a simulated month, a day a night, late and corrected days and kills among them; DAYS=30 SEED=0
	$(BIN)/python -m tests.faults.soak_days --days $(DAYS) --seed $(SEED)

faults: setup  ## every fault played, and the page of them
	$(BIN)/python -m tests.faults.table > docs/faults.draft
	mv docs/faults.draft docs/faults.md

clean:  ## remove the demo's lakes
	rm -rf lake
