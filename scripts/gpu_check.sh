#!/usr/bin/env bash
# Checks the Triton kernels on this machine's GPU against PyTorch, and against xformers where it is installed, then times them.
# Needs PyTorch, Triton, numpy and pytest, not vLLM. Results go to benchmarks/results/gpu_kernels.json.
#
#   PYTHON=python3 scripts/gpu_check.sh [--tests] [--dry-run]
#
# --tests: does not time them.
# --dry-run: under Triton's interpreter on the CPU, fewer and smaller cases, some three minutes; its times mean nothing, and go
# to build/gpu_check/gpu_kernels.json.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath --no-symlinks "$(command -v "${PYTHON:-python3}")")
ROOT=$PWD
TIMES=1 DRY_RUN=0
for option; do
  case $option in
    --tests) TIMES=0 ;;
    --dry-run) DRY_RUN=1 ;;
    *) echo "there is no option $option: give --tests, --dry-run or both" && exit 2 ;;
  esac
done
if [ $DRY_RUN = 0 ] && ! "$PYTHON" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
  echo "PyTorch sees no GPU: use --dry-run"
  exit 1
fi

# The package without what needs vLLM, so that nothing has to be installed.
BUILD=$ROOT/build/gpu_check
rm -rf "$BUILD"
mkdir -p "$BUILD/tests"
cp -rL vllm_qfilters "$BUILD"  # kernels is a link
cp tests/__init__.py tests/paged.py tests/paged_attention.py tests/specialisations.py tests/test_triton.py tests/test_xformers.py "$BUILD/tests"
export PYTHONPATH=$BUILD
TESTS=(-m pytest -q -rs -p no:cacheprovider -o "markers=sampled(every): here all cases are run" tests/test_triton.py tests/test_xformers.py)
TIMING=("$PYTHON" benchmarks/gpu_kernels.py)
if [ $DRY_RUN = 1 ]; then
  export CUDA_VISIBLE_DEVICES="" TRITON_INTERPRET=1
  TESTS+=(-k "not random")
  TIMING+=(--dry-run --output "$BUILD/gpu_kernels.json")
fi
(cd "$BUILD" && "$PYTHON" "${TESTS[@]}")
if [ $TIMES = 1 ]; then
  "${TIMING[@]}"
fi
