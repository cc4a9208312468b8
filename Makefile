# Everything runs in a virtual environment that is made at first use: nothing to install by hand.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_NPU ?= torch_npu==2.13.0
PIP_ARGS ?=

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check -q install $(PIP_ARGS)
RUN = QUANTPASS_TORCH_NPU=$(abspath $(VENV))/torch_npu $(VENV)/bin/python

CELLS ?=
SHARES ?=

SAMPLE ?= 300
SEED ?= 0

.PHONY: help demo test test-fast matrix mutants lint format pages docs coverage bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# PyTorch comes first and pinned, so that no other package pulls a build of its own choice.
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)" numpy
	@touch $@

$(VENV)/%.stamp: pyproject.toml | $(VENV)/torch.stamp
	$(PIP) -e '.[$*]'
	@touch $@

# The vendor's wheel beside the environment, not in it: installed, it would be loaded with every `import torch`.
$(VENV)/torch_npu.stamp: | $(VENV)/torch.stamp
	$(PIP) --no-deps --target $(VENV)/torch_npu "$(TORCH_NPU)" \
		|| echo "no $(TORCH_NPU) for this machine: tests that run the real torchair are skipped"
	@touch $@

demo: $(VENV)/demo.stamp ## quantize a real sentence encoder three ways, explain, fuse, compare
	$(RUN) examples/minilm.py

test: $(VENV)/test.stamp $(VENV)/torch_npu.stamp ## all tests
	$(RUN) -m pytest -n auto

test-fast: $(VENV)/test.stamp $(VENV)/torch_npu.stamp ## the tests that take seconds
	$(RUN) -m pytest -n auto -m "not slow"

matrix: $(VENV)/test.stamp ## other versions of PyTorch and torchair (CELLS="2.10.0/2.10.0.post4 ..." SHARES="doors fast"), docs/versions.md
	$(RUN) -m tests.matrix.run $(CELLS) $(if $(SHARES),--again $(addprefix --only ,$(SHARES)))

mutants: $(VENV)/test.stamp $(VENV)/mutants.stamp $(VENV)/torch_npu.stamp ## edit the pass's code in SAMPLE places: do the fast tests notice?
	OMP_NUM_THREADS=1 $(RUN) -m tests.mutants.run --sample $(SAMPLE) --seed $(SEED)

lint: $(VENV)/lint.stamp $(VENV)/test.stamp ## ruff, and mypy on the built wheel
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf build/lint && mkdir -p build/lint
	$(RUN) -m build -q --wheel --outdir build/lint/wheel .
	$(PIP) --no-deps --target build/lint/site build/lint/wheel/*.whl
	cd build/lint && MYPYPATH=site ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p quantpass

format: $(VENV)/lint.stamp ## let ruff format and fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/docs.stamp ## the documentation as a site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

pages: $(VENV)/test.stamp coverage ## make the generated pages of the documentation
	$(VENV)/bin/quantpass chips --markdown > docs/chips.md
	$(VENV)/bin/quantpass reasons --markdown > docs/reasons.md

coverage: $(VENV)/test.stamp ## what is read of each tool: run the tools, write docs/coverage.md
	$(RUN) -m tests.coverage.table

bench: $(VENV)/test.stamp ## time the pass beside Inductor's and in a whole compile, reading large weights, and what runs on a CPU
	$(RUN) -m benchmarks.pass_speed
	$(RUN) -m benchmarks.compile_share
	$(RUN) -m benchmarks.real_weights
	$(RUN) -m benchmarks.sharded
	$(RUN) -m benchmarks.cpu_run

clean: ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
