# Two commands do the main job: `make run` and `make test`. Both make .venv first; a second call starts at once.
.DEFAULT_GOAL := help
.PHONY: help run test ui bench bench-training bench-methods lint format clean gpu

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
ARGS ?=

export DO_NOT_TRACK ?= true
export DVC_NO_ANALYTICS ?= true

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-14s %s\n' "$$name" "$$what"; done

run: $(INSTALLED) ## run the whole pipeline; ARGS="--workers 1" and the like go to `headroom run`
	@$(BIN)/headroom run $(ARGS)

test: $(INSTALLED) lint ## run the checks of `lint`, then the tests; ARGS="-k prune" and the like go to pytest
	@$(BIN)/python -m pytest $(ARGS)

ui: $(INSTALLED) ## serve the MLflow UI and Prefect on 127.0.0.1 until Ctrl-C
	@$(BIN)/python -m flows.ui

bench: $(INSTALLED) ## measure Headroom beside its peers on the finished run; ARGS="--only optimum" and the like
	@$(BIN)/python -m benchmarks $(ARGS)

bench-methods: $(INSTALLED) ## fine-tune once a method and seed and tabulate the gains; ARGS="--only r_drop" and the like
	@$(BIN)/python -m benchmarks.methods $(ARGS)

bench-training: $(INSTALLED) ## train beside the transformers Trainer; ARGS="--only pretrain --profile" and the like
	@$(BIN)/python -m benchmarks.training $(ARGS)

lint: $(INSTALLED) ## ruff, mypy and import-linter
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo

format: $(INSTALLED) ## let ruff sort imports and format the code
	@$(BIN)/ruff check --quiet --select I --fix .
	@$(BIN)/ruff format --quiet .

clean: ## remove .venv and the tools' caches; never data, params, artifacts or DVC's cache
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis headroom.egg-info
	@find flows stages tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

gpu: $(INSTALLED) ## swap ONNX Runtime for its CUDA and TensorRT build
	@$(PIP) uninstall --yes onnxruntime onnxruntime-gpu
	@$(PIP) install --constraint constraints.txt --editable ".[dev,gpu]" --no-deps
	@$(PIP) install "onnxruntime-gpu>=1.31,<2"

# One folder belongs to both builds of ONNX Runtime, so `gpu` removes the one before it installs the other.

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"make: Headroom needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}; try `make PYTHON=python3.12`")'
	@echo "Installing into $(VENV); this takes a few minutes once." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	@$(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $@
