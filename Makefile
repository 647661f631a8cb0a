PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

SITE := .venv-site

.PHONY: demo demo-real test coverage test-gpu lint site clean

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" bash tools/demo.sh demo

# on your own photographs: make demo-real DATA=folder
demo-real: $(VENV)/installed
	@test -d "$(DATA)" || { echo "DATA=$(DATA): no such folder, use make demo-real DATA=folder"; exit 1; }
	PATH="$(abspath $(BIN)):$$PATH" bash tools/demo_real.sh "$(DATA)" demo-real

lint: $(VENV)/installed site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# one test process more than there are cores, since many tests wait; four at most
WORKERS = $(shell n=$$(nproc); [ $$n -lt 3 ] && echo $$((n + 1)) || echo 4)
test coverage: export OMP_NUM_THREADS = 1
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: lint
	$(PYTEST)

# of the quick tests: the slow ones run scripts in processes of their own, which it does not see
coverage: $(VENV)/installed
	$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered

# on a node with GPUs: the benchmark, whose page is one to send back, and the tests that need one
test-gpu: $(VENV)/installed
	$(BIN)/python -m tools.benchmark gpu --batch 128 --markdown gpu.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu -n $(WORKERS) --dist worksteal -rfEs

# the documentation as web pages in site/; a warning is an error
site: $(SITE)/installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build

$(SITE)/installed: requirements-site.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/pip install --quiet -r requirements-site.txt
	touch $@

clean:
	rm -rf site build dist *.egg-info demo demo-real .pytest_cache .ruff_cache .mypy_cache .coverage .hypothesis
