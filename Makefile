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

.PHONY: install demo test test-fast lint format typecheck check clean

install: $(STAMP)

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

demo: install
	$(BIN)/python launch/recipe.py

test: install
	$(BIN)/python -m pytest

test-fast: install
	$(BIN)/python -m pytest -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: install
	$(BIN)/mypy

check: lint typecheck test

clean:
	rm -rf $(VENV) data_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
