# Each target does its own set-up: a virtual environment in .venv and the install.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= demo/model.onnx

.PHONY: install demo test check lint types imports docs reference evidence long serve lock clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/dverge demo

serve: install
	$(BIN)/dverge serve $(MODEL)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

test: install
	$(BIN)/python -m pytest -m 'not long'

# The help of every command, the keys of recipes, the routes: made from the code.
reference: install
	$(BIN)/python -m tests.docs.reference

# docs/results.md: every training run that is not there yet, then the page. Can be stopped at will.
evidence: install
	$(BIN)/python -m benchmarks.evidence

docs: install
	$(BIN)/zensical build --strict --clean

check: lint types imports docs test

long: install
	$(BIN)/python -m pytest -m long --timeout=7200

# The exact versions the checks last passed with: names and versions alone.
lock: install
	$(BIN)/python -m pip freeze --exclude-editable --exclude dverge-serve \
		| sed -n 's/^\([A-Za-z0-9._-]*==[^ ;]*\).*/\1/p' > constraints.txt

clean:
	rm -rf $(VENV) demo
