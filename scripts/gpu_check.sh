#!/usr/bin/env bash
# Checks the Triton kernels on this machine's GPU against PyTorch, then times them. Needs PyTorch, Triton and pytest, not vLLM.
#
#   PYTHON=python3 scripts/gpu_check.sh [--dry-run]
#
# --dry-run: under Triton's interpreter on the CPU, small shapes; its times mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath --no-symlinks "$(command -v "${PYTHON:-python3}")")
ROOT=$PWD
if [ "${1:-}" != --dry-run ] && ! "$PYTHON" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
  echo "PyTorch sees no GPU: use --dry-run"
  exit 1
fi

# The package without what needs vLLM, so that nothing has to be installed.
BUILD=$ROOT/build/gpu_check
rm -rf "$BUILD"
mkdir -p "$BUILD/tests"
cp -r vllm_qfilters "$BUILD"
cp -r kernels "$BUILD/vllm_qfilters"
cp tests/__init__.py tests/paged.py tests/test_triton.py "$BUILD/tests"
export PYTHONPATH=$BUILD
if [ "${1:-}" = --dry-run ]; then
  export CUDA_VISIBLE_DEVICES="" TRITON_INTERPRET=1
fi
(cd "$BUILD" && "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_triton.py)
"$PYTHON" benchmarks/gpu_kernels.py "$@"
