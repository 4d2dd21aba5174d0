# Every target makes the environment it needs: a virtual environment in .venv, the package installed in it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart demo test test-web soak compat loaders check format clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install, then the whole job on embedded data: teacher, students, table, runs/quickstart/report.html"
	@echo "make demo         the quickstart's student in a browser: search its boards by paragraphs; PICTURES=DIR for a folder of yours"
	@echo "make test         install, then the tests"
	@echo "make test-web     the photo search's page in headless Chromium, compared with scripts/search_photos.py"
	@echo "make soak         install, then the battery of faults, up to two hours; ROW=NAME runs one row; docs/reliability.md"
	@echo "make compat       all tests at the lowest and the newest versions of packages and Python; PART=lowest for one part"
	@echo "make loaders      what transformers.js and sentence-transformers read of an export; MODEL=DIR for a folder of yours"
	@echo "make check        install, then lint, format, types and import rules"
	@echo "make format       rewrite the sources in the project's format"

quickstart: $(VENV)/.installed
	$(BIN)/python scripts/quickstart.py

# needs node and npm, and installs 230 MB below scripts/photo_search/web
demo: $(VENV)/.installed
	$(BIN)/python scripts/photo_demo.py $(if $(PICTURES),--pictures "$(PICTURES)")

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# needs node, npm and Debian's chromium
test-web: $(VENV)/.installed
	$(BIN)/python tests/browser/run.py

soak: $(VENV)/.installed
	PYTHONPATH=.:scripts:tests OMP_NUM_THREADS=1 $(BIN)/python -m faults.soak --page docs/reliability.md $(if $(ROW),"$(ROW)")

# hours on two cores, and 6 GB at a time, which are removed again
compat:
	$(PYTHON) tests/compat.py $(PART)

# needs node and npm, and 300 MB under .compat
loaders: $(VENV)/.installed
	$(BIN)/python tests/loaders/run.py $(if $(MODEL),"$(MODEL)")

check: $(VENV)/.installed
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check --no-cache .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .compat *.egg-info scripts/photo_search/web/node_modules scripts/photo_search/web/dist

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing torch and the other packages: about two minutes and 6 GB"
	$(BIN)/python -m pip install --quiet --progress-bar on -e '.[dev,export]'
	@# a second opinion for the tests alone; what it asks for besides torch is not needed by the functions they call
	$(BIN)/python -m pip install --quiet --no-deps clip-benchmark==1.6.2
	touch $@
