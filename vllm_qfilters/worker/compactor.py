"""Applies one row of a compaction plan to the cache of this rank. Knows tensors, not vLLM."""

from collections.abc import Sequence

import torch

from vllm_qfilters.kernels import PagedCache, compact, select_kept
from vllm_qfilters.plan import RequestCompaction


class Compactor:
    """Decides from the scores which tokens a sequence keeps, and compacts its pages.

    Args:
        cache: of this rank.
        shared_by_heads: the heads of a layer keep the same tokens.
    """

    def __init__(self, cache: PagedCache, shared_by_heads: bool) -> None:
        self.cache = cache
        self.shared_by_heads = shared_by_heads

    def compact(self, old_block_ids: Sequence[int], row: RequestCompaction) -> None:
        """Evicts what ``row`` asks for from the sequence that holds the pages ``old_block_ids``."""
        old_pages = torch.tensor(old_block_ids, dtype=torch.int64)
        new_pages = torch.tensor(row.block_ids, dtype=torch.int64)
        scores = self.resident_scores(old_pages, row.resident_tokens)
        kept = row.resident_tokens - row.evicted_tokens
        is_kept = select_kept(scores, kept, row.sinks, row.window, self.shared_by_heads)
        compact(self.cache, old_pages, new_pages, is_kept, row.sinks, row.window)

    def resident_scores(self, pages: torch.Tensor, resident_tokens: int) -> torch.Tensor:
        """Scores of a sequence's tokens, shape ``[num_layers, num_kv_heads, resident_tokens]``."""
        scores = self.cache.scores[:, pages]  # [num_layers, num_pages, num_kv_heads, block_size]
        return scores.permute(0, 2, 1, 3).flatten(2)[..., :resident_tokens]
