"""Uniform random eviction, drawn anew (Random Attention, 2026, arXiv 2609.03430)."""

from collections.abc import Sequence

import torch

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.methods.base import Method, RecentQueries


class Random(Method):
    """Draws the tokens that stay anew at every cut: a token survives n cuts with probability p^n, a soft recency
    window.

    The numbers follow from the position of the cut, so that a prompt is cut alike however it was scheduled, and ranks
    agree. They are drawn on the host, for CPUs and GPUs to evict the same. Cost: one number per layer, head and token.
    """

    def scores(self, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]) -> torch.Tensor:
        layers = slice(self.first_layer, self.first_layer + self.cache.num_layers)
        num_layers, num_heads = self.model.cache.num_layers, self.cache.num_kv_heads
        drawn = []
        for compaction in batch.compactions:
            generator = torch.Generator().manual_seed(compaction.position)
            of_model = torch.rand(num_layers, num_heads * compaction.resident_tokens, generator=generator)
            drawn.append(of_model[layers].flatten())
        on_host = torch.cat(drawn)
        if self.model.device.type == "cuda":
            on_host = on_host.pin_memory()
        return on_host.to(self.model.device, non_blocking=True)
