# Each target sets up .venv by itself. The stamp is named after what was installed, so a stale environment is brought up to date.
PYTHON ?= python3
READY := .venv/.ready-$(shell cat pyproject.toml constraints.txt requirements-gds.txt | cksum | cut -d ' ' -f 1)
RUN := .venv/bin/python -m

GPU ?= gpu13

.PHONY: demo test lint bench gpu

demo: $(READY)
	$(RUN) tiercache.cli demo

test: $(READY)
	$(RUN) pytest

lint: $(READY)
	$(RUN) ruff check
	$(RUN) mypy
	.venv/bin/python -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

bench: $(READY)
	$(RUN) tiercache.cli bench

# On a machine with a GPU: tests and measurements of the device tier. GPU=gpu for CUDA 12.
gpu: .venv-gpu/.ready
	TRITON_INTERPRET=0 .venv-gpu/bin/python -m pytest -m gpu
	.venv-gpu/bin/python bench/gpu.py

.venv-gpu/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet -e '.[dev,$(GPU)]'
	touch $@

$(READY):
	.venv/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(RUN) pip install --quiet -c constraints.txt -e '.[dev]'
	$(RUN) pip install --quiet --no-deps -r requirements-gds.txt
	rm -f .venv/.ready-*
	touch $@
