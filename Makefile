PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

export FLWR_TELEMETRY_ENABLED := 0

.PHONY: setup demo test lint browser picture bench bench-wire results toolbox docs stubs clean

setup: $(VENV)/.installed

# One pip call, so that one resolution sees every pin.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Cloister needs Python 3.11 or newer, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/cloister demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Chromium, in which tests open reports. Where it is not there and cannot be installed, they are skipped.
browser:
	@command -v chromium chromium-browser google-chrome > /dev/null || \
	{ test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	{ apt-get install -qq -y chromium || { apt-get update -qq && apt-get install -qq -y chromium; }; } > /dev/null 2>&1; } || \
	echo "no chromium: the tests that open a report in a browser are skipped"

# The README's picture of a report: a run of the four hospitals, as Chromium shows it. Commit what it writes.
picture: setup browser
	$(BIN)/python -m simulations.picture

# Two at a time: a third of the suite waits, for deadlines and for processes.
test: lint browser
	$(BIN)/pytest -n 2 --dist worksteal

# How fast simulations are, beside Flower's own; writes docs/performance.md. A quarter of an hour, on an idle machine.
bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m simulations.benchmarks.speed

# What privacy costs on two real tables, by `cloister sweep`, and how far suggested settings get; writes docs/results.md. Some
# minutes.
results: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m simulations.results
	OMP_NUM_THREADS=1 $(BIN)/python -m simulations.settings

# What each setting of the toolbox does to accuracy, by `cloister sweep`; writes the tables of docs/toolbox.md.
toolbox: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m simulations.toolbox

# What the wire costs, beside Flower's own processes; some ten minutes.
bench-wire: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m simulations.benchmarks.wire

# The reference pages of the two documents, from the models that check them (commit what it writes); then the site of
# all pages, in site/. No network. `python -m http.server -d site` shows it; opened as a file it has no search.
docs: setup
	$(BIN)/python -m cloister.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The wire protocol's Python, from its one source; commit what it writes.
stubs: setup
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. common/wire/session.proto

clean:
	rm -rf $(VENV) build *.egg-info
