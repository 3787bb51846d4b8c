# Every target does its own set-up: the virtual environment is made once and again when the pins change.
PYTHON ?= python3
VENV ?= .venv
VARIANT ?= cpu
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help serve test lint format bench soak fuzz engines tables docs image image-test

help:  ## say what each target does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f $(VENV)/.installed-*
	@touch $@

serve: $(STAMP)  ## serve on http://127.0.0.1:8000 (settings: backbone-service serve --help)
	$(BIN)/backbone-service serve $(ARGS)

test: $(STAMP)  ## run the whole test suite
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)  ## format, rules, types, the directions of imports, the image, the manifests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile tests/image/gateway.Dockerfile
	$(BIN)/python -m tests.deploy.kustomize

format: $(STAMP)  ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## measure the service beside what one would use instead (a quarter of an hour)
	$(BIN)/python -m benchmarks $(ARGS)

soak: $(STAMP)  ## an hour of twice the load with hostile requests among it; ARGS='--minutes 5'
	$(BIN)/python -m benchmarks.soak $(ARGS)

fuzz: $(STAMP)  ## fuzz everything that reads bytes of strangers (an hour); ARGS='--minutes 1 --times 2' is short
	$(BIN)/python -m tests.fuzz $(ARGS)

engines: $(STAMP)  ## try every type on OpenVINO (half an hour); ARGS=--write writes docs/engines.md
	$(BIN)/python -m benchmarks.engines $(ARGS)

tables: $(STAMP)  ## measure every shipped architecture again (about ten minutes)
	$(BIN)/python -m service.backbones.make_tables

docs: $(STAMP)  ## write docs/backbones.md; ARGS=--measure computes every parity pack again (minutes)
	$(BIN)/python -m tests.parity.document $(ARGS)

image:  ## build the image with docker; VARIANT=cuda for a GPU
	docker build --build-arg VARIANT=$(VARIANT) --build-arg BUILD=$(shell git rev-parse --short HEAD) --tag backbone-service:$(VARIANT) .

image-test: $(STAMP)  ## build the image, start it behind the gateway and try it, with podman
	$(BIN)/python -m tests.image
