# `make help` lists the targets. PYTHON chooses the interpreter that `make setup` and the other environments are built with.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TOOLS := .venv-tools
UV := $(TOOLS)/bin/uv

.PHONY: help setup demo docs test test-slow test-newest test-oldest lint lock
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-12s %s\n", $$1, $$2 }'

setup: $(VENV)/.ready  ## make .venv, install everything of requirements.lock, check that the simulator renders

demo: setup  ## collect, build, fine-tune, evaluate, report: a small LightVLA from nothing, on two CPU cores
	$(RUN) scripts/demo.py

docs: setup  ## the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "open build/site/index.html; with search: $(RUN) -m http.server --directory build/site"

test: setup  ## all tests but those marked slow or gpu
	$(RUN) -m pytest

test-slow: setup  ## the tests marked slow
	$(RUN) -m pytest -m 'slow and not gpu'

test-newest: $(UV)  ## the tests of `make test` with the newest versions that pyproject.toml allows today
	$(call test_with,highest,.venv-newest)

test-oldest: $(UV)  ## the same with the oldest
	$(call test_with,lowest-direct,.venv-oldest)

lint: setup  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

lock: $(UV)  ## bring requirements.lock in line with pyproject.toml; UPGRADE=1 takes the newest versions of everything
	$(UV) pip compile pyproject.toml --universal --python-version 3.10 --extra all $(if $(UPGRADE),--upgrade) --quiet \
	    --custom-compile-command 'make lock (uv pip compile pyproject.toml --universal --python-version 3.10 --extra all)' \
	    --output-file requirements.lock

# A stamp per environment: a second `make setup` does nothing unless the versions or the script changed.
$(VENV)/.ready: pyproject.toml requirements.lock scripts/setup_environment.py
	$(PYTHON) scripts/setup_environment.py --venv $(VENV)
	@touch $@

$(UV):
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet uv

# Resolve anew, bring the second environment in line, run the tests in it. $(1): uv's resolution, $(2): the environment.
define test_with
	test -x $(2)/bin/python || $(PYTHON) -m venv $(2)
	$(UV) pip compile pyproject.toml --python $(2)/bin/python --extra all --resolution $(1) --upgrade --quiet --no-annotate \
	    --output-file $(2)/requirements.txt
	$(UV) pip sync --python $(2)/bin/python $(2)/requirements.txt
	$(UV) pip install --python $(2)/bin/python --no-deps --no-build-isolation --editable .
	$(PYTHON) scripts/setup_environment.py --venv $(2) --check-only
	$(2)/bin/python -m pytest
endef
