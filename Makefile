# `make help` lists the targets. PYTHON chooses the interpreter that `make setup` builds .venv with.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help setup demo test test-slow lint
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-10s %s\n", $$1, $$2 }'

setup: $(VENV)/.ready  ## make .venv, install everything into it, check that the simulator renders

demo: setup  ## collect, build, fine-tune, evaluate, report: a small LightVLA from nothing, on two CPU cores
	$(RUN) scripts/demo.py

test: setup  ## all tests but those marked slow or gpu
	$(RUN) -m pytest

test-slow: setup  ## the tests marked slow
	$(RUN) -m pytest -m 'slow and not gpu'

lint: setup  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# A stamp per step: a second `make setup` does nothing unless the dependencies or the script changed.
$(VENV)/.ready: pyproject.toml scripts/setup_environment.py
	$(PYTHON) scripts/setup_environment.py --venv $(VENV)
	@touch $@
