"""How kernels multiply vectors with many cached keys: on tensor cores, about as exact as in float32.

Keys in bfloat16 or fp8 are multiplied as bfloat16, which holds them exactly. A float32 vector is then the sum of two
bfloat16 ones, up to 2^-17 of it: two products. Keys in float16 or float32 are multiplied as float32, in three products
of TF32.
"""

import torch
import triton
import triton.language as tl

SMALLEST = 16  # tensor cores multiply no smaller tiles


def operand_dtype(key_dtype: torch.dtype) -> tl.dtype:
    """What keys of a cache are multiplied as."""
    # Triton 3.7's interpreter multiplies the bits of bfloat16 as integers: float32 holds the same numbers.
    return tl.bfloat16 if is_narrow(key_dtype) and not triton.knobs.runtime.interpret else tl.float32


def is_narrow(key_dtype: torch.dtype) -> bool:
    """Whether bfloat16 holds all keys of this dtype."""
    return key_dtype == torch.bfloat16 or key_dtype.itemsize == 1


def dims_at_once(key_dtype: torch.dtype) -> int:
    """How many dimensions are multiplied at once: 64 bytes of each key as an operand."""
    return 32 if is_narrow(key_dtype) else 16


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def capped(logits, SOFT_CAP: tl.constexpr):
    """``c tanh(x / c)`` of logits x; a soft cap c of 0: x."""
    if SOFT_CAP != 0:
        logits = SOFT_CAP * tanh(logits / SOFT_CAP)
    return logits


@triton.jit
def split(vectors):
    """float32 vectors as the sum of two that bfloat16 holds."""
    high = vectors.to(tl.bfloat16)
    return high, (vectors - high.to(tl.float32)).to(tl.bfloat16)
