"""KeyDiff (Park et al. 2025, arXiv 2504.15364)."""

from collections.abc import Sequence

import torch

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.methods.base import Method, RecentQueries


class KeyDiff(Method):
    """Keeps keys that are unlike the mean direction of the sequence's keys.

    Cost: two reads of the cached keys per cut.
    """

    def scores(self, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]) -> torch.Tensor:
        return self.ops.distinctness(self.cache, batch, of_values=False, pool=1)
