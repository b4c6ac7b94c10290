# `make demo` and `make test` do everything from nothing; a second run does not install again.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := src conversion examples benchmarks docs tests

.PHONY: install demo test test-slow style quality bench reliability

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/python -m pytest -n 2

test-slow: install
	$(BIN)/python -m pytest -n 2 -m slow

style: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ty check src conversion examples benchmarks docs

bench: install
	$(BIN)/python benchmarks/run.py

reliability: install
	$(BIN)/python benchmarks/reliability.py
