# Every task by name; `make` alone lists them. All set-up happens by itself, once.
#
#   make PYTHON=python3.12            a certain interpreter (3.10 to 3.13) instead of the first found
#   make VENV=DIR                     another place for the virtual environment
#   make TORCH_INDEX=URL              a package index for torch alone. PyPI's build for x86-64 brings
#                                     CUDA (gigabytes); https://download.pytorch.org/whl/cpu does not
#   make SKIP_SYSTEM_PACKAGES=1       leave the operating system's packages to you

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

VENV ?= .venv
PYTHON ?= $(shell scripts/find-python.sh)
TORCH_INDEX ?=
SKIP_SYSTEM_PACKAGES ?=
# A Jetson's environment sees the system's TensorRT and has no torch: scripts/jetson-setup.sh makes it.
GWP_VENV ?= $(HOME)/gwp-edge-venv
EXTRAS := export,sim,realsense,piper,rerun,examples,dev

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SYSTEM_STAMP := $(VENV)/.setup-system
PYTHON_STAMP := $(VENV)/.setup-python

.PHONY: help setup test test-fast lint types format demo test-all-pythons check-wheels \
	test-aarch64 hil wheel clean distclean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(firstword $(MAKEFILE_LIST)) \
		| sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-18s %s\n", $$1, $$2}'

setup: $(PYTHON_STAMP) ## make the virtual environment and install everything into it

# Removing the virtual environment removes the stamps, so both steps run again.
$(SYSTEM_STAMP): scripts/system-packages.sh
	@SKIP_SYSTEM_PACKAGES='$(SKIP_SYSTEM_PACKAGES)' scripts/system-packages.sh
	@mkdir -p $(VENV) && touch $@

$(PYTHON_STAMP): pyproject.toml constraints.txt $(wildcard drivers/piper_c/*) | $(SYSTEM_STAMP)
	@python="$$(scripts/find-python.sh '$(PYTHON)')"; \
		if ! test -x $(BIN)/python; then \
			echo "setup: making $(VENV) with $$python ($$($$python -V))"; \
			$$python -m venv $(VENV); \
		fi
	@if test -n '$(TORCH_INDEX)'; then \
		echo 'setup: installing torch from $(TORCH_INDEX)'; \
		$(PIP) install -qq -c constraints.txt --index-url '$(TORCH_INDEX)' torch; \
	fi
	@echo 'setup: installing gwp-edge[$(EXTRAS)] at the versions of constraints.txt (minutes on a slow line)'
	@rm -f drivers/piper_native.*.so
	@$(PIP) install -qq -c constraints.txt -e '.[$(EXTRAS)]'
	@$(BIN)/python -c 'import gwp_edge.drivers.piper_core'
	@touch $@

test: setup ## all checks: format, lint, types, every test (what CI runs)
	@start=$$SECONDS; \
	step() { printf '\n== %s\n' "$$*"; "$$@"; }; \
	step $(BIN)/ruff format --check .; \
	step $(BIN)/ruff check .; \
	step $(BIN)/mypy; \
	step $(BIN)/python -m pytest; \
	printf '\nmake test: format, lint, types and tests passed in %d s\n' $$((SECONDS - start))

test-fast: setup ## the unit, property and contract tests that need neither torch nor MuJoCo
	@$(BIN)/python -m pytest -q -m 'not export and not sim' tests/unit tests/property tests/contract

lint: setup ## format and lint checks, nothing is changed
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: setup ## mypy --strict
	@$(BIN)/mypy

format: setup ## rewrite the sources in the project's format, fix what lint can fix
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

demo: setup ## a small trained policy to INT8, and onto a simulated arm that touches the blue cube
	@mkdir -p build/demo && rm -rf build/demo/session
	OMP_NUM_THREADS=1 $(BIN)/gwp-edge export examples/reach/policy/checkpoint --layout examples/reach/layout.json \
		--precision int8 --calibration examples/reach/episodes --out build/demo/reach.gwp
	@# A loaded machine may lose some of the recording; what the arm did is judged in any case.
	$(BIN)/gwp-edge run build/demo/reach.gwp --robot examples/reach/robot.toml \
		--task 'touch the blue cube' --duration 10 --record build/demo/session \
		|| echo "demo: the run ended with code $$?, as it says above; this is what it did all the same:"
	@$(BIN)/python -W ignore examples/reach/show.py build/demo/session build/demo/reach.png

hil: ## hardware tests that GWP_HIL names, in GWP_VENV; results go to a dated JSON file
	@test -x '$(GWP_VENV)/bin/python' || { \
		echo 'hil: there is no $(GWP_VENV): run scripts/jetson-setup.sh --apply, or name another GWP_VENV=DIR' >&2; \
		exit 1; }
	@'$(GWP_VENV)/bin/python' scripts/hil.py

wheel: setup ## build/dist/*.whl, from a clean copy of the sources
	@$(BIN)/python scripts/build_wheel.py build/dist

build/bundles/.made: $(PYTHON_STAMP) scripts/make-test-bundles.sh $(wildcard export/*.py gwp_edge/*.py)
	@scripts/make-test-bundles.sh $(BIN)/gwp-edge build/bundles && touch $@

test-all-pythons: wheel build/bundles/.made ## the runtime from its wheel, without torch, on Python 3.10, 3.12 and 3.13
	@scripts/test-all-pythons.sh build/dist build/bundles 3.10 3.12 3.13

check-wheels: setup ## do all robot-side dependencies have aarch64 wheels? (downloads, installs nothing)
	@$(BIN)/python scripts/check_wheels.py

test-aarch64: build/bundles/.made ## the runtime's tests on an emulated aarch64 Debian; needs root, slow
	@scripts/test-aarch64.sh $(BIN)/python build/bundles

clean: ## remove what the targets made, except the virtual environment and what is installed in it
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@rm -f $(PYTHON_STAMP) drivers/piper_native.*.so
	@find gwp_edge export calibration drivers tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	@rm -rf $(VENV)
