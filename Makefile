# What a newcomer types. Everything lives in .venv; delete it to start over.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CORES ?= all
# A test is one thread most of the time. More than four at once want more memory than they save time.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Compiled once at installation; without byte code every stage would pay seconds for its imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup crf repro artifact rehearsal test test-all lint format docs ui lock clean
.DEFAULT_GOAL := help

help: ## Show what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo 'New here: make repro. Then source .venv/bin/activate, then refinenet: one command for all the rest'

setup: $(READY) ## Make .venv with the locked packages (the other targets do it by themselves)

$(READY): requirements.lock bootstrap.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here (Debian: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments (Debian: apt install python3-venv)" >&2; exit 1; }
	@case '$(subst ','\'',$(CURDIR))' in *[{}]*) echo "error: $(CURDIR): DVC cannot work in a folder with { or } in its path; rename it" >&2; exit 1;; esac
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r bootstrap.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

crf: $(READY) ## Build the dense CRF of profile paper's VOC (pydensecrf2; wants a C++ compiler and Python's headers)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes -r crf.lock

repro: $(READY) ## Regenerate every table of the profile in params.yaml
	snakemake --cores $(CORES)
	@python -m pipeline.report --where
	@python -m pipeline.verify --quick || [ $$? -ge 10 ]

artifact: $(READY) ## Pack the finished run for reviewers: a folder and a zip that other programs can read, too
	python -m pipeline.artifact

rehearsal: $(READY) ## Try the whole road of the profile, two steps a phase, before paying for it
	python -m pipeline.rehearse

test: $(READY) ## Run the tests
	pytest $(PARALLEL) -m "not slow and not gpu"

test-all: $(READY) ## Run the slow tests and those that need a GPU, too
	pytest $(PARALLEL) -m "not services"
	pytest -m services

lint: $(READY) ## Check style and types (make test has snakemake --lint)
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile
	mypy

format: $(READY) ## Put the code into the house's style
	ruff check --fix .
	ruff format .
	snakefmt Snakefile

docs: $(READY) ## Build the pages as a site, public/README.html; a dead link is an error
	sphinx-build -q -W -c docs -b html . public

ui: $(READY) ## Open the runs in MLflow, on http://127.0.0.1:5000
	python -m pipeline.tracking ui

lock: $(READY) ## Renew the three lock files
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --upgrade --extra dev pyproject.toml -o requirements.lock
	echo pydensecrf2 | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --upgrade -c requirements.lock - -o crf.lock
	echo uv | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --upgrade - -o bootstrap.lock

clean: ## Remove what can be made again: everything but the archives, the DVC cache and the MLflow runs
	rm -rf rehearsal artifact artifact.zip $(filter-out data/raw data/archives data/incoming,$(wildcard data/*)) weights models curves predictions checkpoints settings.json .snakemake
