"""Applies a whole compaction plan to the cache of this rank at once. Knows tensors, not vLLM."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from vllm_qfilters.batch_scorers import BatchScorer
from vllm_qfilters.kernels.batch import Compaction, CompactionBatch
from vllm_qfilters.kernels.triton.compaction import compact, copy_pages
from vllm_qfilters.kernels.triton.distinctness import key_distinctness
from vllm_qfilters.kernels.triton.observation import SEQUENCES_AT_ONCE
from vllm_qfilters.kernels.triton.selection import mean_standardised, select_kept
from vllm_qfilters.scorers import DISTINCT_POOL, RecentQueries

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
    """Most memory that :class:`BatchCompactor` takes at once. Not of ``keydiff``, which is there for comparison.

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
    return scores + kept + num_sequences * per_sequence + SEQUENCES_AT_ONCE * prompt_bytes


class BatchCompactor:
    """Decides which tokens the sequences keep, and compacts their pages: a few launches for any number of them.

    Args:
        scorer: of the cache of this rank.
        shared_by_heads: the heads of a layer keep the same tokens.
        mean_over_ranks: of a tensor, where other ranks hold heads of the same layers.
    """

    def __init__(
        self,
        scorer: BatchScorer,
        shared_by_heads: bool,
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:
        self.scorer = scorer
        self.cache = scorer.cache
        self.shared_by_heads = shared_by_heads
        self.mean_over_ranks = mean_over_ranks

    def compact(
        self,
        compactions: Sequence[Compaction],
        block_table: torch.Tensor,
        recent_queries: Sequence[RecentQueries | None],
    ) -> list[torch.Tensor]:
        """Evicts what ``compactions`` ask for. Does not wait for the device.

        Args:
            compactions: one per sequence.
            block_table: as it was before, int32; private copies are entered in it, pages taken out stay.
            recent_queries: of the prompts of the sequences.

        Returns:
            Which tokens of each sequence stay: int8, shape ``[num_layers, num_kv_heads, resident_tokens]``, of one head
            where the heads share them.
        """
        kept = []
        for part in self._parts(compactions):
            kept += self._compact(compactions[part], block_table, recent_queries[part])
        return kept

    def _parts(self, compactions: Sequence[Compaction]) -> Iterator[slice]:
        """Those that are compacted at once: almost always all of them.

        There is no room for the scores of any number of tokens. And sequences write what their queries observe beside
        all their tokens, in the pages taken out too, before the survivors move: two that take out the same page would
        move each other's.
        """
        most_tokens = SCORES_AT_ONCE // (self.cache.num_layers * self.scorer.num_heads)
        first, num_tokens, shared = 0, 0, set()
        for index, compaction in enumerate(compactions):
            is_full = num_tokens + compaction.resident_tokens > most_tokens
            if index > first and (is_full or not shared.isdisjoint(compaction.shared_pages_out)):
                yield slice(first, index)
                first, num_tokens, shared = index, 0, set()
            num_tokens += compaction.resident_tokens
            shared.update(compaction.shared_pages_out)
        yield slice(first, len(compactions))

    def _compact(
        self,
        compactions: Sequence[Compaction],
        block_table: torch.Tensor,
        recent_queries: Sequence[RecentQueries | None],
    ) -> list[torch.Tensor]:
        num_layers, num_heads = self.cache.num_layers, self.cache.num_kv_heads
        batch = CompactionBatch.make(compactions, block_table)
        copy_pages(self.cache, batch)
        scores = self._ranked_by(self.scorer.resident_scores(batch, recent_queries), batch)
        if self.shared_by_heads:
            num_heads = 1
        if batch.has_distinct_tokens:
            best = select_kept(scores, batch.evicting_distinct_tokens(), num_layers, num_heads)
            distinctness = self._ranked_by(key_distinctness(self.cache, batch, DISTINCT_POOL), batch)
            scores = distinctness.masked_fill_(best.bool(), math.inf)
        is_kept = select_kept(scores, batch, num_layers, num_heads)
        compact(self.cache, batch, is_kept, num_heads)
        return batch.split(is_kept, num_layers, num_heads)

    def _ranked_by(self, values: torch.Tensor, batch: CompactionBatch) -> torch.Tensor:
        """What tokens are ranked by: ``values`` of each KV head, or their mean over all heads of a layer, on all
        ranks.
        """
        if not self.shared_by_heads:
            return values
        return self.mean_over_ranks(mean_standardised(values, batch, self.cache.num_layers, self.cache.num_kv_heads))

    def warm_up(self) -> None:
        """Compiles the kernels, on vLLM's null page, which nobody reads."""
        bs = self.cache.block_size
        block_table = torch.zeros(1, 2, dtype=torch.int32, device=self.cache.rows.device)
        self.compact([Compaction(0, 2 * bs, 2 * bs, bs, 0, 0, [0], [(0, 0)], distinct_tokens=1)], block_table, [None])
