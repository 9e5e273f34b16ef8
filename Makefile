# Every verb sets up what it needs: a Python 3.11 or newer with pip is all that must be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo quick test acceptance mutants lint types format protos bench pins clean

install: .venv/installed

# uv resolves and installs in seconds what takes pip minutes; it comes from the package index as any other package.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --group dev --editable '.[all]'
	# TensorFlow Serving's client, for tests; its dependency `tensorflow` would overwrite tensorflow-cpu.
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps tensorflow-serving-api==2.21.0
	touch $@

demo: install
	$(BIN)/resnet demo

# All that needs no TensorFlow, in well under a minute.
quick: install
	$(BIN)/pytest --quick

test: install
	$(BIN)/pytest

# Real servers in processes of their own: unmodified clients, limits, overload, signals, restarts, bad places, a soak.
acceptance: install
	$(BIN)/python -m tests.acceptance

# Plants faults in the modules that matter most, and counts those that the tests find: an hour or two.
mutants: install
	$(BIN)/python -m tests.mutants --sample 40

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m protos.generate

# Trains and exports the digits first, if there is no model yet.
bench: install
	test -d demo/models/digits || $(BIN)/resnet demo
	$(BIN)/resnet bench demo/models/digits

pins: install
	$(BIN)/uv pip compile --quiet --upgrade --no-header --no-annotate --extra all --group dev pyproject.toml --output-file constraints.txt
	sed -i '1i # The versions that CI, `make demo` and the figures in README.md use; `make pins` resolves them anew.' constraints.txt

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist demo bench
