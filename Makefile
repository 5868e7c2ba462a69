# Every target but clean makes the environment when it is missing or when requirements.txt has changed.
PYTHON ?= python3
BIN := .venv/bin
ARG ?=
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test lint slow cuda clean

demo: .venv/installed
	$(BIN)/python -m experiments.demo --arg="$(ARG)"

test: lint
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadscope --no-loadscope-reorder -m "not slow and not cuda"

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

cuda: .venv/installed
	$(BIN)/python -m pip install --quiet bitsandbytes==0.50.2
	$(BIN)/python -m pytest -m cuda

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf build .venv
