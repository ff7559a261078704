"""What a token is worth to the queries to come: higher = keep.

A scorer looks twice. :meth:`Scorer.write` sees every key and value as it is stored, and leaves numbers beside it in the
planes of the cache; :meth:`Scorer.resident_scores` makes scores of them, and of the cached keys where it needs those,
when a sequence is about to be compacted.
"""

import dataclasses
from collections.abc import Callable

import torch

from vllm_qfilters.filters.bank import FilterBank
from vllm_qfilters.kernels import (
    PagedCache,
    expected_attention,
    key_distinctness,
    observed_attention,
    score_and_store,
    store_value_norms,
    write_scores,
)

DISTINCT_POOL = (
    7  # neighbours whose keys count with a token's own: what stands out are words and numbers of several tokens
)


@dataclasses.dataclass(frozen=True)
class RecentQueries:
    """The last queries of a prompt.

    Attributes:
        queries: after RoPE, shape ``[num_layers, num_heads, num_queries, head_size]``.
        end: the position after the last one.
        num_prompt_tokens: of the whole prompt, which may not have been read to its end.
    """

    queries: torch.Tensor
    end: int
    num_prompt_tokens: int

    def have_read_prompt_at(self, position: int) -> bool:
        """Whether a sequence that stands at ``position`` has read its prompt, so that these queries are what it asks
        for.
        """
        return position >= self.num_prompt_tokens

    def last(self, count: int) -> "RecentQueries":
        """At most the last ``count`` of them."""
        return dataclasses.replace(self, queries=self.queries[:, :, -count:])


@dataclasses.dataclass(frozen=True)
class ResidentTokens:
    """A sequence about to be compacted.

    Attributes:
        pages: it holds, shape ``[num_pages]``, int64.
        num_tokens: it holds.
        position: of its next token.
        recent_queries: of its prompt; None after its first eviction behind the prompt.
        is_observed: queries of its prompt look at it now or did before. Until they do, what other sequences observed
            may stand beside tokens whose pages they shared.
    """

    pages: torch.Tensor
    num_tokens: int
    position: int
    recent_queries: RecentQueries | None = None
    is_observed: bool = True


class Scorer:
    """Goes by the scores in the first plane, which subclasses write."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Leaves numbers beside the keys and values of a step.

        Args:
            layer: index of the attention layer.
            key: after RoPE, shape ``[num_tokens, num_kv_heads, head_size]``; tokens beyond ``slot_mapping`` are
                padding.
            value: of the same shape.
            slot_mapping: shape ``[num_tokens]``, int64: ``page * block_size + slot``, -1 for padding.
        """

    def resident_scores(self, tokens: ResidentTokens) -> torch.Tensor:
        """float32, shape ``[num_layers, num_kv_heads, num_tokens]``."""
        return self.cache.resident_plane(0, tokens.pages, tokens.num_tokens)


class StaticFilterScorer(Scorer):
    """Q-Filters (arXiv 2503.02812, eq. 4): the projection of each key on the filter of its head.

    Args:
        filters: shape ``[num_layers, num_kv_heads, head_size]``, pointing along the mean query.
    """

    def __init__(self, cache: PagedCache, filters: torch.Tensor) -> None:
        super().__init__(cache)
        self.filters = filters.to(torch.float32).contiguous()

    def write(self, layer, key, value, slot_mapping):
        score_and_store(key, self.filters[layer], self.cache.scores[layer], slot_mapping)


class KeyNormScorer(Scorer):
    """K-norm (arXiv 2406.11430): keys of small norm are attended to."""

    def write(self, layer, key, value, slot_mapping):
        write_scores(-key.to(torch.float32).norm(dim=-1), self.cache.scores[layer], slot_mapping)


class RandomScorer(Scorer):
    """Uniform random scores, the same in every run."""

    def __init__(self, cache: PagedCache) -> None:
        super().__init__(cache)
        self._generators = [torch.Generator().manual_seed(layer) for layer in range(cache.num_layers)]

    def write(self, layer, key, value, slot_mapping):
        scores = torch.rand(key.shape[:2], generator=self._generators[layer])
        write_scores(scores, self.cache.scores[layer], slot_mapping)


class KeyDiffScorer(Scorer):
    """KeyDiff (arXiv 2504.15364): keys unlike the mean direction of the sequence's keys stay."""

    def resident_scores(self, tokens):
        return key_distinctness(self.cache, tokens.pages, tokens.num_tokens, pool=1)


class RotaryFilterScorer(Scorer):
    """The projection of each key on the mean query of its head before RoPE, turned to the coming positions.

    Args:
        bank: of this rank, of rank 0.
    """

    def __init__(self, cache: PagedCache, bank: FilterBank) -> None:
        super().__init__(cache)
        self.bank = bank

    def resident_scores(self, tokens):
        means, _ = self.bank.at(tokens.position)
        filters = means.unflatten(1, (self.cache.num_kv_heads, -1)).mean(2)  # [num_layers, num_kv_heads, head_size]
        return torch.stack(
            [
                (self.cache.resident_keys(layer, tokens.pages, tokens.num_tokens) @ head_filters.unsqueeze(-1)).squeeze(
                    -1
                )
                for layer, head_filters in enumerate(filters)
            ]
        )


def mix_in_observed(expected: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """The mean of both; what is expected where nothing was observed, as of generated tokens. Of any one shape."""
    return torch.where(observed < 0, expected, expected.lerp(observed, 0.5))


class ExpectedAttentionScorer(Scorer):
    """What a token is expected to add to the attention output of the coming queries: attention times the norm of its
    value.

    The attention is expected from the queries' statistics before RoPE, turned to the coming positions (Q-Filters' fixed
    statistics in the estimate of ExpectedAttention, arXiv 2510.00636). For tokens of a prompt it is mixed with the
    attention the prompt's last queries pay: what they pay on the whole, a sample of the queries to come, which stays
    beside the tokens from then on. In the first eviction after the prompt they are its question: there it is mixed with
    the most that any of them pays, so that what is asked for stays although few of them look at it.

    Args:
        cache: with a second plane if the last queries of prompts are kept.
        bank: of this rank.
        scale: of the attention's logits.
        shared_by_heads: what one head is asked for, all heads of its layer keep.
        max_over_ranks: of a tensor, over ranks that hold other heads of the same layers.
    """

    VALUE_NORMS, OBSERVED = 0, 1  # planes
    MEAN_POOL = 7  # neighbours that attention is averaged over
    PEAK_POOL = (
        13  # neighbours that stay with a token: words and numbers of several tokens are looked at by their first
    )

    def __init__(
        self,
        cache: PagedCache,
        bank: FilterBank,
        scale: float,
        shared_by_heads: bool,
        max_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:
        super().__init__(cache)
        self.bank = bank
        self.scale = scale
        self.shared_by_heads = shared_by_heads
        self.max_over_ranks = max_over_ranks
        self.observes = cache.planes.shape[2] > 1

    def write(self, layer, key, value, slot_mapping):
        store_value_norms(value, self.cache.planes[layer], slot_mapping)

    def resident_scores(self, tokens):
        attention = expected_attention(self.cache, tokens.pages, tokens.num_tokens, *self.bank.at(tokens.position))
        if self.observes and tokens.is_observed:
            attention = mix_in_observed(attention, self._observed(tokens))
        return attention * self.cache.resident_plane(self.VALUE_NORMS, tokens.pages, tokens.num_tokens)

    def _observed(self, tokens: ResidentTokens) -> torch.Tensor:
        plane = self.cache.resident_plane(self.OBSERVED, tokens.pages, tokens.num_tokens)
        recent = tokens.recent_queries
        if recent is None:
            return plane
        queries = self.scale * recent.queries.to(torch.float32)
        num_newer = tokens.position - recent.end
        mean, peak = observed_attention(
            self.cache, tokens.pages, tokens.num_tokens, queries, num_newer, self.MEAN_POOL, self.PEAK_POOL
        )
        self.cache.set_resident_plane(self.OBSERVED, tokens.pages, mean)
        if not recent.have_read_prompt_at(tokens.position):
            return mean
        return self.max_over_ranks(peak.amax(1, keepdim=True)).expand_as(peak) if self.shared_by_heads else peak
