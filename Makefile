# Every job of the project is a target here; `make` alone lists them.
# PYTHON makes the environment and VENV is its folder: `VENV=/some/path make test`.

PYTHON ?= python3
VENV ?= .venv

run := $(VENV)/bin/python -m
env := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: ablation ablation-quick bench browser help env demo figures guide inference mixed-scale test tests lint types unit notebooks docs format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(env) ## Create the environment and install the package with all extras

demo: $(env) ## Train a small gated network on handwritten digits, with and without the loss
	$(VENV)/bin/batchshaping demo

figures: $(env) ## Repeat the published runs: print their losses, draw them into outputs/
	$(run) batchshaping.experiments.published outputs

# One thread a worker: torch would otherwise start one a core in each of them. More workers than cores would be slower.
pytest := OMP_NUM_THREADS=1 $(run) pytest
workers := -n logical --maxprocesses 4 --dist worksteal --durations 25

# Two at a time, since the first three take one core each. The tests come last and end last: their last line says what
# could not be checked.
test: $(env) browser ## Run every check
	@$(MAKE) --no-print-directory --jobs 2 types lint docs tests

tests: $(env)
	$(pytest) $(workers)

lint: $(env) ## Check style and formatting (ruff)
	$(run) ruff check
	$(run) ruff format --check

types: $(env) ## Check types (mypy, strict)
	$(run) mypy

unit: $(env) browser ## Run the tests and the examples in the docstrings (pytest)
	$(pytest) $(workers) --ignore tests/test_notebooks.py

notebooks: $(env) ## Execute the notebooks (pytest)
	$(pytest) tests/test_notebooks.py

# The report is tested in Chromium. Where there is none and it cannot be installed, pytest skips these tests.
browser: ## Install Chromium for the tests of the report, where root can do so with apt-get
	@if ! { command -v chromium && command -v chromedriver; } >/dev/null && \
			command -v apt-get >/dev/null && test "$$(id -u)" = 0; then \
		echo "Installing chromium and chromium-driver with apt-get"; \
		apt-get update -qq; \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq chromium chromium-driver >/dev/null || true; \
	fi

# Made anew, so that nothing is left of what is gone; a warning is an error.
docs: $(env) ## Build the site into docs/_build/html, strictly (sphinx)
	rm -rf docs/api docs/_build
	$(run) sphinx -c docs -b html -n -W --keep-going -q . docs/_build/html
	$(VENV)/bin/batchshaping report benchmarks/ablation/results/*.json --output docs/_build/html/docs/ablation.html
	$(VENV)/bin/python docs/check_links.py docs/_build/html

guide: $(env) ## Measure all statistics anew and write the tables and figures of the guide
	$(VENV)/bin/python benchmarks/statistics_on_published_runs.py --docs docs
	$(VENV)/bin/python benchmarks/history_on_small_batches.py --docs docs

bench: $(env) ## Measure this package beside its peers and write benchmarks/results
	$(run) pip install --disable-pip-version-check --quiet --editable '.[bench]'
	$(VENV)/bin/python benchmarks/bench.py

# In pieces, since what a machine does beside it disturbs a short measurement less.
inference: $(env) ## Time conditional inference beside dense inference; write benchmarks/results/inference and the guide
	for network in resnet18 resnet34 resnet50; do \
		$(VENV)/bin/batchshaping bench inference --networks $$network --batches 1 \
			--output benchmarks/results/inference/$$network-1 --force && \
		$(VENV)/bin/batchshaping bench inference --networks $$network --batches 16 --turns 20 \
			--output benchmarks/results/inference/$$network-16 --force || exit 1; \
	done
	$(VENV)/bin/batchshaping bench inference --networks msvit-small16 --batches 1 --shares 0.7,0.5,0.3 \
		--output benchmarks/results/inference/msvit-small16-1 --force
	$(VENV)/bin/batchshaping bench inference --networks msvit-small16 --batches 32 --shares 0.7,0.5,0.3 --turns 10 \
		--output benchmarks/results/inference/msvit-small16-32 --force
	$(VENV)/bin/python benchmarks/inference_guide.py

ablation: $(env) ## Train what is missing of the ablation on Fashion-MNIST (hours; resumable) and write what came of it
	$(VENV)/bin/python benchmarks/ablation/ablation.py
	$(VENV)/bin/python benchmarks/ablation/from_trained.py

mixed-scale: $(env) ## Train what is missing of the experiment on mixed-scale tokens (an hour; resumable) and write what came of it
	$(VENV)/bin/python benchmarks/mixed_scale/mixed_scale.py
	$(VENV)/bin/python benchmarks/mixed_scale/pictures.py

ablation-quick: $(env) ## The same in ten minutes: a tenth of the images, one seed, results to outputs/
	$(VENV)/bin/python benchmarks/ablation/ablation.py --quick

format: $(env) ## Format the code and fix what can be fixed
	$(run) ruff check --fix
	$(run) ruff format

clean: ## Remove caches and build products; the environment stays
	rm -rf build dist docs/_build docs/api .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# What keeps PYTHON from making the environment; empty if nothing does.
fault = $(shell \
	command -v $(PYTHON) >/dev/null || { echo "there is no '$(PYTHON)'"; exit; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "'$(PYTHON)' is $$($(PYTHON) -V 2>&1)"; exit; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		echo "'$(PYTHON)' has no venv module (on Debian and Ubuntu: apt install python3-venv)")

# The stamp is written last, so an interrupted installation starts again.
$(env): pyproject.toml
	$(if $(fault),$(error Python 3.10 or newer with venv is needed, but $(fault)))
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(run) pip install --disable-pip-version-check --editable '.[all]'
	touch $@
