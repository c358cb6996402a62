PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test slow check format notebooks docs wheel clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# The venv is up to date when it is newer than pyproject.toml.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'torch==2.13.*'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# CLIP's vocabulary, which tests read; what else the package needs is not needed.
	$(BIN)/python -m pip install --quiet --no-deps 'open_clip_torch==3.*'
	touch $@

install: $(VENV)/.installed  ## a virtual environment with everything in it

demo: install  ## teach the embedded model a robot from five photos, and look at it: about a minute after installing
	$(BIN)/python -m dreambooth_lab experiment=demo
	$(BIN)/python -m dreambooth_lab.tools.judge_toybox "$$(ls -d runs/*_demo | tail -n 1)"
	@run="$$(ls -d runs/*_demo | tail -n 1)"; echo; echo "Look at:"; \
	 echo "  $$run/report.html                      the page of the run"; \
	 echo "  $$run/images/before_after.png          left the base model, right after training; a row a prompt"; \
	 echo "  $$run/export/                          the LoRA and the learned token"

test: install  ## the tests that need no GPU and no patience, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: install  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: install  ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## put the code in its style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: install  ## execute the notebooks, in small and at their own sizes: about ten minutes
	$(BIN)/python -m pytest -n 0 tests/test_notebooks.py -m 'slow or not slow'

docs: install  ## the documentation's site in build/site, its links checked; needs no network
	$(BIN)/python docs/build.py

wheel: install  ## dist/*.whl, which runs without this checkout, and the source archive
	$(BIN)/python -m hatchling build -t sdist -t wheel

clean:  ## remove what the tools made; runs and caches stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
