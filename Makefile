# Headroom. `make help` lists the targets.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TOOL := $(BIN)/python -m flows.environment
UI_HOST := 127.0.0.1

.DEFAULT_GOAL := help
.PHONY: help install run test ui lint format gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv and install into it; a second call does nothing

run: $(STAMP) ## run the whole pipeline: what is cached is not run again
	@$(BIN)/headroom run

test: lint ## lint, then run the tests
	@$(BIN)/python -m pytest

ui: $(STAMP) ## MLflow on http://127.0.0.1:5000 and Prefect on http://127.0.0.1:4200, until Ctrl-C
	@mkdir -p artifacts/mlflow
	@trap 'kill 0' EXIT INT TERM; \
	  $(TOOL) mlflow server --host $(UI_HOST) --port 5000 \
	    --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/artifacts/mlflow/mlflow.db}" & \
	  $(TOOL) prefect server start --host $(UI_HOST) --port 4200 & \
	  wait

lint: $(STAMP) ## check style, types and layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## put the code into its standard form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

gpu: $(STAMP) ## swap ONNX Runtime for its CUDA and TensorRT build
	@$(BIN)/pip uninstall --quiet --yes onnxruntime
	@$(BIN)/pip install --quiet "onnxruntime-gpu>=1.31,<2"

clean: ## remove .venv and the tools' caches; never artifacts, caches of DVC, params or data
	@rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find flows stages tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Headroom needs Python 3.11 or newer; say which with: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a minute or two the first time)" >&2
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)
