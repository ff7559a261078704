"""Applies one row of a compaction plan to the cache of this rank. Knows tensors, not vLLM."""

from collections.abc import Callable, Sequence

import torch

from vllm_qfilters.kernels import compact, select_kept
from vllm_qfilters.kernels.reference import mean_standardised
from vllm_qfilters.plan import RequestCompaction
from vllm_qfilters.scorers import RecentQueries, ResidentTokens, Scorer


class Compactor:
    """Decides which tokens a sequence keeps, and compacts its pages.

    Args:
        scorer: of the cache of this rank.
        shared_by_heads: the heads of a layer keep the same tokens.
        mean_over_ranks: of a tensor, where other ranks hold heads of the same layers.
    """

    def __init__(
        self, scorer: Scorer, shared_by_heads: bool, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None
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
        scores = self.scorer.resident_scores(ResidentTokens(old_pages, row.resident_tokens, row.position, recent_queries))
        kept = row.resident_tokens - row.evicted_tokens
        if self.shared_by_heads and self.mean_over_ranks is not None:
            shared = self.mean_over_ranks(mean_standardised(scores, row.sinks, row.window))
            is_kept = select_kept(shared, kept, row.sinks, row.window, False).expand(scores.shape).contiguous()
        else:
            is_kept = select_kept(scores, kept, row.sinks, row.window, self.shared_by_heads)
        compact(self.scorer.cache, old_pages, new_pages, is_kept, row.sinks, row.window)
        return is_kept
