# make demo   environment, install, the whole recipe on the self-made corpus
# make test   environment, install, the test suite
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
# What pip is asked for: a requirement and its options. The stamp remembers it, so that it is said only once.
ASKED  := $(or $(shell cat $(STAMP) 2>/dev/null),torch==2.13.0)
TORCH  ?= $(ASKED)

export TOKENIZERS_PARALLELISM ?= false

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.PHONY: help install demo test test-fast lint format typecheck check newest docs docs-keys clean

install: $(STAMP) ## the environment in .venv

ifneq ($(TORCH),$(ASKED))
.PHONY: $(STAMP)
endif

# torch comes first and alone, and the rest is resolved against the very build that came: torch==2.13.0 in
# constraints.txt would be met by a build for another CUDA version too, and would replace any other version.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	[ "$(TORCH)" = "$(ASKED)" ] || $(BIN)/pip uninstall --yes -qq torch
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip list --format freeze | grep '^torch==' > $(VENV)/constraints.txt
	grep -v '^torch==' constraints.txt >> $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[dev]"
	echo "$(TORCH)" > $@

demo: install ## the whole recipe on the self-made corpus
	$(BIN)/python launch/recipe.py

# Two processes of one thread each; the tests of a file stay together, as they share what was costly to make.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: install ## the test suite
	$(TEST)

test-fast: install ## without the tests that take over five seconds
	$(TEST) -m "not slow"

lint: install ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## ruff, mending what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: install ## mypy
	$(BIN)/mypy

check: lint typecheck test ## what CI runs

# Drift shows here before a user meets it. The last installation goes beyond the upper bounds of pyproject.toml: pip says
# which ones, and goes on. torch stays the build that is asked for.
NEWEST := transformers trl peft datasets accelerate deepspeed
THERE  := $(VENV)-newest

newest: ## the fast tier with the newest transformers, trl, peft, datasets, accelerate, deepspeed
	rm -rf $(THERE)
	$(PYTHON) -m venv $(THERE)
	$(THERE)/bin/pip install --quiet $(TORCH)
	$(THERE)/bin/pip list --format freeze | grep '^torch==' > $(THERE)/torch.txt
	$(THERE)/bin/pip install --quiet --constraint $(THERE)/torch.txt --editable ".[dev]"
	$(THERE)/bin/pip install --upgrade --constraint $(THERE)/torch.txt $(NEWEST)
	$(THERE)/bin/python -m pytest -m "not slow"

docs: install ## the site of docs/, into site/
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

docs-keys: install ## docs/config_keys.md from the schema, docs/benchmarks.md from benchmarks.yaml
	$(BIN)/python launch/keys.py > docs/config_keys.md
	$(BIN)/python -m qwen2audio_train.evaluation.reporting.benchmarks_page > docs/benchmarks.md

clean:
	rm -rf $(VENV) $(THERE) data_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
