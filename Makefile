# make demo: from nothing to a preference-tuned adapter. make test: what CI runs.
# TORCH_INDEX=<index of CPU builds> takes torch from there: without a card, gigabytes of CUDA less.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint advisories bench conformance gpu-wheels dist installs clean

demo: $(VENV)/demo
	@$(BIN)/python recipes/pipeline.py experiment=pipeline/demo

# Every worker and every recipe of a test would compile the package for itself.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/dev
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@test ! -x $(BIN)/hadolint || $(BIN)/hadolint Dockerfile
	@$(BIN)/python tests/advisories.py || true

# Known faults of what constraints.txt pins, where the index tells of them; one that is not accepted is an error here.
advisories: $(VENV)/dev
	@$(BIN)/python tests/advisories.py

bench: $(VENV)/dev
	@$(BIN)/python tests/benchmarks/dpo_versus_trl.py
	@$(BIN)/python tests/benchmarks/ppo_vs_trl.py

# Every training recipe in every quantization, on constraints.txt and on the newest releases. It goes on where it ended.
conformance: $(VENV)/dev
	@$(BIN)/python tests/benchmarks/conformance.py
	@$(BIN)/python tests/benchmarks/conformance.py --newest
	@$(BIN)/python tests/benchmarks/conformance.py --table

# What a release uploads: the source, and the wheel that is built from it.
dist: $(VENV)/dev
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt "twine>=7"
	@rm -rf build dist
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/python -m twine check --strict dist/*

# Whether it installs where there is nothing, and each extra by itself.
installs: dist
	@$(BIN)/python tests/installs.py dist --environment $(VENV)/installs --constraint constraints.txt

# What tests/gpu/run.sh installs on a machine with a card and no network.
gpu-wheels:
	@bash tests/gpu/wheels.sh

# The file appears when the installation is complete: an interrupted one starts again.
# The demo compiles what it imports; to compile all that is installed takes a minute.
$(VENV)/demo: WHAT := .[audit]
$(VENV)/demo: COMPILE := --no-compile
$(VENV)/dev: WHAT := .[dev]
$(VENV)/demo $(VENV)/dev: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --constraint constraints.txt --index-url $(TORCH_INDEX) --no-deps $(COMPILE) torch)
	@$(BIN)/python -m pip install --quiet $(COMPILE) --constraint constraints.txt --editable "$(WHAT)"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
