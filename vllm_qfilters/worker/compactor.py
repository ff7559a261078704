"""Applies one row of a compaction plan to the cache of this rank. Knows tensors, not vLLM."""

from collections.abc import Sequence

import torch

from vllm_qfilters.kernels import compact, select_kept
from vllm_qfilters.plan import RequestCompaction
from vllm_qfilters.scorers import RecentQueries, ResidentTokens, Scorer


class Compactor:
    """Decides which tokens a sequence keeps, and compacts its pages.

    Args:
        scorer: of the cache of this rank.
        shared_by_heads: the heads of a layer keep the same tokens.
    """

    def __init__(self, scorer: Scorer, shared_by_heads: bool) -> None:
        self.scorer = scorer
        self.shared_by_heads = shared_by_heads

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
        is_kept = select_kept(scores, kept, row.sinks, row.window, self.shared_by_heads)
        compact(self.scorer.cache, old_pages, new_pages, is_kept, row.sinks, row.window)
        return is_kept
