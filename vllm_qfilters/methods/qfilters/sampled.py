"""Q-Filters, drawn by lot: the attention expected of a token is how likely it stays."""

from collections.abc import Sequence

import torch

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.methods.base import RecentQueries
from vllm_qfilters.methods.qfilters.expected import ExpectedAttention
from vllm_qfilters.methods.random import draw

_LEAST = 1e-30  # of a score that is drawn from: its logarithm is finite


class SampledAttention(ExpectedAttention):
    """Draws the tokens that stay, without replacement, in proportion to the scores of ``expected``.

    Gumbel noise on the logarithm of scores makes the highest such a sample (Kool et al. 2019, arXiv 1903.06059). It is
    drawn anew at every cut, so that what scores alike, as a text that repeats itself does, does not stay as a whole.

    Cost: that of ``expected``, and one number per layer, head and token.
    """

    def scores(self, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]) -> torch.Tensor:
        scores = super().scores(batch, recent_queries).clamp_(min=_LEAST).log_()
        uniform = draw(self, batch, is_shared=self.model.shared_by_heads).clamp_(min=_LEAST)
        return scores.sub_(uniform.log_().neg_().clamp_(min=_LEAST).log_())
