#!/usr/bin/env bash
# triton 3.7.1, torch 2.13.0 for CPUs, numpy 2.2.6.
#
# A kernel computes in float32 and stores what the cache holds: bfloat16 or float8. On a GPU that rounds to the nearest.
# Under TRITON_INTERPRET=1 a cast to bfloat16 cuts, so that all numbers move towards 0; one to float8 rounds the bits of
# the mantissa and loses the carry: what should become a power of two becomes half of it. 1.975 is 1 in float8. A cast to
# float16 is right, and so is a test of such a kernel whose numbers are exact in the narrower type.
#
# Seen: 1.975 in float16, bfloat16, float8 (e4m3, e5m2): 1.9746, 1.9688, 1, 1, where PyTorch has 1.9746, 1.9766, 2, 2; and
# of 4,096 normal numbers none, half, a thirtieth and a twentieth differ from PyTorch's.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" torch==2.13.0+cpu triton==3.7.1 numpy==2.2.6

cat > "$folder/round.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def narrow(numbers_ptr, result_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(result_ptr + at, tl.load(numbers_ptr + at).to(result_ptr.dtype.element_ty))


numbers = torch.randn(4096, generator=torch.Generator().manual_seed(0))
numbers[0] = 1.975
for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
    result = torch.empty(4096, dtype=dtype)
    narrow[(1,)](numbers, result, 4096)
    found, rounded = result.float(), numbers.to(dtype).float()
    share = (found != rounded).float().mean().item()
    print(str(dtype).removeprefix("torch."), f"{found[0]:.5g} {rounded[0]:.5g} {share:.2f}")
PYTHON

found=$(TRITON_INTERPRET=1 "$bin/python" "$folder/round.py")
echo "triton 3.7.1, interpreted: 1.975, the same of PyTorch, and the share of numbers that differ:"
echo "$found"
[ "$(cut -d' ' -f1-3 <<< "$found")" = "float16 1.9746 1.9746
bfloat16 1.9688 1.9766
float8_e4m3fn 1 2
float8_e5m2 1 2" ] && [ "$(cut -d' ' -f4 <<< "$found" | grep -c '^0.00$')" = 1 ]
