# `make test` and `make demo` need git, make, Python >= 3.10 and a C++ compiler; the rest comes into .venv.
# Variables: PYTHON (makes .venv), RQK_CUDA=auto|0|1 (build the CUDA library), ARGS (passed on), OUT (gpu-check),
# NAME (new-op).

PYTHON ?= python3
ARGS ?=
OUT ?= benchmarks/results
export RQK_CUDA ?= auto

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CONSTRAINTS := requirements/constraints.txt
INSTALL := $(PIP) install -c $(CONSTRAINTS)
# Torch and what the build runs on: there before the project, which is built against them without isolation.
BUILD_TOOLS := torch numpy setuptools cmake ninja
WITH_EXTRAS := -e '.[gen,test]'
SOURCES := CMakeLists.txt $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CXX_FILES := $(filter csrc/%,$(SOURCES)) $(shell find tools -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# A warm heap (large blocks stay with the process) and no second spinning OpenMP pool: see benchmarks/README.md.
BENCH_ENV := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 \
	MALLOC_TOP_PAD_=268435456 OMP_WAIT_POLICY=PASSIVE

.DEFAULT_GOAL := help
.PHONY: help build emulation test coverage docs demo new-op lint format bench gpu-check clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- the environment -------------------------------------------------------------------------------------

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) not found: install Python >= 3.10, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than 3.10: name a newer one, like make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments (no ensurepip): on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.tools: $(CONSTRAINTS) $(VENV)/.made
	@command -v $${CXX:-c++} >/dev/null || \
		{ echo "no C++ compiler ($${CXX:-c++}): on Debian and Ubuntu, apt install g++" >&2; exit 1; }
	$(INSTALL) $(BUILD_TOOLS)
	@touch $@

# A change of csrc or CMakeLists.txt only builds anew; anything else also looks at the dependencies again.
# The compiled library itself is no prerequisite with a time of its own: without one, build.
$(VENV)/.built: $(SOURCES) setup.py pyproject.toml $(VENV)/.tools $(if $(wildcard rqkernels/_C*.so),,FORCE)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(INSTALL) --no-build-isolation \
		$(if $(filter-out $(SOURCES) FORCE,$?),$(WITH_EXTRAS),--no-deps -e .)
	@touch $@

$(VENV)/.lint: $(CONSTRAINTS) $(VENV)/.made
	$(INSTALL) ruff clang-format mypy
	@touch $@

$(VENV)/.bench: $(VENV)/.built
	$(INSTALL) --no-build-isolation -e '.[gen,test,bench]'
	@touch $@

build: $(VENV)/.built ## make .venv, install the pinned dependencies, compile

# --- what one runs ---------------------------------------------------------------------------------------

# The tests would build it too, in silence; here one sees what the compiler says.
emulation: build ## compile the CUDA kernels for the CPU, in three builds that the tests run
	$(PY) tests/emulation/build.py

# Two workers and more, by cores; each holds 0.7 GiB. Debuggers need one process: ARGS="-n 0 --pdb".
test: build emulation ## all tests (ARGS="-k search" passes options to pytest)
	$(PY) -m pytest -p no:benchmark -n logical --maxprocesses 4 --dist worksteal $(ARGS)

coverage: build ## the tests under coverage, which takes half as long again (ARGS="tests/rqgen/data" for a part)
	$(PY) -m pytest --cov=rqkernels --cov=rqgen $(ARGS)

docs: build ## write docs/cli.md from the commands
	$(PY) docs/generate_cli.py

demo: build ## train both stages on handwritten digits and draw what they learned, into runs/demo
	$(VENV)/bin/rqgen demo $(ARGS)

new-op: $(VENV)/.lint ## write the files of a new operator (NAME=my_op): kernels, reference, tests, benchmark
	@$(PY) tools/new_op.py "$(NAME)"

# mypy reads the types of torch and the other dependencies, so it needs them installed.
lint: $(VENV)/.lint $(VENV)/.built ## ruff, clang-format and mypy, changing nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy

format: $(VENV)/.lint ## let ruff and clang-format rewrite what they can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

bench: $(VENV)/.bench ## all benchmarks, results into benchmarks/results, tables and plot into benchmarks/RESULTS.md
	$(BENCH_ENV) $(PY) -m pytest benchmarks -o python_files="bench_*.py" -o pythonpath=benchmarks $(ARGS)
	$(PY) benchmarks/render.py

# Makes no environment and fetches nothing: the first Python here that has torch and pytest.
gpu-check: ## tests marked gpu, compute-sanitizer, benchmarks on the card; JSON into OUT (benchmarks/results)
	@for python in $(PYTHON) $(PY); do \
		if $$python -c 'import torch, pytest' 2>/dev/null; then \
			exec env $(BENCH_ENV) $$python benchmarks/gpu_check.py --out "$(OUT)" $(ARGS); \
		fi; \
	done; \
	echo "gpu-check: no Python here has torch and pytest ($(PYTHON), $(PY)); name one: make gpu-check PYTHON=..." >&2; exit 2

clean: ## remove .venv, builds and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info rqkernels/*.so .pytest_cache .ruff_cache .mypy_cache \
		.hypothesis .benchmarks .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
