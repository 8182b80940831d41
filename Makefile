# make run: set up and train the arithmetic recipe. make test: set up and run every check and test.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# uv does not read pip's configuration; a folder of wheels named there is honoured here.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
EXTRAS := cli curation buffer coordinator sandbox reward weights rollout-cpu trainer s3

.PHONY: help setup system run reproduce test test-deploy test-languages test-long gpu-check unit lint format protos docs baseline lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: system $(VENV)/.installed ## Install everything into .venv

system:
	@tools/system-packages.sh

$(VENV)/.installed: constraints.txt pyproject.toml services/pyproject.toml services/setup.py
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is not there: install Python 3.11, or name it with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep -m1 '^uv==' constraints.txt)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode -r constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e . -e ./services
	@touch $@

run: setup ## Train examples/arithmetic through all services and show that it got better; ARGS="--set deployment=hybrid"
	$(BIN)/perigee train examples/arithmetic $(ARGS)

reproduce: setup ## Train the arms of docs/reproduction.md and draw its figures; FIGURE=curriculum for one, DRAW=1 without a run
	$(BIN)/python -m bench.reproduce $(FIGURE:%=--figure %) $(if $(DRAW),--draw)

test: setup ## Run every check and test
	@tools/run-tests.sh

test-deploy: setup ## Build the images with podman and test them, the compose stack, the chart's pods and an upgrade; as root, half an hour
	PERIGEE_TEST_IMAGES="$(IMAGES)" $(BIN)/python -m pytest -s -v tests/deploy/test_images.py tests/deploy/test_compose.py tests/deploy/test_helm_pods.py
	PERIGEE_TEST_UPGRADE=1 $(BIN)/python -m pytest -s -v tests/deploy/test_upgrade.py

test-languages: setup ## Test every language of the sandbox that is installed; as root, some minutes
	PERIGEE_TEST_LANGUAGES=1 $(BIN)/python -m pytest tests/integration/test_sandbox_languages.py

test-long: setup ## Kill `perigee long2short` in each of its steps, start further engines and layouts, train on 131,072 tokens: an hour
	PERIGEE_TEST_LONG=1 $(BIN)/python -m pytest tests/e2e/test_long2short_kills.py tests/integration/test_rollout_vision.py \
		tests/integration/test_long_context.py tests/integration/test_long_trajectories.py tests/faults/test_buffer_crashes.py \
		tests/e2e/test_long_run.py tests/integration/test_trainer_context.py tests/integration/test_trainer_vision.py

gpu-check: ## Check on a machine with a GPU what no other can show, with VENV=FOLDER of CUDA's builds: five minutes
	@VENV=$(VENV) tools/gpu-check.sh

unit: setup ## Run the tests that need no server
	HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest -n 2 tests/unit

lint: setup ## Check style, types and the contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict perigee services
	tools/check-protos.sh

format: setup ## Format the code and the protos
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format -w

protos: setup ## Regenerate the gRPC stubs and the OpenAPI documents
	tools/protos.sh

docs: setup ## Print docs/configuration.md from the configuration's docstrings
	$(BIN)/python tools/print_configuration.py > docs/configuration.md

baseline: setup ## Make the contract as it is the one that `make lint` guards; at a release
	$(BIN)/buf build --exclude-source-info -o protos/baseline.binpb

lock: setup ## Pin every dependency anew in constraints.txt
	$(BIN)/uv pip compile --quiet --python-version 3.11 $(EXTRAS:%=--extra %) --group dev --excludes tools/unneeded.txt \
		--no-header --no-annotate --no-emit-find-links pyproject.toml services/pyproject.toml | sed 's/+cpu$$//' > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean: ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build services/build *.egg-info services/*.egg-info
	rm -rf examples/clients/typescript/node_modules examples/clients/typescript/generated examples/clients/typescript/build
