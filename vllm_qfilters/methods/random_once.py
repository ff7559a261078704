"""Uniform random eviction, drawn once per token."""

from vllm_qfilters.kernels.ops import TokenStat
from vllm_qfilters.methods.base import Method


class RandomOnce(Method):
    """Draws a number for each token when its key is written, from the bits of the key; the highest stay for good.

    It is the floor that every method must beat, and another policy than a fresh draw (``random``): the same sample of
    the past survives every cut. Cost: one number per key.
    """

    stat = TokenStat.RANDOM
