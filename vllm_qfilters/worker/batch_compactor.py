"""Applies a whole compaction plan to the cache of this rank at once. Knows tensors, not vLLM."""

from collections.abc import Sequence

import torch

from vllm_qfilters.kernels.batch import Compaction, CompactionBatch
from vllm_qfilters.kernels.compaction import compact
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.selection import gather_scores, mean_standardised, select_kept


class BatchCompactor:
    """Decides from the scores which tokens the sequences keep, and compacts their pages: a few launches for any number of them.

    Args:
        cache: of this rank.
        shared_by_heads: the heads of a layer keep the same tokens.
    """

    def __init__(self, cache: StridedCache, shared_by_heads: bool) -> None:
        self.cache = cache
        self.shared_by_heads = shared_by_heads

    def compact(self, compactions: Sequence[Compaction], block_table: torch.Tensor) -> None:
        """Evicts what ``compactions`` ask for; ``block_table`` is as it was before, int32. Does not wait for the device."""
        num_layers, num_heads = self.cache.num_layers, self.cache.num_kv_heads
        batch = CompactionBatch.make(compactions, block_table)
        scores = gather_scores(self.cache.scores, batch)
        if self.shared_by_heads:
            scores, num_heads = mean_standardised(scores, batch, num_layers, num_heads), 1
        compact(self.cache, batch, select_kept(scores, batch, num_layers, num_heads), num_heads)

    def warm_up(self) -> None:
        """Compiles the kernels, on vLLM's null page, which nobody reads."""
        bs = self.cache.block_size
        block_table = torch.zeros(1, 2, dtype=torch.int32, device=self.cache.rows.device)
        self.compact([Compaction(0, 2 * bs, bs, 0, 0, [0], [(0, 0)])], block_table)
