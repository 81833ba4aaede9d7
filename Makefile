# `make demo` and `make test` set up what they need: a virtual environment in .venv, from Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The root folder must not be on sys.path: its `adapters/` and `fusionserve/` would shadow installed packages.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-eval fusion-experiment serve bench bench-peers peers test check format-check lint types proto-lint verify-proto layers proto

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Create .venv and install the project with everything it is tested with

# Runs again only when the dependencies may have changed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "setup: $(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
		|| { echo "setup: $(PYTHON) has no venv module (on Debian: apt install python3-venv)"; exit 1; }
	@echo "setup: installing fusionserve and its dependencies into $(VENV) (a few minutes the first time)"
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## Serve the embedded model and show base, adapters and a blend over gRPC
	@$(BIN)/python -P examples/demo.py

demo-eval: $(INSTALLED) ## Recompute the model card's perplexity table from the shipped weights
	@$(BIN)/python -P -m fusionserve.training.perplexity

fusion-experiment: $(INSTALLED) ## Train and compare fusions, blends and gates (docs/fusion.md; about an hour)
	@$(BIN)/python -P -m fusionserve.training.experiment.command

serve: $(INSTALLED) ## Serve the embedded model on the default ports
	@$(BIN)/fusionserve serve

bench: $(INSTALLED) ## Measure this server beside transformers and PEFT (docs/peers.md; BENCH="--workloads W1" for less)
	@$(BIN)/python -P -m fusionserve.loadtest.bench.command --no-peers $(BENCH)

bench-peers: peers ## Measure this server beside vLLM and llama.cpp, too (half an hour; docs/peers.md)
	@$(BIN)/python -P -m fusionserve.loadtest.bench.command $(BENCH)

peers: $(INSTALLED) ## Install vLLM and llama.cpp into environments of their own under build/peers
	@$(BIN)/python -P -m fusionserve.loadtest.bench.peers

# First what serves where there is no compiler, then everything.
WITHOUT_NATIVE := tests/engine

test: $(INSTALLED) ## Run the tests
	@FUSIONSERVE_NATIVE=off $(BIN)/pytest -q -n auto --dist loadfile $(WITHOUT_NATIVE)
	@$(BIN)/pytest -q -n auto --dist loadfile

check: format-check lint types proto-lint verify-proto layers ## Format, lint, types, protos, layers

format-check: $(INSTALLED)
	@$(BIN)/ruff format --check .

lint: $(INSTALLED)
	@$(BIN)/ruff check .

types: $(INSTALLED)
	@$(BIN)/python -P tools/link_tree.py
	@$(BIN)/mypy

proto-lint: $(INSTALLED)
	@$(BIN)/buf lint

verify-proto: $(INSTALLED)
	@$(BIN)/python -P tools/verify_proto.py

layers: $(INSTALLED)
	@$(BIN)/pytest -q tests/test_layers.py

proto: $(INSTALLED) ## Regenerate the code in proto/fusionserve/v1
	@$(BIN)/python -P tools/verify_proto.py --write
