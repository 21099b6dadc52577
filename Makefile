# `make demo` and `make test` are all a newcomer needs; each creates the environment if it is missing.
# Paths are relative and programs run as `python -m`: the path of the checkout may contain spaces, which the
# first line of an installed script cannot.

PYTHON ?= $(shell for python in python3.11 python3.12; do \
	$$python -c '' 2>/dev/null && echo $$python && break; done)
VENV_PYTHON := .venv/bin/python
STAMP := .venv/.installed
PIP_INSTALL := $(VENV_PYTHON) -m pip --disable-pip-version-check install
# DeepSpeed is a source distribution and does not declare setuptools; its kernels stay uncompiled.
SETUPTOOLS := setuptools==84.2.1
export DS_BUILD_OPS := 0
# pytest-xdist schedules each module as a unit, in our order: two workers per core, since half of the tests wait.
CORES := $(shell getconf _NPROCESSORS_ONLN | awk '{ print $$1 < 8 ? $$1 : 8 }')
WORKERS ?= $(shell expr 2 \* $(CORES))
BY_MODULE := --dist loadgroup --no-loadscope-reorder
IN_PARALLEL := -n $(WORKERS) $(BY_MODULE)

.PHONY: help demo gpu gpu-bench test test-fast test-times test-coverage test-mutants test-crash test-slurm test-data lint venv clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   from raw text to a trained, resumed and exported LLaMA on this machine, in minutes"
	@echo "make test   run the tests"
	@echo
	@echo "make demo uses GPUs if there are any. DEVICE=cpu: two CPU processes instead. STEPS=30: a third of the time."
	@echo "make gpu checks that everything is right on this machine's GPUs (ten minutes), make gpu-bench how fast it is;"
	@echo "both write runs/gpu/gpu-report.md and accept PART=name."
	@echo
	@echo "Also: make test-fast (tests that start no process; quick enough for every save of a file),"
	@echo "make test-times (where the time goes), make test-coverage,"
	@echo "make test-mutants (removes guards one by one; each must turn a test red),"
	@echo "make test-crash (every fault of a save, every layout, 25 kills; KILLS=1000 for more),"
	@echo "make test-data (tokens of a whole corpus from both encoders; TEST_CORPUS_MB=25),"
	@echo "make test-slurm (the job scripts on a real Slurm of virtual nodes; needs root; SAMPLE=1 for four jobs),"
	@echo "make lint (ruff, import contracts, mypy, shellcheck), make venv (only the environment), make clean (removes it and the caches)."
	@echo "PYTHON=/path/to/python selects the interpreter: 3.11 or 3.12."

demo: $(STAMP)
	@$(VENV_PYTHON) tools/demo.py $(if $(STEPS),--steps $(STEPS)) $(if $(DEVICE),--device '$(DEVICE)')

# Is it right on this machine's GPUs?
gpu: $(STAMP)
	@$(VENV_PYTHON) tools/gpu_report.py $(PART:%=--part %)

# Is it fast? Each part takes under eight minutes, and their reports add up.
gpu-bench: $(STAMP)
	@$(VENV_PYTHON) tools/gpu_report.py --bench $(PART:%=--part %)

test: $(STAMP)
	@$(VENV_PYTHON) -m pytest $(IN_PARALLEL)

# Tests that start no process, quick enough for every save of a file.
test-fast: $(STAMP)
	@$(VENV_PYTHON) -m pytest -n $(CORES) $(BY_MODULE) -m "not process and not crash and not slurm"

# Seconds by module, and the time that all processes spend on imports.
test-times: $(STAMP)
	@$(VENV_PYTHON) tests/times.py $(IN_PARALLEL)

test-coverage: $(STAMP)
	@rm -rf build/coverage && mkdir -p build/coverage
	@$(VENV_PYTHON) -m coverage run -m pytest $(IN_PARALLEL)
	@$(VENV_PYTHON) -m coverage combine -q && $(VENV_PYTHON) -m coverage report --skip-covered

# Removes guards of the product one after another; each must turn a test red.
test-mutants: $(STAMP)
	@$(VENV_PYTHON) tests/mutants.py

# Prints what was tried and what survived.
test-crash: $(STAMP)
	@KILLS="$(or $(KILLS),25)" $(VENV_PYTHON) -m pytest -m crash -rA

# Starts a Slurm of two nodes on this machine; as root also installs missing packages.
test-slurm: $(STAMP)
	@if [ "$$(id -u)" -ne 0 ]; then echo "make test-slurm: SKIPPED all: only root can start Slurm's daemons"; else \
	    bash tests/slurm/slurm-local.sh install && $(VENV_PYTHON) -m pytest -m "slurm$(if $(SAMPLE), and sample)" tests/slurm; fi

test-data: $(STAMP)
	@TEST_CORPUS_MB="$(or $(TEST_CORPUS_MB),25)" $(VENV_PYTHON) -m pytest tests/preprocess/test_encoders.py

lint: $(STAMP)
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-cache --no-logo
	@$(VENV_PYTHON) -m mypy
	@.venv/bin/shellcheck -x slurm/*.sh tests/slurm/*.sh .ci/run

venv: $(STAMP)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

# The stamp is written last: an interrupted installation continues where it stopped.
$(STAMP): requirements.txt pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "Python 3.11 or 3.12 is required, but neither python3.11 nor python3.12 runs." >&2; \
		echo "Debian: apt-get install python3.11 python3.11-venv; elsewhere: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || { \
		echo "PYTHON=$(PYTHON) does not run, or is not Python 3.11 or 3.12." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot create virtual environments. Debian: apt-get install python3.11-venv" >&2; exit 1; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || { \
		echo "Creating .venv with $(PYTHON)"; "$(PYTHON)" -m venv --clear .venv; }
	@echo "Installing torch (takes a few minutes, only once)"
	@$(PIP_INSTALL) "$$(grep '^torch==' requirements.txt)" $(SETUPTOOLS)
	@echo "Installing the other packages of requirements.txt"
	@$(PIP_INSTALL) -q --no-build-isolation -r requirements.txt
	@$(PIP_INSTALL) -q --no-build-isolation --no-deps -e .
	@touch $(STAMP)
