# `make demo` and `make test` are all a newcomer needs; each makes the environment when it is missing.
# Paths are relative and programs run as `python -m`: the checkout's own path may hold spaces, which the
# first line of an installed script cannot.

PYTHON ?= $(shell for python in python3.11 python3.12; do \
	$$python -c '' 2>/dev/null && echo $$python && break; done)
VENV_PYTHON := .venv/bin/python
STAMP := .venv/.installed
PIP_INSTALL := $(VENV_PYTHON) -m pip --disable-pip-version-check install
# DeepSpeed comes as source and asks for no setuptools of its own; its kernels stay uncompiled.
SETUPTOOLS := setuptools==84.2.1
export DS_BUILD_OPS := 0
# pytest-xdist takes each module as one piece, in our order: two workers a core, as half of the tests wait.
CORES := $(shell getconf _NPROCESSORS_ONLN | awk '{ print $$1 < 8 ? $$1 : 8 }')
WORKERS ?= $(shell expr 2 \* $(CORES))
BY_MODULE := --dist loadgroup --no-loadscope-reorder
IN_PARALLEL := -n $(WORKERS) $(BY_MODULE)

.PHONY: help demo gpu gpu-bench test test-fast test-times test-coverage test-mutants test-crash test-slurm test-data lint venv clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   raw text to a trained, resumed and exported LLaMA on this machine, in minutes"
	@echo "make test   run the tests"
	@echo
	@echo "make demo uses the GPUs that there are: DEVICE=cpu, two CPU processes instead; STEPS=30, a third of the time."
	@echo "make gpu asks whether everything is right on this machine's GPUs (ten minutes), make gpu-bench how fast it is;"
	@echo "both write runs/gpu/gpu-report.md, and take PART=name."
	@echo
	@echo "Also: make test-fast (tests that start no process, at each save), make test-times (where the time goes),"
	@echo "make test-coverage, make test-mutants (takes 49 guards out; each must turn a test red),"
	@echo "make test-crash (every fault of saving, every layout, 25 kills; KILLS=1000 for more),"
	@echo "make test-data (tokens of a whole corpus, by both encoders; TEST_CORPUS_MB=25),"
	@echo "make test-slurm (the job scripts on a real Slurm of virtual nodes; root; SAMPLE=1 for four jobs),"
	@echo "make lint (ruff, import contracts, mypy, shellcheck), make venv (environment only), make clean (remove it and the caches)."
	@echo "PYTHON=/path/to/python picks another interpreter: 3.11, or 3.12."

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

# Starts no process: what one runs at each save.
test-fast: $(STAMP)
	@$(VENV_PYTHON) -m pytest -n $(CORES) $(BY_MODULE) -m "not process and not crash and not slurm"

# Seconds by module, and what all processes spend on imports.
test-times: $(STAMP)
	@$(VENV_PYTHON) tests/times.py $(IN_PARALLEL)

test-coverage: $(STAMP)
	@rm -rf build/coverage && mkdir -p build/coverage
	@$(VENV_PYTHON) -m coverage run -m pytest $(IN_PARALLEL)
	@$(VENV_PYTHON) -m coverage combine -q && $(VENV_PYTHON) -m coverage report --skip-covered

# Takes guards of the product out one after another; each must turn a test red.
test-mutants: $(STAMP)
	@$(VENV_PYTHON) tests/mutants.py

# Prints what was tried and survived.
test-crash: $(STAMP)
	@KILLS="$(or $(KILLS),25)" $(VENV_PYTHON) -m pytest -m crash -rA

# Starts a Slurm of two nodes on this machine; root also gets the packages that are missing.
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

# The stamp is written last: an interrupted install goes on where it stopped.
$(STAMP): requirements.txt pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "Python 3.11 or 3.12 is needed and neither python3.11 nor python3.12 runs." >&2; \
		echo "Debian: apt-get install python3.11 python3.11-venv; elsewhere: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || { \
		echo "PYTHON=$(PYTHON) does not run, or is neither Python 3.11 nor 3.12." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments. Debian: apt-get install python3.11-venv" >&2; exit 1; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || { \
		echo "Making .venv with $(PYTHON)"; "$(PYTHON)" -m venv --clear .venv; }
	@echo "Installing torch: a few minutes, once"
	@$(PIP_INSTALL) "$$(grep '^torch==' requirements.txt)" $(SETUPTOOLS)
	@echo "Installing the other packages of requirements.txt"
	@$(PIP_INSTALL) -q --no-build-isolation -r requirements.txt
	@$(PIP_INSTALL) -q --no-build-isolation --no-deps -e .
	@touch $(STAMP)
