# Needs Python 3.11 or later and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= a red circle above a blue square on a white background
SEED ?= 10
JOBS ?= 2

.PHONY: demo test check-full bench lint format golden clean

demo: $(VENV)/.core
	$(BIN)/edgedit generate "$(PROMPT)" --seed $(SEED) --output demo.png

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not full" \
		--cov=edgedit --cov=converters --cov=runtimes --cov=apps --cov-report=term:skip-covered

check-full: $(VENV)/.test
	$(BIN)/python -m pytest -m full -s

bench: $(VENV)/.test
	$(BIN)/python tests/bench/attention_cost.py build/bench
	$(BIN)/python tests/bench/sana_step.py | tee build/bench/sana_step.json

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy sees the folders where Python sees the packages
	@mkdir -p build/types/edgedit && cd build/types/edgedit && for f in ../../../edgedit/*; do ln -sfn $$f .; done; \
		for d in converters runtimes apps; do ln -sfn ../../../$$d $$d; done
	cd build/types && ../../$(BIN)/mypy --strict --config-file ../../pyproject.toml -p edgedit

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(VENV)/.core
	$(BIN)/python tests/golden/make_golden.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgedit needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

# torch first: the other packages then find it installed and add no accelerator packages
$(VENV)/.test: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage*
