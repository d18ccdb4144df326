# The commands that people type; `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install test style check docs
.DEFAULT_GOAL := help

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:\t/'

install: $(BIN)/activate  ## create .venv with the package and all that its tests, its style and its docs need

$(BIN)/activate: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[test,docs]"
	touch $@

test: install  ## run the tests
	$(BIN)/python -m pytest -n 2

style: install  ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: install  ## check format, lint and types, and change nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install  ## build the site into site/, with every warning an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
