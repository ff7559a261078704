"""Scorers that run at the KV write: one score per key and KV head, higher = keep.

What needs no score at the write (``streaming``) has no scorer here.
"""

from typing import Protocol

import torch

from vllm_qfilters.kernels import score_and_store, write_scores


class Scorer(Protocol):
    def store(self, key: torch.Tensor, score_plane: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Scores the keys of a step and stores the scores beside them.

        Args:
            key: keys after RoPE, shape ``[num_tokens, num_kv_heads, head_size]``; tokens beyond ``slot_mapping`` are padding.
            score_plane: shape ``[num_blocks, num_kv_heads, block_size]``, float32; written in place.
            slot_mapping: shape ``[num_tokens]``, int64: ``page * block_size + slot``, -1 for padding.
        """


class FilterScorer:
    """Q-Filters (arXiv 2503.02812, eq. 4): the projection of each key on the filter of its head.

    Args:
        filters: shape ``[num_kv_heads, head_size]``, pointing along the mean query.
    """

    def __init__(self, filters: torch.Tensor) -> None:
        self.filters = filters.to(torch.float32).contiguous()

    def store(self, key: torch.Tensor, score_plane: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        score_and_store(key, self.filters, score_plane, slot_mapping)


class KeyNormScorer:
    """K-norm (arXiv 2406.11430): keys of small norm are attended to."""

    def store(self, key: torch.Tensor, score_plane: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        write_scores(-key.to(torch.float32).norm(dim=-1), score_plane, slot_mapping)


class RandomScorer:
    """Uniform random scores, the same in every run with the same seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def store(self, key: torch.Tensor, score_plane: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        write_scores(torch.rand(key.shape[:2], generator=self._generator), score_plane, slot_mapping)
