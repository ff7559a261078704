"""Q-Filters that follow the position."""

from collections.abc import Sequence
from typing import Self

import torch

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.methods.base import Method, Model, RecentQueries


class RotaryFilter(Method):
    """Keeps keys of large projection on the mean query of their head before RoPE, turned to the coming positions.

    The mean query before RoPE is the same at all positions, that after RoPE is not. Cost: one read of the cached keys
    per cut.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.bank = model.filter_bank().to(model.device)
        by_kv_head = self.bank.means.unflatten(1, (self.cache.num_kv_heads, -1))
        sizes = model.softmax.group_sizes
        group = by_kv_head.shape[2] if sizes is None else sizes.view(-1, 1, 1)
        self.mean_of_group = (by_kv_head.sum(2) / group).contiguous()  # [num_layers, num_kv_heads, head_size]

    def of_layers(self, layers: slice) -> Self:
        part = super().of_layers(layers)
        part.bank, part.mean_of_group = self.bank.of_layers(layers), self.mean_of_group[layers]
        return part

    def scores(self, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]) -> torch.Tensor:
        return self.ops.project(self.cache, batch, self.mean_of_group, self.bank.turns(batch.positions))
