#!/usr/bin/env bash
# triton 3.7.1, torch 2.13.0 for CPUs, numpy 2.2.6.
#
# Kernels are tested without a GPU under TRITON_INTERPRET=1. There tensors of bfloat16 are held as 16-bit integers, and
# arithmetic takes their bits for numbers: no error, no warning. float16 and float32 are right. A cast to float32 is right
# too, so a kernel that casts what it loads before it computes can be tested.
#
# Seen, for 2 x 2, a sum of 16 twos and the product of a matrix of twos with the identity:
# float16 and float32: 4, 32, 2; bfloat16: 0, 0, 266338000 or so; bfloat16 cast to float32 first: 4, 32, 2.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" torch==2.13.0+cpu triton==3.7.1 numpy==2.2.6

cat > "$folder/compute.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def compute(twos_ptr, identity_ptr, result_ptr, CAST: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    twos, identity = tl.load(twos_ptr + at), tl.load(identity_ptr + at)
    if CAST:
        twos, identity = twos.to(tl.float32), identity.to(tl.float32)
    tl.store(result_ptr, tl.max(tl.max(twos * twos, axis=1), axis=0))
    tl.store(result_ptr + 1, tl.max(tl.sum(twos, axis=1), axis=0))
    tl.store(result_ptr + 2, tl.max(tl.max(tl.dot(twos, identity), axis=1), axis=0))


for dtype, cast in ((torch.float16, False), (torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
    result = torch.empty(3)
    compute[(1,)](torch.full((16, 16), 2.0, dtype=dtype), torch.eye(16, dtype=dtype), result, cast, 16)
    print(str(dtype).removeprefix("torch."), "cast" if cast else "", *(f"{value:g}" for value in result.tolist()))
PYTHON

seen=$(TRITON_INTERPRET=1 "$bin/python" "$folder/compute.py")
echo "triton 3.7.1, interpreted: $(tr '\n' ';' <<< "$seen")"
grep -q '^float16  4 32 2$' <<< "$seen" && grep -q '^float32  4 32 2$' <<< "$seen" &&
    grep -q '^bfloat16 cast 4 32 2$' <<< "$seen" && ! grep -q '^bfloat16  4 32 2$' <<< "$seen"
