# Everything runs in an environment of its own, made on first use. `make help` lists the targets.

VENV     ?= .venv
# The first of these that runs and is new enough.
PYTHON   ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
EXTRAS   ?=
PIP_ARGS ?=
ARGS     ?=
EXAMPLES ?= 20000
BACKEND  ?=
CPU      ?=
SEED     ?=
JOBS     ?= auto
AXE      ?= 4.14.1

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY     := $(BIN)/python
PIP    := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps

# A change of one of these builds and installs the package again. Changed .py files need nothing.
BUILT_FROM := pyproject.toml setup.py fastnorm/schedule.py \
	$(wildcard fastnorm/_core/*.pyx fastnorm/_core/*.pxi fastnorm/_core/*.pxd fastnorm/_core/*.h)

# Of pytest: as many processes as processors, but each takes a gigabyte and compiles for itself.
PARALLEL = -n $(JOBS) --maxprocesses 4 --dist worksteal

# Makes something in the environment. Where several makes are at work here, one after the other does:
# what the first has made, the others then find.
PREPARE = @+test -n '$(PYTHON)' || { echo 'fastnorm needs Python 3.11 or newer and none was found: name it with make PYTHON=...' >&2; exit 1; }; \
	$(PYTHON) tools/locked.py Makefile $(MAKE) --no-print-directory

.DEFAULT_GOAL := help
# Two targets at once would meet in pip.
.NOTPARALLEL:
.PHONY: help venv build demo test test-quick test-oldest fuzz trust sanitize lint format docs site-check bench \
	bench-gate bench-gate-update dist-check clean

help:
	@echo 'make demo      build fastnorm, run the demonstration'
	@echo 'make test      build fastnorm, run the tests (PyTorch tests skip where it is absent)'
	@echo 'make test-quick  one case of each test: 90 seconds'
	@echo 'make fuzz      random calls of every function on fenced memory, each backend and CPU'
	@echo 'make trust     every attack of tests/trust.py, as a table: inputs tried, faults found'
	@echo 'make test-oldest the tests with the oldest of everything that pyproject.toml allows'
	@echo 'make sanitize  build with sanitizers and every bound checked, run random calls and the table'
	@echo 'make lint      ruff check, ruff format --check, mypy, lint-imports'
	@echo 'make format    let ruff sort imports and format'
	@echo 'make docs      build the documentation in docs/_build/html, run its examples'
	@echo 'make site-check  look at it in Chromium: every page in three widths, light and dark (npm fetches axe-core)'
	@echo 'make bench     run the benchmarks, write benchmarks/results and the table in README.md'
	@echo 'make bench-gate         fail if a kernel has become slower than it is stored to be'
	@echo 'make bench-gate-update  store how slow they are now'
	@echo 'make dist-check  build what is published, twice: equal bytes, and nothing in it that should not be'
	@echo 'make build     build fastnorm and install it in the environment'
	@echo 'make venv      make the environment and nothing else'
	@echo 'make clean     remove what these targets made, the environment last'
	@echo
	@echo 'VENV=.venv     the environment          PYTHON=python3.13  the Python it is made from'
	@echo 'EXTRAS="torch" packages to add to it when it is made'
	@echo 'PIP_ARGS="-q"  arguments of every pip install'
	@echo 'EXAMPLES=20000 BACKEND=cython CPU=x86-64-v3 SEED=1  what fuzz tries, where, and from where on'
	@echo 'JOBS=auto      processes that the tests run in; 0: one, without others beside it'
	@echo 'ARGS="-k rms"  arguments of what the target runs: pytest of test, test-quick and bench, else the program'

demo:
	$(PREPARE) $(STAMPS)/demo
	$(PY) -m fastnorm demo $(ARGS)

test:
	$(PREPARE) $(STAMPS)/test
	$(PY) -m pytest $(PARALLEL) $(ARGS)

fuzz:
	$(PREPARE) $(STAMPS)/test
	$(PY) -m tests.fuzz --examples $(EXAMPLES) $(if $(BACKEND),--backend $(BACKEND)) $(if $(CPU),--cpu $(CPU)) $(if $(SEED),--seed $(SEED))

trust:
	$(PREPARE) $(STAMPS)/test
	$(PY) -m tests.trust $(ARGS)

# tests/conftest.py says which these are.
test-quick:
	$(PREPARE) $(STAMPS)/test
	$(PY) -m pytest $(PARALLEL) --quick $(ARGS)

# In a copy of the tree with an environment of its own.
test-oldest:
	$(PREPARE) $(STAMPS)/build
	$(PY) tools/oldest.py $(ARGS)

dist-check:
	$(PREPARE) $(STAMPS)/dist
	$(PY) tools/dist_check.py

sanitize:
	$(PREPARE) $(STAMPS)/test
	$(PY) -m tests.sanitize $(ARGS)

# Some of the cases, with ARGS, leave the README and the stored results alone.
bench:
	$(PREPARE) $(STAMPS)/bench
	@mkdir -p .benchmarks
	$(PY) -m pytest benchmarks/ -q --benchmark-only --benchmark-quiet --benchmark-json=.benchmarks/results.json $(ARGS)
	$(PY) -m benchmarks.report .benchmarks/results.json $(if $(ARGS),--folder .benchmarks,--readme README.md)

bench-gate:
	$(PREPARE) $(STAMPS)/test
	$(PY) -m benchmarks.gate $(ARGS)
	$(PY) -m benchmarks.instructions

bench-gate-update:
	$(PREPARE) $(STAMPS)/test
	$(PY) -m benchmarks.gate --update
	$(PY) -m benchmarks.instructions --update

lint:
	$(PREPARE) $(STAMPS)/dev
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(BIN)/lint-imports --no-logo --no-cache

format:
	$(PREPARE) $(STAMPS)/dev
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

docs:
	$(PREPARE) $(STAMPS)/docs
	$(BIN)/sphinx-build -q -W --keep-going -E -b html -d docs/_build/doctrees docs docs/_build/html
	$(BIN)/sphinx-build -q -W --keep-going -b doctest -d docs/_build/doctrees docs docs/_build/doctest
	@echo 'The documentation is in docs/_build/html/index.html'

site-check: docs
	$(PREPARE) $(STAMPS)/site $(STAMPS)/axe.min.js
	$(PY) -m pytest tests/site_check.py $(PARALLEL) $(ARGS)

venv:
	$(PREPARE) $(STAMPS)/venv

build:
	$(PREPARE) $(STAMPS)/build

$(STAMPS)/venv:
	$(PYTHON) -m venv '$(VENV)'
	$(if $(EXTRAS),$(PIP) install $(PIP_ARGS) $(EXTRAS))
	@mkdir -p '$(STAMPS)'
	@touch '$@'

$(STAMPS)/build: $(BUILT_FROM) | $(STAMPS)/venv
	$(PIP) install $(PIP_ARGS) -e .
	@touch '$@'

# The packages of one extra. Its list leaves out fastnorm-kernels, which pip would else look for.
$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/bench $(STAMPS)/docs $(STAMPS)/dev $(STAMPS)/dist $(STAMPS)/site: $(STAMPS)/build
	$(PY) tools/requirements.py $(@F) > '$@.txt'
	$(PIP) install $(PIP_ARGS) -r '$@.txt'
	@touch '$@'

# What finds faults for those who do not see a page. npm packs it, and nothing of it is installed.
$(STAMPS)/axe.min.js:
	cd '$(STAMPS)' && npm pack --silent axe-core@$(AXE) && tar -xzOf axe-core-$(AXE).tgz package/axe.min.js > axe.part
	mv '$(STAMPS)/axe.part' '$@'

clean:
	rm -rf build dist wheelhouse fastnorm.egg-info fastnorm_kernels.egg-info docs/_build docs/reference/generated docs/auto_examples docs/sg_execution_times.rst
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f fastnorm/_core/*.so fastnorm/_core/*.pyd fastnorm/_core/*.c
	find fastnorm tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	rm -rf '$(VENV)'
