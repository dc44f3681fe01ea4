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

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY     := $(BIN)/python
PIP    := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps

# A change of one of these builds and installs the package again. Changed .py files need nothing.
BUILT_FROM := pyproject.toml setup.py \
	$(wildcard fastnorm/_core/*.pyx fastnorm/_core/*.pxi fastnorm/_core/*.pxd fastnorm/_core/*.h)

.DEFAULT_GOAL := help
# Two targets at once would meet in pip.
.NOTPARALLEL:
.PHONY: help venv build demo test fuzz trust lint format docs bench bench-gate bench-gate-update clean

help:
	@echo 'make demo      build fastnorm, run the demonstration'
	@echo 'make test      build fastnorm, run the tests (PyTorch tests skip where it is absent)'
	@echo 'make fuzz      random calls of every function on fenced memory, each backend and CPU'
	@echo 'make trust     every attack of tests/trust.py, as a table: inputs tried, faults found'
	@echo 'make lint      ruff check, ruff format --check, mypy, lint-imports'
	@echo 'make format    let ruff sort imports and format'
	@echo 'make docs      build the documentation in docs/_build/html, run its examples'
	@echo 'make bench     run the benchmarks, write benchmarks/results and the table in README.md'
	@echo 'make bench-gate         fail if a kernel has become slower than it is stored to be'
	@echo 'make bench-gate-update  store how slow they are now'
	@echo 'make build     build fastnorm and install it in the environment'
	@echo 'make venv      make the environment and nothing else'
	@echo 'make clean     remove what these targets made, the environment last'
	@echo
	@echo 'VENV=.venv     the environment          PYTHON=python3.13  the Python it is made from'
	@echo 'EXTRAS="torch" packages to add to it when it is made'
	@echo 'PIP_ARGS="-q"  arguments of every pip install'
	@echo 'EXAMPLES=20000 BACKEND=cython CPU=x86-64-v3 SEED=1  what fuzz tries, where, and from where on'
	@echo 'ARGS="-k rms"  arguments of the program that demo, test, bench or bench-gate runs'

demo: $(STAMPS)/demo
	$(PY) -m fastnorm demo $(ARGS)

test: $(STAMPS)/test
	$(PY) -m pytest $(ARGS)

fuzz: $(STAMPS)/test
	$(PY) -m tests.fuzz --examples $(EXAMPLES) $(if $(BACKEND),--backend $(BACKEND)) $(if $(CPU),--cpu $(CPU)) $(if $(SEED),--seed $(SEED))

trust: $(STAMPS)/test
	$(PY) -m tests.trust $(ARGS)

# Some of the cases, with ARGS, leave the README and the stored results alone.
bench: $(STAMPS)/bench
	@mkdir -p .benchmarks
	$(PY) -m pytest benchmarks/ -q --benchmark-only --benchmark-quiet --benchmark-json=.benchmarks/results.json $(ARGS)
	$(PY) -m benchmarks.report .benchmarks/results.json $(if $(ARGS),--folder .benchmarks,--readme README.md)

bench-gate: $(STAMPS)/test
	$(PY) -m benchmarks.gate $(ARGS)
	$(PY) -m benchmarks.instructions

bench-gate-update: $(STAMPS)/test
	$(PY) -m benchmarks.gate --update
	$(PY) -m benchmarks.instructions --update

lint: $(STAMPS)/dev
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: $(STAMPS)/dev
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

docs: $(STAMPS)/docs
	$(BIN)/sphinx-build -q -W --keep-going -E -b html -d docs/_build/doctrees docs docs/_build/html
	$(BIN)/sphinx-build -q -W --keep-going -b doctest -d docs/_build/doctrees docs docs/_build/doctest

venv: $(STAMPS)/venv
build: $(STAMPS)/build

$(STAMPS)/venv:
	@test -n '$(PYTHON)' || { echo 'fastnorm needs Python 3.11 or newer and none was found: name it with make PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv '$(VENV)'
	$(if $(EXTRAS),$(PIP) install $(PIP_ARGS) $(EXTRAS))
	@mkdir -p '$(STAMPS)'
	@touch '$@'

$(STAMPS)/build: $(BUILT_FROM) | $(STAMPS)/venv
	$(PIP) install $(PIP_ARGS) -e .
	@touch '$@'

# The packages of one extra. pip reads its list from the installed fastnorm, which is therefore not
# built a second time; `pip show` fails where it is not installed, before pip looks for it elsewhere.
$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/bench $(STAMPS)/docs $(STAMPS)/dev: $(STAMPS)/build
	@$(PIP) show --quiet fastnorm-kernels
	$(PIP) install $(PIP_ARGS) 'fastnorm-kernels[$(@F)]'
	@touch '$@'

clean:
	rm -rf build dist wheelhouse fastnorm.egg-info fastnorm_kernels.egg-info docs/_build docs/reference/generated
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f fastnorm/_core/*.so fastnorm/_core/*.pyd fastnorm/_core/*.c
	find fastnorm tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	rm -rf '$(VENV)'
