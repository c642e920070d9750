# SPDX-License-Identifier: Apache-2.0
# Needs Python 3.11 or newer, make and a network on the first run. Another interpreter:
#     make test PYTHON=python3.13
# Without a GPU on Linux, PyTorch's CPU build is a much smaller download (remove .venv first):
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:
	@echo "make demo   train, quantize, export and run a small network (a few minutes)"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make clean  remove the virtual environment and every cache"

demo: $(STAMP)
	$(RUN) -m zsq demo

test: $(STAMP)
	$(RUN) -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

lint: $(STAMP)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "zsq needs Python 3.11 or newer, and there is no '$(PYTHON)' here:" \
			"install it, or name one with 'make PYTHON=/path/to/python3.11'." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "zsq needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1):" \
			"name another one with 'make PYTHON=/path/to/python3.11'." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON)' cannot create a virtual environment; on Debian and Ubuntu, install the" \
			"package python3-venv." >&2; rm -rf $(VENV); exit 1; }
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache \
		.coverage htmlcov
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
