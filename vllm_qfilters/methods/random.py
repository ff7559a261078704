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
        return draw(self, batch, is_shared=False)


def draw(method: Method, batch: CompactionBatch, is_shared: bool) -> torch.Tensor:
    """Draws a number in [0, 1) for each layer, KV head and resident token, anew at every position.

    Args:
        method: whose layers the numbers are for.
        batch: the sequences.
        is_shared: the heads of a layer get the same number.

    Returns:
        float32, flat, as :meth:`.base.Method.scores` returns.
    """
    layers = slice(method.first_layer, method.first_layer + method.cache.num_layers)
    num_layers, num_heads = method.model.cache.num_layers, method.cache.num_kv_heads
    drawn = []
    for compaction in batch.compactions:
        generator = torch.Generator().manual_seed(compaction.position)
        shape = (num_layers, 1 if is_shared else num_heads, compaction.resident_tokens)
        of_model = torch.rand(shape, generator=generator)
        drawn.append(of_model[layers].expand(-1, num_heads, -1).flatten())
    on_host = torch.cat(drawn)
    if method.model.device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(method.model.device, non_blocking=True)
