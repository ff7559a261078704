"""Applies the evictions of a plan to the cache of this rank: some layers of all sequences at a time, so that it takes
little memory beside the cache. Knows tensors, not vLLM.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.ops import OBSERVATIONS_AT_ONCE, Cache
from vllm_qfilters.methods.base import Method, RecentQueries
from vllm_qfilters.plan import RequestCompaction
from vllm_qfilters.policy import DISTINCT_POOL

BYTES_AT_ONCE = 96 << 20  # that scores and what is made of them take, of as many layers as that allows


def layer_bytes(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    num_tokens: int,
    num_sequences: int,
    query_bytes: int,
) -> int:
    """Most memory that one layer of a cut takes on GPUs. Not of methods that score in plain PyTorch, nor of
    ``keydiff``, which are there for comparison.

    Args:
        num_heads: that a token is scored for.
        num_kv_heads, head_size: of this rank.
        num_tokens: of all sequences that are cut.
        num_sequences: that are cut.
        query_bytes: of the recent queries of one prompt, in a layer.
    """
    # Logits with the attention expected of them; or that, what was observed, and as much again twice while they are
    # mixed. And which tokens stay.
    of_token = 4 * max(num_heads + num_kv_heads, 5 * num_kv_heads) + num_kv_heads
    # Sums over tokens of each head, and what turns filters to the position of a sequence.
    of_sequence = 4 * (2 * num_heads + 2 * head_size)
    return num_tokens * of_token + num_sequences * of_sequence + (OBSERVATIONS_AT_ONCE + 1) * query_bytes


def workspace_bytes(
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    num_sequences: int,
    longest_sequence: int,
    cached_tokens: int,
    query_bytes: int,
) -> int:
    """Most memory that :class:`Compactor` takes at once on GPUs: ``BYTES_AT_ONCE``, as long as one layer of the longest
    sequence takes no more. For an 8B model (8 KV heads of 32) that is up to 590,000 tokens.

    Args:
        num_layers, num_heads, num_kv_heads, head_size, query_bytes: as of :func:`layer_bytes`.
        num_sequences: most that are cut in a step.
        longest_sequence: tokens it holds.
        cached_tokens: of all sequences.
    """
    shape = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, query_bytes=query_bytes)
    whole = num_layers * layer_bytes(num_tokens=cached_tokens, num_sequences=num_sequences, **shape)
    least = layer_bytes(num_tokens=longest_sequence, num_sequences=1, **shape)
    numbers_of_pages = 2 * cached_tokens
    return min(whole, max(least, BYTES_AT_ONCE)) + numbers_of_pages


class Compactor:
    """Decides which tokens the sequences keep, and compacts their pages: a few launches for any number of them.

    Args:
        method: scores the tokens in the cache of this rank.
        num_heads: of a layer that a token is scored for, the query heads if the method scores for each of them.
        shared_by_heads: the heads of a layer keep the same tokens.
        mean_over_ranks: the mean of a tensor over ranks that hold other heads of the same layers.
        mean_over_copies: the mean of a tensor over ranks that hold copies of the same KV heads.
        distinct_pool: neighbours whose values count with a token's own where values unlike the others are looked for.
        bytes_at_once: of scores and what is made of them; one layer of one sequence takes what it takes.
    """

    def __init__(
        self,
        method: Method,
        num_heads: int,
        shared_by_heads: bool,
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
        mean_over_copies: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
        distinct_pool: int = DISTINCT_POOL,
        bytes_at_once: int = BYTES_AT_ONCE,
    ) -> None:
        self.method = method
        self.cache = method.cache
        self.ops = method.ops
        self.num_heads = num_heads
        self.shared_by_heads = shared_by_heads
        self.mean_over_ranks = mean_over_ranks
        self.mean_over_copies = mean_over_copies
        self.distinct_pool = distinct_pool
        self.bytes_at_once = bytes_at_once

    def apply(
        self,
        compactions: Sequence[RequestCompaction],
        table_rows: Sequence[int],
        block_table: torch.Tensor,
        recent_queries: Sequence[RecentQueries | None],
        returns_kept: bool = False,
    ) -> list[torch.Tensor]:
        """Evicts what ``compactions`` ask for. Does not wait for the device.

        Args:
            compactions: one per sequence.
            table_rows: where each sequence stands in the block table.
            block_table: the pages before, int32; private copies are entered in it, pages taken out stay.
            recent_queries: of each sequence; None where none are kept.
            returns_kept: for who wants to see; it takes memory of the size of the sequences.

        Returns:
            Which tokens of each sequence stay, where that is wanted: bool or int8, shape ``[num_layers, num_kv_heads,
            resident_tokens]``, of one head where the heads share them.
        """
        kept: list[torch.Tensor] = []
        num_layers = self.cache.num_layers
        of_prompts = (recent.queries.nbytes for recent in recent_queries if recent is not None)
        query_bytes = max(of_prompts, default=0) // num_layers
        for part in self._parts(compactions, query_bytes):
            batch = CompactionBatch.make(compactions[part], table_rows[part], block_table)
            self.ops.copy_pages(self.cache, batch)
            by_layers = []
            needed = num_layers * self._layer_bytes(batch.num_tokens, batch.num_sequences, query_bytes)
            for layers in _equal_parts(num_layers, math.ceil(needed / self.bytes_at_once)):
                of_layers = [queries and queries.of_layers(layers) for queries in recent_queries[part]]
                is_kept = self._compact(self._method_of(layers), batch, of_layers)
                if returns_kept:
                    by_layers.append(batch.split(is_kept, layers.stop - layers.start, self._num_selections))
                del is_kept  # before the next layers take its place
            kept += [torch.cat(of_sequence) for of_sequence in zip(*by_layers, strict=True)]
        return kept

    def _parts(self, compactions: Sequence[RequestCompaction], query_bytes: int) -> Iterator[slice]:
        """Yields those that are compacted at once: almost always all of them.

        There is no room for the scores of any number of tokens, not even of one layer. And sequences write what their
        queries observe beside all their tokens, in the pages taken out too, before the survivors move: two that take
        out the same page would move each other's.
        """
        first, num_tokens = 0, 0
        shared: set[int] = set()
        for index, compaction in enumerate(compactions):
            num_sequences, with_it = index + 1 - first, num_tokens + compaction.resident_tokens
            is_full = self._layer_bytes(with_it, num_sequences, query_bytes) > self.bytes_at_once
            if index > first and (is_full or not shared.isdisjoint(compaction.shared_pages_out)):
                yield slice(first, index)
                first, num_tokens, shared = index, 0, set()
            num_tokens += compaction.resident_tokens
            shared.update(compaction.shared_pages_out)
        yield slice(first, len(compactions))

    def _layer_bytes(self, num_tokens: int, num_sequences: int, query_bytes: int) -> int:
        return layer_bytes(
            num_heads=self.num_heads,
            num_kv_heads=self.cache.num_kv_heads,
            head_size=self.cache.head_size,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            query_bytes=query_bytes,
        )

    def _method_of(self, layers: slice) -> Method:
        if layers == slice(0, self.cache.num_layers):
            return self.method
        return self.method.of_layers(layers)

    @property
    def _num_selections(self) -> int:
        """Heads that choose what they keep."""
        return 1 if self.shared_by_heads else self.cache.num_kv_heads

    def _compact(
        self, method: Method, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]
    ) -> torch.Tensor:
        cache, num_layers, num_heads = method.cache, method.cache.num_layers, self._num_selections
        scores = self._ranked_by(self.mean_over_copies(method.scores(batch, recent_queries)), cache, batch)
        if batch.has_distinct_tokens:
            best = self.ops.select_kept(scores, batch.evicting_distinct_tokens(), num_layers, num_heads)
            of_heads = self.ops.distinctness(cache, batch, of_values=True, pool=self.distinct_pool)
            distinctness = self._ranked_by(of_heads, cache, batch)
            scores = distinctness.masked_fill_(best.bool(), math.inf)
        is_kept = self.ops.select_kept(scores, batch, num_layers, num_heads)
        del scores
        self.ops.compact(cache, batch, is_kept, num_heads)
        return is_kept

    def _ranked_by(self, values: torch.Tensor, cache: Cache, batch: CompactionBatch) -> torch.Tensor:
        """What tokens are ranked by: ``values`` of each KV head, or their mean over all heads of a layer, on all
        ranks.
        """
        if not self.shared_by_heads:
            return values
        shared = self.ops.mean_standardised(values, batch, cache.num_layers, cache.num_kv_heads)
        return self.mean_over_ranks(shared)

    def warm_up(self, recent_queries: RecentQueries | None = None) -> None:
        """Compiles the kernels, on vLLM's null page, which nobody reads.

        Args:
            recent_queries: of a sequence that has read its prompt, where any are kept.
        """
        bs = self.cache.block_size
        num_pages = 1 + math.ceil((1 if recent_queries is None else recent_queries.queries.shape[2]) / bs)
        block_table = torch.zeros(1, num_pages, dtype=torch.int32, device=self.cache.planes.device)
        num_tokens, pages_after = num_pages * bs, (0,) * (num_pages - 1)
        null = RequestCompaction("", num_tokens, num_tokens, bs, 0, 0, pages_after, ((0, 0),))
        recent_queries = recent_queries and dataclasses.replace(recent_queries, end=num_tokens)
        self.apply([null], [0], block_table, [recent_queries])
        self.apply([dataclasses.replace(null, distinct_tokens=1)], [0], block_table, [None])


def _equal_parts(length: int, count: int) -> Iterator[slice]:
    """Yields ``count`` parts of ``length`` things, but not more than there are things."""
    count = min(count, length)
    for part in range(count):
        yield slice(part * length // count, (part + 1) * length // count)
