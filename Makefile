PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

demo: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" bash tools/demo.sh demo

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the slow tests run scripts in processes of their own, which coverage does not see
test: lint
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term:skip-covered
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf demo .pytest_cache .ruff_cache .mypy_cache .coverage .hypothesis
