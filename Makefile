# Two commands: `make demo` and `make test`. Both need Python >= 3.11 and nothing else; they share .venv.
#     make test PYTHON=python3.12        another interpreter

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-smoke test

demo: .venv/.installed  ## pretrain, fine-tune, compare, on Fashion-MNIST
	$(BIN)/python benchmarks/demo.py

demo-smoke: .venv/.installed  ## the same in a few steps: does it run?
	$(BIN)/python benchmarks/demo.py --smoke

test: .venv/.installed-dev  ## the fast tests
	$(BIN)/python -m pytest

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit("mpm needs Python 3.11 or newer, not %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --editable '.[dev,export]'
	@touch .venv/.installed $@
