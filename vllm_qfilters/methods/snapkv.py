"""SnapKV (Li et al. 2024, arXiv 2404.14469)."""

from collections.abc import Sequence

import torch

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.ops import Observation
from vllm_qfilters.methods.base import Method, RecentQueries


class SnapKV(Method):
    """Keeps what the last 32 queries attend to, averaged over them and over 7 neighbouring tokens.

    The paper cuts prompts alone. Here every cut goes by the last queries before it, generated tokens among them (in
    comparisons often called SnapKV-D). Cost: the queries of all running sequences are kept, and each cut reads the
    cached keys twice; a full CUDA graph would hide the queries, so it is refused.
    """

    POOL = 7  # neighbours, the kernel size of the paper's experiments

    def scores(self, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]) -> torch.Tensor:
        observations = [
            Observation(index, recent.queries, num_newer=compaction.position - recent.end)
            for index, (compaction, recent) in enumerate(zip(batch.compactions, recent_queries, strict=True))
            if recent is not None
        ]
        return self.ops.observe(
            self.cache,
            batch,
            observations,
            self.cache.scores,
            self.model.softmax,
            self.POOL,
            (0, 0),
            False,
            lambda peak: peak,
        )
