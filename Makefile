# Two commands do everything on a fresh Debian machine: `make demo` and `make test`.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
APT := libopencv-dev libturbojpeg0-dev libjpeg62-turbo-dev pkg-config g++ python3-venv
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-tune test test-slow check format lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## system libraries, Python environment, this package

# FFCV is built from source against OpenCV and libjpeg-turbo; python3-venv serves the machines without uv.
$(VENV)/.ready: requirements-dev.lock pyproject.toml setup.py $(wildcard lape_ray/data/native/*.cpp lape_ray/data/native/*.h) | .uv/bin/uv
	@for package in $(APT); do dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; done; \
	if [ -n "$$missing" ]; then echo "installing$$missing"; \
	  $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi
	[ -x $(PYTHON) ] || .uv/bin/uv venv -q --python 3.11 $(VENV)
	.uv/bin/uv pip install -q --python $(PYTHON) -r requirements-dev.lock
	.uv/bin/uv pip install -q --python $(PYTHON) --no-deps -e .
	touch $@

.uv/bin/uv:
	@python3 -c 'import ensurepip' 2>/dev/null || { $(SUDO) apt-get update -qq && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv >/dev/null; }
	python3 -m venv .uv
	.uv/bin/pip install -q uv

demo: setup ## train on real digits through a Ray of its own; prints accuracy and where to look
	$(PYTHON) jobs/demo.py

demo-tune: setup ## which position embedding and which join: 28 trials, a table and a report
	$(PYTHON) jobs/demo.py --tune

test: setup ## the tests, without the slow ones
	$(PYTHON) -m pytest -m "not slow"

test-slow: setup ## the slow tests
	$(PYTHON) -m pytest -m slow

check: setup ## linter, formatter and type checker
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: setup ## format the code
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

lock: .uv/bin/uv ## pin the newest versions that pyproject.toml allows
	.uv/bin/uv pip compile -q --upgrade --no-header --python-version 3.11 pyproject.toml -o requirements.lock
	.uv/bin/uv pip compile -q --upgrade --no-header --python-version 3.11 --extra dev pyproject.toml \
	  -c requirements.lock -o requirements-dev.lock

clean: ## remove what setup and the tests made, but no runs
	rm -rf $(VENV) .uv .pytest_cache .mypy_cache .ruff_cache build *.egg-info
