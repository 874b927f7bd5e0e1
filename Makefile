# make run       fresh machine to result table: .venv, demo data, train, quantise, pack, reload, score
# make test      everything that needs no GPU           make test-gpu   the tests that need one
# make faults    breaks runs in every way, resumes them, writes docs/FAULTS.md (under 30 minutes)
# make lint      ruff and mypy                           make clean      removes .venv and caches, keeps data and runs
#
# A torch that PYTHON can already import is kept. Otherwise TORCH is installed; on Linux without a GPU, get the
# small CPU build first (README). PYTHON=... picks the interpreter, VENV=... the folder.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test faults lint test-gpu clean

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= 2

python := $(VENV)/bin/python
# module=requirement: installed only where the module cannot be found
run_modules := torch='$(TORCH)' numpy=numpy sentencepiece=sentencepiece brotli='brotli>=1.2'
dev_modules := pytest=pytest xdist=pytest-xdist hypothesis=hypothesis ruff=ruff mypy=mypy constriction=constriction \
               huggingface_hub=huggingface_hub zstandard=zstandard \
               $(if $(filter Linux,$(shell uname -s)),triton=triton)

help:
	@sed -n 's/^# \{0,1\}//; 1,4p' Makefile

# Packages are found through --system-site-packages; where PYTHON lives in a virtual environment or a conda
# environment of its own, that flag does not reach its packages, so a .pth file lists their folders.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $$($(PYTHON) --version) is too old, 3.11 or later is needed: make PYTHON=python3.12"; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv --system-site-packages $(VENV) >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --system-site-packages --without-pip $(VENV) \
	  || { echo "error: $(PYTHON) has no venv module: apt-get install python3-venv"; exit 1; }
	@outer=$$($(PYTHON) -c 'import site; print("\n".join(site.getsitepackages()))'); \
	  inner=$$($(python) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  echo "$$outer" > "$$inner/outer.pth"
	@touch $@

define install
	@missing=$$($(python) -c 'import importlib.util, sys; \
	  pairs = [argument.split("=", 1) for argument in sys.argv[1:]]; \
	  print(*[need for module, need in pairs if importlib.util.find_spec(module) is None])' $(1)); \
	if [[ -n $$missing ]]; then \
	  $(python) -c 'import pip' 2>/dev/null \
	    || { echo "error: $(VENV) has no pip: apt-get install python3-venv python3-pip && make clean"; exit 1; }; \
	  echo "installing $$missing"; \
	  $(python) -m pip install --disable-pip-version-check $$([[ -t 1 ]] || echo --quiet) $$missing; \
	fi
	@touch $@
endef

$(VENV)/run-ready: Makefile | $(VENV)/created
	$(call install,$(run_modules))

$(VENV)/dev-ready: Makefile $(VENV)/run-ready
	$(call install,$(dev_modules))

run: $(VENV)/run-ready
	@$(python) tools/prepare_data.py demo
	@PRESET=demo $(python) train_gpt.py

test: $(VENV)/dev-ready
	@$(python) -m pytest -n $(JOBS) -q -m "not gpu and not slow"

test-gpu: $(VENV)/dev-ready
	@$(python) -m pytest -q -m gpu

faults: $(VENV)/dev-ready
	@OMP_NUM_THREADS=1 $(python) tests/faults/faults.py

lint: $(VENV)/dev-ready
	@$(python) -m ruff check .
	@$(python) -m mypy train_gpt.py tools

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './data/*' -not -path './runs/*' -prune -exec rm -rf {} +
