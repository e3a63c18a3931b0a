# `make` lists the targets. `make test` needs nothing but Python 3.11, gcc and make.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
MODEL := .cache/models/smollm2-135m
TEMPLATE := benchmarks/models/smollm2_tools.jinja
PORT ?= 8000
PYTEST_ARGS ?=

export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export HF_HUB_OFFLINE ?= 1
# The environment is installed without byte code: whoever imports a module first leaves it for the rest.
export PYTHONDONTWRITEBYTECODE :=

BENCH_ARGS ?=

.PHONY: help environment setup model lint format docs test next test-next demo bench serve clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

environment:
	@.ci/setup.sh environment

setup: environment ## build .venv: CPU torch, vLLM, tools, this package
	@.ci/setup.sh package

model: environment ## build the two local models in .cache/models
	@$(PY) -m benchmarks.models.smollm2
	@$(PY) -m benchmarks.models.tiny

lint: environment ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup ## let ruff fix and format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: environment ## the documentation as a site in out/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# One process more than CI has cores, since servers are waited for; each with one thread for the
# model. Hypothesis plays the same examples each time; look for new ones with PYTEST_ARGS="--hypothesis-profile=default".
test: export VLLM_CPU_OMP_THREADS_BIND := nobind
test: export OMP_NUM_THREADS := 1
test: setup model lint ## everything: setup, model, lint, pytest (PYTEST_ARGS="-k name")
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder --hypothesis-profile=ci \
	    --durations=15 $(PYTEST_ARGS)

# What depends on vLLM, on its next release: see .ci/next.py.
NEXT_TESTS := tests/compat tests/adapters tests/e2e tests/model_runner_v2
# What only a browser and Prometheus see is the same with both releases.
NEXT_TESTS += --ignore=tests/e2e/test_page.py --ignore=tests/e2e/test_prometheus.py

next: environment ## build .venv-next: the next release of vLLM on top of .venv
	@$(PY) .ci/next.py

test-next: export VLLM_CPU_OMP_THREADS_BIND := nobind
test-next: export OMP_NUM_THREADS := 1
test-next: export STATEFUL_EXAMPLES ?= 40
test-next: setup model next ## what depends on vLLM, on its next release
	.venv-next/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder \
	    --hypothesis-profile=ci --durations=15 $(PYTEST_ARGS) $(NEXT_TESTS)

demo: setup model ## three agents with tools: stock, plugin, plugin with --stateful-profile fast
	$(PY) -m benchmarks.demo

bench: setup model ## the paper's workloads: stock, stock with ngram, plugin (BENCH_ARGS="--quick")
	$(PY) -m benchmarks.serving.bench_agents $(BENCH_ARGS)

serve: setup model ## the small model with the plugin on PORT
	$(VENV)/bin/vllm serve $(MODEL) --plugin stateful --served-model-name smollm2 --port $(PORT) \
	    --dtype float32 --max-model-len 8192 --enforce-eager \
	    --chat-template $(TEMPLATE) --enable-auto-tool-choice --tool-call-parser hermes

clean: ## remove caches and demo output; keeps .venv and the models
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
