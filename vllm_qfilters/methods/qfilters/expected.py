"""Q-Filters with the covariance of the queries, and with what a prompt's last queries look at: the default."""

from collections.abc import Sequence
from typing import Self

import torch

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.ops import Observation
from vllm_qfilters.methods.base import Method, Model, RecentQueries


class ExpectedAttention(Method):
    """Keeps tokens that are expected to add most to the output of attention: attention times the norm of the value.

    The attention is expected from mean and covariance of the queries before RoPE, turned to the coming positions
    (Q-Filters' fixed statistics in the estimate of ExpectedAttention, arXiv 2510.00636). For tokens of a prompt it is
    mixed with the attention the prompt's last queries pay: what they pay on the whole, a sample of the queries to come,
    which stays beside the tokens from then on. In the first eviction after the prompt they are its question: there it
    is mixed with the most that any of them pays, so that what is asked for stays although few of them look at it.

    Cost: one read of the cached keys and values per cut, two more of keys when a prompt's queries are observed.
    """

    MEAN_POOL = 7  # neighbours that attention is averaged over
    # Tokens before and behind one that a question looks at which stay with it. To find what comes next, heads look at
    # the words before it; numbers have a token for each digit.
    PEAK_REACH = (6, 12)

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.bank = model.filter_bank().to(model.device)
        self.observes = self.cache.planes.shape[2] > 0

    def of_layers(self, layers: slice) -> Self:
        part = super().of_layers(layers)
        part.bank = self.bank.of_layers(layers)
        return part

    def scores(self, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]) -> torch.Tensor:
        bank = self.bank
        attention = self.ops.expected_attention(
            self.cache, batch, bank.means, bank.factors, bank.turns(batch.positions), self.model.softmax
        )
        if self.observes and (batch.has_observed_tokens or any(recent is not None for recent in recent_queries)):
            attention = mix_in_observed(attention, self._observed(batch, recent_queries))
        return attention * self.ops.value_norms(self.cache, batch)

    def _observed(self, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]) -> torch.Tensor:
        """Reads what was observed, and observes what comes from prompts: once per prompt and cut."""
        observations = [
            Observation(
                index,
                recent.queries,
                num_newer=compaction.position - recent.end,
                is_question=recent.have_read_prompt_at(compaction.position),
            )
            for index, (compaction, recent) in enumerate(zip(batch.compactions, recent_queries, strict=True))
            if recent is not None
        ]
        return self.ops.observe(
            self.cache,
            batch,
            observations,
            self.cache.scores,
            self.model.softmax,
            self.MEAN_POOL,
            self.PEAK_REACH,
            self.model.shared_by_heads,
            self.model.max_over_ranks,
        )


def mix_in_observed(expected: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """The mean of both, or what is expected where nothing was observed, as of generated tokens. Of any one shape."""
    return torch.where(observed < 0, expected, expected.lerp(observed, 0.5))
