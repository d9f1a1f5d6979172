# What README and CI call. Everything happens in .venv; each target sets it up first.

PYTHON ?= python3
# Installed only where no python3 brings a torch that sees a GPU. `pip` must give a CPU build for this;
# elsewhere: make setup PIP_ARGS='--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple'
CPU_TORCH ?= torch==2.13.0 triton==3.9.0
PIP_ARGS ?=

# The Triton that the results in benchmarks/results were measured with, torch 2.11's: it compiles every kernel for every
# arch, and .venv's, the newest, what is typical, since it takes twice as long.
TRITON_MEASURED ?= 3.6.0

BIN := .venv/bin
READY := .venv/.ready
SEES_A_GPU := -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
COMPILER := .venv/triton-$(TRITON_MEASURED)
# One worker a core, and one thread a worker: the suites are processor-bound.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -n auto

# The vLLM that tests/vllm runs against, in an environment of its own: it pins what the other one does not have.
VLLM ?= vllm==0.29.0
VLLM_READY := .venv-vllm/.ready
# The newest vLLM that is known, whose seams are compared by signature: its Python files, unpacked.
VLLM_NEWEST ?= 0.33.0
VLLM_SOURCES := .venv-vllm/sources/$(VLLM_NEWEST)
VLLM_PYTEST := OMP_NUM_THREADS=1 BIDISPATCH_VLLM_SOURCES=$(CURDIR)/$(VLLM_SOURCES) \
  .venv-vllm/bin/python -m pytest --quiet -W default
VLLM_PIP := .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

.PHONY: setup demo test test-core test-vllm lint types unit interpreter compile test-gpu schema bench clean

setup: $(READY)

$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 3; }
	@if [ ! -x $(BIN)/python ]; then \
	  echo "setting up .venv"; \
	  if $(PYTHON) $(SEES_A_GPU); \
	  then $(PYTHON) -m venv --system-site-packages .venv; else $(PYTHON) -m venv .venv; fi \
	  || { rm -rf .venv; echo "no virtual environment: on Debian, apt-get install python3-venv"; exit 3; }; \
	fi
	@# A torch with a GPU is the user's own: nothing of theirs is pinned. Without one, everything is.
	@if $(BIN)/python $(SEES_A_GPU); \
	then $(PIP) --editable '.[dev]'; \
	else export PIP_CONSTRAINT=$(CURDIR)/.ci/constraints.txt; $(PIP) $(CPU_TORCH) && $(PIP) --editable '.[dev]'; fi
	@touch $@

demo: setup
	@$(BIN)/bidispatch demo

test: test-core test-vllm

test-core: lint types unit interpreter compile

# vLLM's own layers on the processor, with their methods replaced. `pip` must give a CPU build of torch, as for setup.
test-vllm: $(VLLM_READY) $(VLLM_SOURCES)/.ready
	$(VLLM_PYTEST) tests/vllm
	PYTHONPATH=$(CURDIR)/$(VLLM_SOURCES) $(VLLM_PYTEST) tests/vllm/test_vllm_layers.py  # what later versions have
	$(VLLM_PYTEST) tests/unit/test_vllm_attention.py tests/unit/test_vllm_restrictions.py \
	  tests/unit/test_vllm_core.py::test_seams_of_an_unpacked_wheel

$(VLLM_READY): pyproject.toml .ci/vllm.txt
	@[ -x .venv-vllm/bin/python ] || $(PYTHON) -m venv .venv-vllm || { rm -rf .venv-vllm; exit 3; }
	@$(VLLM_PIP) $(CPU_TORCH)
	@$(VLLM_PIP) --no-deps --requirement .ci/vllm.txt $(VLLM)
	@$(VLLM_PIP) --no-deps --editable .
	@touch $@

# Not made again with .venv-vllm: it needs no more of that than a pip.
$(VLLM_SOURCES)/.ready: .ci/vllm_sources.py | $(VLLM_READY)
	@.venv-vllm/bin/python .ci/vllm_sources.py $(VLLM_NEWEST) $(VLLM_SOURCES) $(PIP_ARGS)
	@touch $@

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/mypy

unit: setup
	$(PYTEST) tests/unit tests/packaging

# A process of its own: Triton reads TRITON_INTERPRET when it is imported.
interpreter: setup
	$(PYTEST) tests/interpreter

# Every kernel for every arch, with no GPU.
compile: $(COMPILER)/.ready
	PYTHONPATH=$(CURDIR)/$(COMPILER) $(PYTEST) tests/compile
	$(PYTEST) tests/compile/test_compile.py -k typical

# With a torch that sees a GPU, its own Triton is the one to ask: the folder stays empty.
$(COMPILER)/.ready: $(READY)
	@mkdir -p $(COMPILER)
	@$(BIN)/python $(SEES_A_GPU) \
	  || $(PIP) --no-deps --upgrade --target $(COMPILER) triton==$(TRITON_MEASURED)
	@touch $@

test-gpu: setup
	$(BIN)/python -m pytest tests/gpu

schema: setup
	$(BIN)/python -m bidispatch.profiles.schema > hw_profiles/schema.json

bench: setup
	$(BIN)/python benchmarks/host_time.py

clean:
	rm -rf .venv .venv-vllm build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
