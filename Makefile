# `make demo` and `make test` set up what they need: a virtual environment in .venv, from Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The root folder must not be on sys.path: its `adapters/` and `fusionserve/` would shadow installed packages.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-eval fusion-experiment serve bench bench-peers bench-gpu peers test-gpu fuzz kill-loop life-cycle fair-share soak test check format-check lint types proto-lint verify-proto layers proto

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

bench-gpu: $(INSTALLED) ## Measure a GPU beside its limits, transformers and PEFT (seven minutes; docs/benchmarks.md)
	@$(BIN)/python -P -m fusionserve.loadtest.gpu $(BENCH)

peers: $(INSTALLED) ## Install vLLM and llama.cpp into environments of their own under build/peers
	@$(BIN)/python -P -m fusionserve.loadtest.bench.peers

soak: $(INSTALLED) ## Traffic, churn and hostile clients on one server at once (5 minutes; SOAK="--minutes 60" for an hour)
	@$(BIN)/python -P -m fusionserve.loadtest.soak $(SOAK)

# First what serves where there is no compiler, then everything.
WITHOUT_NATIVE := tests/engine -m "not no_kernels" --ignore-glob "*/test_triton_*"

test: $(INSTALLED) ## Run the tests
	@FUSIONSERVE_NATIVE=off $(BIN)/pytest -q -n auto --dist loadfile $(WITHOUT_NATIVE)
	@$(BIN)/pytest -q -n auto --dist loadfile

test-gpu: $(INSTALLED) ## Run the tests that a GPU may change: kernels, parity, batches
	@$(BIN)/pytest -q -m gpu

FUZZ_ARTIFACTS := 1000000
FUZZ_REQUESTS := 500000

fuzz: $(INSTALLED) ## Fuzz the loaders and the checks of requests (ten minutes; docs/reliability.md; FUZZ_REQUESTS=1000 for less)
	@$(BIN)/pip install -qq --disable-pip-version-check 'atheris>=3.0'
	@$(BIN)/python -P tools/fuzz.py requests --runs $(FUZZ_REQUESTS)
	@$(BIN)/python -P tools/fuzz.py artifacts --runs $(FUZZ_ARTIFACTS)

kill-loop: $(INSTALLED) ## Kill servers and compare what the next ones serve (half an hour; docs/reliability.md; ROUNDS=20 for less)
	@$(BIN)/python -P -m fusionserve.loadtest.kill_loop --rounds $(or $(ROUNDS),200)

life-cycle: $(INSTALLED) ## Live random lives of the engine (five minutes; docs/reliability.md; RUNS=100 for less)
	@LIFE_CYCLE_RUNS=$(or $(RUNS),2000) $(BIN)/pytest -q --timeout 0 tests/hardening/test_life_cycle_machine.py

fair-share: $(INSTALLED) ## Measure whether a flood under one adapter holds up the others (docs/reliability.md)
	@$(BIN)/python -P -m fusionserve.loadtest.fair_share

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
