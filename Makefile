# make demo   environment, install, the whole recipe on the self-made corpus
# make test   environment, install, the test suite
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin

export HYDRA_FULL_ERROR ?= 0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-fast lint format typecheck check clean

install: $(VENV)/installed

# torch comes first and alone: a range resolved together with the rest may pick another build than the one chosen here.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

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
	rm -rf $(VENV) runs data_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
