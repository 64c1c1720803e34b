# r1pipe: every command sets up .venv first if it is not there (see scripts/setup_env.py).
#
#   make demo                         the whole recipe on this machine, in minutes
#   make tools                        RL with a tool, likewise
#   make grpo CONFIG=configs/r1.yaml  one stage of a recipe, after the one before
#   make grpo NPROC=8                 in several processes, one for each GPU
#   make publish RUN=runs/demo REPO=user/name ARGS=--dry-run
#   make test                         the tests, real vLLM included

CONFIG ?= configs/demo.yaml
RUN ?= runs/demo
ARGS ?=
NPROC ?= 1
PYTHON ?= python3
R1PIPE = $(if $(filter 1,$(NPROC)),.venv/bin/r1pipe,\
	.venv/bin/python -m r1pipe.launch --nproc-per-node $(NPROC))

STAGES = $(filter-out __init__,$(basename $(notdir $(wildcard r1pipe/stages/*.py))))

.PHONY: help setup doctor demo tools run $(STAGES) publish report serve test test-slow test-unit test-gpu gpu-check lint format bench clean

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@$(PYTHON) scripts/setup_env.py

doctor:
	@$(PYTHON) scripts/setup_env.py --check
	@.venv/bin/r1pipe doctor $(CONFIG) $(ARGS)

# A process for each of two cores: small products leave a second thread idle.
demo: NPROC = 2
demo: setup
	@$(R1PIPE) run configs/demo.yaml $(ARGS)

tools: setup
	@$(R1PIPE) run configs/tools_tiny.yaml $(ARGS)

run $(STAGES): setup
	@$(R1PIPE) $@ $(CONFIG) $(ARGS)

publish: setup
	@.venv/bin/r1pipe publish $(RUN) --repo "$(REPO)" $(ARGS)

report serve: setup
	@.venv/bin/r1pipe $@ $(RUN) $(ARGS)

# A file at a time to each of a few processes; with ARGS, such as ARGS="-k trl", in one.
test: setup
	@.venv/bin/python -m pytest $(or $(ARGS),-n logical --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder --durations 15)

# What takes longer than 10 s: runs that are killed again and again, for instance. A third of it:
# ARGS="--third 0".
test-slow: setup
	@.venv/bin/python -m pytest -m slow $(ARGS)

test-unit: setup
	@.venv/bin/python -m pytest tests/unit $(ARGS)

# Skips, saying why, what the machine has no GPU for.
test-gpu: setup
	@.venv/bin/python -m pytest tests/gpu -rs $(ARGS)

# One GPU, seven minutes: figures beside their goals, in runs/gpu-check/.
gpu-check: setup
	@.venv/bin/python benchmarks/gpu_check.py $(ARGS)

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

format: setup
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

bench: setup
	@.venv/bin/python benchmarks/cpu_training.py

clean:
	rm -rf runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
