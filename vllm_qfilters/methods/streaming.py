"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453)."""

from collections.abc import Sequence

import torch

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.methods.base import Method, RecentQueries


class Streaming(Method):
    """Keeps the first tokens, the attention sinks, and the most recent ones.

    Nothing is scored: the scheduler makes the window as long as the budget allows, so that no choice is left. Cost:
    none.
    """

    def scores(self, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]) -> torch.Tensor:
        num_rows = self.cache.num_layers * self.cache.num_kv_heads
        return torch.zeros(num_rows * batch.num_tokens, device=self.model.device)
