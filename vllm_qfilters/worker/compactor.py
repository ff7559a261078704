"""Applies the evictions of a plan to the cache of this rank. Knows tensors, not vLLM."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.ops import OBSERVATIONS_AT_ONCE
from vllm_qfilters.methods.base import Method, RecentQueries
from vllm_qfilters.plan import RequestCompaction

DISTINCT_POOL = (
    7  # neighbours whose keys count with a token's own: what stands out are words and numbers of several tokens
)
SCORES_AT_ONCE = (
    1 << 26
)  # float32, of all layers and query heads: 256 MiB; with what is made of them see workspace_bytes


def workspace_bytes(
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    num_sequences: int,
    longest_sequence: int,
    cached_tokens: int,
    prompt_bytes: int,
) -> int:
    """Most memory that :class:`Compactor` takes at once on GPUs. Not of methods that score in plain PyTorch, nor of
    ``keydiff``, which are there for comparison.

    Args:
        num_layers, num_kv_heads, head_size: of this rank.
        num_heads: of a layer that a token is scored for.
        num_sequences: most of them.
        longest_sequence: tokens it holds; more than ``SCORES_AT_ONCE`` allow are compacted at once if they are of one
            sequence.
        cached_tokens: of all sequences.
        prompt_bytes: of the recent queries of one prompt.
    """
    tokens = max(SCORES_AT_ONCE // (num_layers * num_heads), longest_sequence)
    # Logits with the attention expected of them; or that, what was observed, and as much again twice while they are
    # mixed.
    scores = 4 * num_layers * max(num_heads + num_kv_heads, 5 * num_kv_heads) * tokens
    # Which tokens stay, of each head, and the numbers of their pages.
    kept = (num_layers * num_kv_heads + 2) * cached_tokens
    # Sums over tokens of each head, and what turns filters to the positions of each sequence.
    per_sequence = 4 * num_layers * (2 * num_heads + 2 * head_size)
    return scores + kept + num_sequences * per_sequence + (OBSERVATIONS_AT_ONCE + 1) * prompt_bytes


class Compactor:
    """Decides which tokens the sequences keep, and compacts their pages: a few launches for any number of them.

    Args:
        method: scores the tokens in the cache of this rank.
        num_heads: of a layer that a token is scored for, the query heads if the method scores for each of them.
        shared_by_heads: the heads of a layer keep the same tokens.
        mean_over_ranks: the mean of a tensor over ranks that hold other heads of the same layers.
    """

    def __init__(
        self,
        method: Method,
        num_heads: int,
        shared_by_heads: bool,
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:
        self.method = method
        self.cache = method.cache
        self.ops = method.ops
        self.num_heads = num_heads
        self.shared_by_heads = shared_by_heads
        self.mean_over_ranks = mean_over_ranks

    def apply(
        self,
        compactions: Sequence[RequestCompaction],
        table_rows: Sequence[int],
        block_table: torch.Tensor,
        recent_queries: Sequence[RecentQueries | None],
    ) -> list[torch.Tensor]:
        """Evicts what ``compactions`` ask for. Does not wait for the device.

        Args:
            compactions: one per sequence.
            table_rows: where each sequence stands in the block table.
            block_table: the pages before, int32; private copies are entered in it, pages taken out stay.
            recent_queries: of each sequence; None where none are kept.

        Returns:
            Which tokens of each sequence stay: bool or int8, shape ``[num_layers, num_kv_heads, resident_tokens]``, of
            one head where the heads share them.
        """
        kept = []
        for part in self._parts(compactions):
            batch = CompactionBatch.make(compactions[part], table_rows[part], block_table)
            kept += self._compact(batch, recent_queries[part])
        return kept

    def _parts(self, compactions: Sequence[RequestCompaction]) -> Iterator[slice]:
        """Yields those that are compacted at once: almost always all of them.

        There is no room for the scores of any number of tokens. And sequences write what their queries observe beside
        all their tokens, in the pages taken out too, before the survivors move: two that take out the same page would
        move each other's.
        """
        most_tokens = SCORES_AT_ONCE // (self.cache.num_layers * self.num_heads)
        first, num_tokens = 0, 0
        shared: set[int] = set()
        for index, compaction in enumerate(compactions):
            is_full = num_tokens + compaction.resident_tokens > most_tokens
            if index > first and (is_full or not shared.isdisjoint(compaction.shared_pages_out)):
                yield slice(first, index)
                first, num_tokens, shared = index, 0, set()
            num_tokens += compaction.resident_tokens
            shared.update(compaction.shared_pages_out)
        yield slice(first, len(compactions))

    def _compact(self, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]) -> list[torch.Tensor]:
        num_layers, num_heads = self.cache.num_layers, self.cache.num_kv_heads
        self.ops.copy_pages(self.cache, batch)
        scores = self._ranked_by(self.method.scores(batch, recent_queries), batch)
        if self.shared_by_heads:
            num_heads = 1
        if batch.has_distinct_tokens:
            best = self.ops.select_kept(scores, batch.evicting_distinct_tokens(), num_layers, num_heads)
            distinctness = self._ranked_by(self.ops.key_distinctness(self.cache, batch, DISTINCT_POOL), batch)
            scores = distinctness.masked_fill_(best.bool(), math.inf)
        is_kept = self.ops.select_kept(scores, batch, num_layers, num_heads)
        self.ops.compact(self.cache, batch, is_kept, num_heads)
        return batch.split(is_kept, num_layers, num_heads)

    def _ranked_by(self, values: torch.Tensor, batch: CompactionBatch) -> torch.Tensor:
        """What tokens are ranked by: ``values`` of each KV head, or their mean over all heads of a layer, on all
        ranks.
        """
        if not self.shared_by_heads:
            return values
        shared = self.ops.mean_standardised(values, batch, self.cache.num_layers, self.cache.num_kv_heads)
        return self.mean_over_ranks(shared)

    def warm_up(self) -> None:
        """Compiles the kernels, on vLLM's null page, which nobody reads."""
        bs = self.cache.block_size
        block_table = torch.zeros(1, 2, dtype=torch.int32, device=self.cache.planes.device)
        null = RequestCompaction("", 2 * bs, 2 * bs, bs, 0, 0, (0,), ((0, 0),), distinct_tokens=1)
        self.apply([null], [0], block_table, [None])
