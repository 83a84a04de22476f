# make test    everything that this machine can check, in an environment of its own
# make demo    fine-tune a sentence encoder with forward passes only (about ten minutes)
# make compare the methods beside each other at equal numbers of evaluations (about ten minutes)
# make precisions  MeZO in bfloat16 beside float32 (about ten minutes)
# make zopro   align a small language model with forward passes only (a few minutes)
# make align   align a small language model by DPO, IPO and KTO, and see what it forgets
#              (five to fifteen minutes on two cores)
# make bench   every operation beside what users run instead (nine minutes), under pytest-benchmark
# make report  the README's performance section and plot, from benchmarks/results/
# make audit   what the GPU kernels' machine code costs, with no GPU (a few minutes)
# make sanitize  the GPU's tests under compute-sanitizer: memcheck and racecheck (needs a GPU)
# make wheel   a source distribution and, built from it, a wheel in dist/
# make matrix  one wheel beside other versions of torch: make matrix PYTHONS='env-a/bin/python ...'
# make docs    the documentation as a site, in docs/_build/html
# make format  format the sources
#
# Another torch: make test TORCH='torch==2.11.0'.  Another Python: make test PYTHON=python3.12.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= 2

BIN = $(VENV)/bin
SOURCES = setup.py pyproject.toml $(shell find csrc -type f)
CPP = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test check demo compare precisions zopro align bench report audit sanitize wheel matrix docs format clean

test: check $(VENV)/test
	$(BIN)/python -m pytest -n $(JOBS)

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

demo: $(VENV)/examples
	HF_HUB_OFFLINE=1 $(BIN)/python examples/docstring_areas.py

zopro: $(VENV)/examples
	HF_HUB_OFFLINE=1 $(BIN)/python examples/zopro_rlhf.py

align: $(VENV)/examples
	HF_HUB_OFFLINE=1 $(BIN)/python examples/align_merging.py

compare: $(VENV)/examples
	HF_HUB_OFFLINE=1 $(BIN)/python examples/compare_methods.py

precisions: $(VENV)/examples
	HF_HUB_OFFLINE=1 $(BIN)/python examples/compare_precisions.py

bench: $(VENV)/bench
	$(BIN)/python -m pytest benchmarks

report: $(VENV)/bench
	$(BIN)/python -m zokern.bench.report

audit: $(VENV)/test
	$(BIN)/python -m benchmarks.audit

# Without torch's cache of memory, so that each tensor has bounds of its own.
sanitize: $(VENV)/test
	for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	        --target-processes all $(BIN)/python -m pytest -m gpu -n 0 || exit 1; \
	done

wheel: $(VENV)/dev
	$(BIN)/python -m build

matrix: $(VENV)/test
	$(BIN)/python -m tests.matrix $(or $(PYTHONS),$(BIN)/python)

docs: $(VENV)/docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist docs/_build zokern/*.so zokern.egg-info $(VENV)

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	touch $@

# Installed in place; the build takes its tools from an environment of its own, without torch.
$(VENV)/zokern: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/dev $(VENV)/test $(VENV)/bench $(VENV)/docs $(VENV)/examples: $(VENV)/zokern
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(notdir $@)]'
	touch $@
