# Everything runs in an environment of its own, which the first target makes: no step by hand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test fuzz lint docs bench clean

# Pre-train a slimmable ResNet-20 on real images that the package ships, and print what each width has learned. By itself,
# `accelerate launch` takes one thread.
demo: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)} $(BIN)/accelerate launch -q recipes/pretrain.py

test: $(READY)
	$(BIN)/python -m pytest

# Damage files in ways that have not been tried, for about half an hour; a fault is printed with the number that repeats it.
fuzz: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.fuzz --cases 5000 --seed "$$(date +%s)"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Build the manual to site/; a broken link or an unreachable page fails. `.venv/bin/mkdocs serve` shows it while one writes.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Measure what docs/cost.md shows; about half an hour on two cores. Each is a command of its own, see benchmarks/.
bench: $(READY)
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/data_pipeline.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/scaling.py

clean:
	rm -rf $(VENV) .cache

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
