#!/usr/bin/env bash
# Checks on this machine's GPU all that other machines cannot show, in at most ten minutes: see benchmarks/gpu_all.py, or --help.
# Needs vLLM, and this checkout on PYTHONPATH or installed. Results go to benchmarks/results/gpu_all.json.
#
#   PYTHON=.venv/bin/python scripts/gpu_all.sh [--dry-run]
#
# --dry-run: small, on whatever vLLM runs on here, some ten minutes; its numbers mean nothing, and go to build/gpu_all/.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath --no-symlinks "$(command -v "${PYTHON:-.venv/bin/python}")")
case " $* " in
  *" --help "* | *" -h "*) ;;
  *" --dry-run "*)
    export CUDA_VISIBLE_DEVICES="" VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_CI_ENV=1 ;;  # one process per engine, no warm-up
  *)
    if ! "$PYTHON" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
      echo "PyTorch sees no GPU: use --dry-run"
      exit 1
    fi ;;
esac
export PYTHON PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m benchmarks.gpu_all "$@"
