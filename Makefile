# Every target that needs packages makes its environment by itself, .venv; another JAX gets one of its
# own, .venv-jax-VERSION. `make PYTHON=/path/to/python3.12` picks the Python for it.
SHELL := bash
DEVELOPED_WITH := 0.11.2
JAX ?= $(DEVELOPED_WITH)
VENV := $(if $(filter $(DEVELOPED_WITH),$(JAX)),.venv,.venv-jax-$(JAX))
VENV_PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
WORKERS ?= 2
RESULTS ?= out/$@

.DEFAULT_GOAL := help
.PHONY: help bench test test-slow test-gpu sanitize lint format docs mutants clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml tools/bootstrap.sh
	@JAX=$(JAX) VENV=$(VENV) tools/bootstrap.sh

bench: $(READY) ## the 19 workloads, checked and timed; ARGS="--workloads 1,901" passes flags on
	$(VENV_PYTHON) bench_main.py $(ARGS)

test: $(READY) ## all tests that need no GPU and end within minutes; JAX=0.12.0.1: on another JAX
	$(VENV_PYTHON) -m pytest -m "not gpu and not slow" -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(READY) ## tests that need no GPU and take minutes each
	XLA_FLAGS="$$XLA_FLAGS" $(VENV_PYTHON) -m pytest -m "slow and not gpu" -n $(WORKERS) --dist worksteal $(ARGS)

test-gpu: ## the tests that need a GPU; a summary goes to RESULTS=folder
	@tools/gpu_python.sh -m tools.gpu_tests $(RESULTS) $(ARGS)

sanitize: ## compute-sanitizer on every GPU kernel; a summary goes to RESULTS=folder
	@tools/gpu_python.sh -m tests.sanitize $(RESULTS) $(ARGS)

lint: $(READY) ## ruff and mypy
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

format: $(READY) ## rewrite the code in the project's format
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

docs: .venv-docs/.ready ## the site of the documents, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)

mutants: $(READY) .venv-mutants/.ready ## changes that no test notices; a run goes on where the last one ended
	.venv-mutants/bin/python -m tools.mutants $(ARGS)

.venv-mutants/.ready: pyproject.toml
	"$$(tools/find_python.sh)" -m venv --clear .venv-mutants
	.venv-mutants/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["mutants"], sep="\n")' > .venv-mutants/requirements.txt
	.venv-mutants/bin/python -m pip install --quiet --disable-pip-version-check --requirement .venv-mutants/requirements.txt
	touch $@

.venv-docs/.ready: pyproject.toml
	"$$(tools/find_python.sh)" -m venv --clear .venv-docs
	.venv-docs/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --requirement .venv-docs/requirements.txt
	touch $@

clean: ## remove .venv and everything generated
	rm -rf .venv .venv-* .venv.lock .venv-*.lock out build dist site *.egg-info .ruff_cache .mypy_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
