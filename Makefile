# Each target does its own set-up: a virtual environment in .venv and the install.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= demo/model.onnx
PART ?=
JOBS ?= 2

.PHONY: install demo test coverage check lint types imports docs reference evidence long serve lock clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev,oracles]'
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

# Ends with the 25 slowest tests.
test: install
	$(BIN)/python -m pytest -m 'not long' -n $(JOBS) --dist loadfile --durations=25

# The same, and the lines of the four packages that no test ran: a sixth slower.
coverage: install
	$(BIN)/python -m pytest -m 'not long' -n $(JOBS) --dist loadfile --cov --cov-report=term

# The help of every command, the keys of recipes, the routes, the Python API: from the code.
reference: install
	$(BIN)/python -m tests.docs.reference

# docs/results.md: every training run that is not there yet, then the page. Can be stopped at will.
# make evidence MINUTES=50 WORK=folder stops by itself and keeps unfinished runs in that folder.
evidence: install
	$(BIN)/python -m benchmarks.evidence $(if $(MINUTES),--minutes $(MINUTES)) $(if $(WORK),--work $(WORK))

docs: install
	$(BIN)/zensical build --strict --clean

check: lint types imports docs test

# make long PART=soak runs those with "soak" in their name: soak, damaged, killed, ensembles, bento.
# What they came to is kept in benchmarks/results/ and shown by `make figures`.
long: install
	KEEP_FIGURES=1 $(BIN)/python -m pytest -m long -k "$(PART)" -s --timeout=7200

# On a machine that does nothing else. DVERGE_TEST_DATA names the folder of published data, if any.
bench: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev,bench]'
	$(BIN)/python -m benchmarks.engine --save
	$(BIN)/python -m benchmarks.serving --save
	$(BIN)/python -m benchmarks.replicas --save
	$(BIN)/python -m benchmarks.precision --save
	$(BIN)/python -m benchmarks.train_step --save
	$(BIN)/python -m benchmarks.attacks --save
	$(BIN)/python -m benchmarks.query_watch $(MODEL) --save

# The tables of figures in docs/, from benchmarks/results/.
figures: install
	$(BIN)/python -m benchmarks.report

# The exact versions the checks last passed with: names and versions alone.
lock: install
	$(BIN)/python -m pip freeze --exclude-editable --exclude dverge-serve \
		| sed -n 's/^\([A-Za-z0-9._-]*==[^ ;]*\).*/\1/p' > constraints.txt

clean:
	rm -rf $(VENV) demo
