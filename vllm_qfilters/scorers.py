"""Scorers that run at the KV write: one score per key and KV head, higher = keep.

What needs no score at the write (``streaming``) has no scorer here.
"""

from collections.abc import Callable

import torch

Scorer = Callable[[torch.Tensor], torch.Tensor]
"""Maps keys after RoPE, shape ``[num_tokens, num_kv_heads, head_size]``, to scores ``[num_tokens, num_kv_heads]`` float32."""


class FilterScorer:
    """Q-Filters (arXiv 2503.02812, eq. 4): the projection of each key on the filter of its head.

    Args:
        filters: shape ``[num_kv_heads, head_size]``, pointing along the mean query.
    """

    def __init__(self, filters: torch.Tensor) -> None:
        self.filters = filters.to(torch.float32)

    def __call__(self, key: torch.Tensor) -> torch.Tensor:
        return (key.to(torch.float32) * self.filters).sum(-1)


class KeyNormScorer:
    """K-norm (arXiv 2406.11430): keys of small norm are attended to."""

    def __call__(self, key: torch.Tensor) -> torch.Tensor:
        return -key.to(torch.float32).norm(dim=-1)


class RandomScorer:
    """Uniform random scores, the same in every run with the same seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, key: torch.Tensor) -> torch.Tensor:
        return torch.rand(key.shape[:2], generator=self._generator)
