"""Applies one row of a compaction plan to the cache of this rank. Knows tensors, not vLLM."""

import math
from collections.abc import Callable, Sequence

import torch

from vllm_qfilters.kernels import compact, key_distinctness, select_kept
from vllm_qfilters.kernels.reference import mean_standardised
from vllm_qfilters.plan import RequestCompaction
from vllm_qfilters.scorers import DISTINCT_POOL, RecentQueries, ResidentTokens, Scorer


class Compactor:
    """Decides which tokens a sequence keeps, and compacts its pages.

    Args:
        scorer: of the cache of this rank.
        shared_by_heads: the heads of a layer keep the same tokens.
        mean_over_ranks: of a tensor, where other ranks hold heads of the same layers.
    """

    def __init__(
        self,
        scorer: Scorer,
        shared_by_heads: bool,
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.scorer = scorer
        self.shared_by_heads = shared_by_heads
        self.mean_over_ranks = mean_over_ranks

    def compact(
        self, old_block_ids: Sequence[int], row: RequestCompaction, recent_queries: RecentQueries | None = None
    ) -> torch.Tensor:
        """Evicts what ``row`` asks for from the sequence that holds the pages ``old_block_ids``.

        Returns:
            Which of its tokens stay: bool, shape ``[num_layers, num_kv_heads, resident_tokens]``.
        """
        old_pages = torch.tensor(old_block_ids, dtype=torch.int64)
        new_pages = torch.tensor(row.block_ids, dtype=torch.int64)
        is_observed = not row.distinct_tokens
        tokens = ResidentTokens(old_pages, row.resident_tokens, row.position, recent_queries, is_observed)
        scores = self.scorer.resident_scores(tokens)
        is_kept = self._select(scores, row, row.resident_tokens - row.evicted_tokens - row.distinct_tokens)
        if row.distinct_tokens:
            distinctness = key_distinctness(self.scorer.cache, old_pages, row.resident_tokens, DISTINCT_POOL)
            is_kept = self._select(distinctness, row, row.resident_tokens - row.evicted_tokens, is_kept)
        compact(self.scorer.cache, old_pages, new_pages, is_kept, row.sinks, row.window)
        return is_kept

    def _select(
        self, scores: torch.Tensor, row: RequestCompaction, kept: int, stays: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The best ``kept`` tokens by ``scores``, ``stays`` among them; all of one shape."""
        if self.shared_by_heads and (self.mean_over_ranks is not None or stays is not None):
            shared = mean_standardised(scores, row.sinks, row.window)
            if self.mean_over_ranks is not None:
                shared = self.mean_over_ranks(shared)
            if stays is not None:
                shared = shared.masked_fill(stays[:, :1], math.inf)
            return select_kept(shared, kept, row.sinks, row.window, False).expand(scores.shape).contiguous()
        if stays is not None:
            scores = scores.masked_fill(stays, math.inf)
        return select_kept(scores, kept, row.sinks, row.window, self.shared_by_heads)
