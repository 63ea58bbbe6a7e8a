# On a fresh machine: `make demo`, `make demo-text` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo demo-text test test-fast lint clean

# A stamp is written when its install is complete: an interrupted one is
# repeated, a complete one is not.
$(VENV)/demo.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing FlowJAX and what it needs ..."
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/test.installed: $(VENV)/demo.installed
	@echo "Installing what the tests need ..."
	$(BIN)/python -m pip install --quiet --editable '.[test,oracles]'
	@touch $@

demo: $(VENV)/demo.installed
	$(BIN)/python launch/demo.py

demo-text: $(VENV)/demo.installed
	$(BIN)/python launch/demo_text.py

test: $(VENV)/test.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/test.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: $(VENV)/test.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)
