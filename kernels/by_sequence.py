"""Operators that go through a batch sequence by sequence: those of CPUs, and the truth for all others."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from vllm_qfilters.kernels import reference
from vllm_qfilters.kernels.batch import NOT_OBSERVED, CompactionBatch
from vllm_qfilters.kernels.layout import read_plane, write_plane
from vllm_qfilters.kernels.ops import Cache, Observation, Softmax, TokenStat, Turns


class SequenceOps:
    """Implements :class:`vllm_qfilters.kernels.ops.Ops`.

    Args:
        functions: a module of functions over one sequence, ``reference`` or ``cpp``.
        name: of the kernels, for the log.
    """

    warm_up_tokens = ()

    def __init__(self, functions: ModuleType, name: str) -> None:
        self.functions = functions
        self.name = name

    def write(
        self,
        stat: TokenStat,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor | None,
        planes: torch.Tensor,
        slot_mapping: torch.Tensor,
        filters: torch.Tensor | None = None,
        seed: int = 0,
        key_scale: torch.Tensor | None = None,
        value_scale: torch.Tensor | None = None,
    ) -> None:
        if cache is not None:
            reference.write_keys_and_values(key, value, cache, slot_mapping, key_scale, value_scale)
        if stat == TokenStat.PROJECTION:
            self.functions.score_and_store(key, filters, planes[:, 0], slot_mapping)
        elif stat == TokenStat.NEGATIVE_KEY_NORM:
            reference.write_scores(-key.to(torch.float32).norm(dim=-1), planes[:, 0], slot_mapping)
        elif stat == TokenStat.RANDOM:
            reference.write_scores(reference.random_of_keys(key, seed), planes[:, 0], slot_mapping)

    def gather(self, plane: torch.Tensor, batch: CompactionBatch) -> torch.Tensor:
        block_size = plane.shape[3]
        parts = []
        for index, compaction in enumerate(batch.compactions):
            parts.append(read_plane(plane, batch.pages_before(index, block_size), compaction.resident_tokens))
        return _flat(parts)

    def project(self, cache: Cache, batch: CompactionBatch, filters: torch.Tensor, turns: Turns | None) -> torch.Tensor:
        parts = []
        for index, pages, num_tokens in _sequences(cache, batch):
            own = filters if turns is None else turned(filters, turns, index)
            by_kv_head = own.unflatten(1, (cache.num_kv_heads, -1))  # [num_layers, num_kv_heads, group, head_size]
            layers = [
                (vectors @ cache.resident_keys(layer, pages, num_tokens).mT).flatten(0, 1)
                for layer, vectors in enumerate(by_kv_head)
            ]
            parts.append(torch.stack(layers))
        return _flat(parts)

    def expected_attention(
        self,
        cache: Cache,
        batch: CompactionBatch,
        means: torch.Tensor,
        factors: torch.Tensor,
        turns: Turns,
        softmax: Softmax,
    ) -> torch.Tensor:
        return _flat(
            self.functions.expected_attention(
                cache, pages, num_tokens, turned(means, turns, index), turned(factors, turns, index), softmax
            )
            for index, pages, num_tokens in _sequences(cache, batch)
        )

    def observe(
        self,
        cache: Cache,
        batch: CompactionBatch,
        observations: Sequence[Observation],
        plane: torch.Tensor,
        softmax: Softmax,
        mean_pool: int,
        peak_reach: tuple[int, int],
        shared_by_heads: bool,
        max_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        by_sequence = {observation.sequence: observation for observation in observations}
        parts = []
        for index, pages, num_tokens in _sequences(cache, batch):
            observation = by_sequence.get(index)
            if observation is None:
                _forget(plane, pages, num_tokens - batch.compactions[index].unobserved_tokens, num_tokens)
                parts.append(read_plane(plane, pages, num_tokens))
                continue
            queries = softmax.scale * observation.queries.to(plane.device).to(torch.float32)
            mean, peak = self.functions.observed_attention(
                cache, pages, num_tokens, queries, observation.num_newer, mean_pool, peak_reach, softmax
            )
            write_plane(plane, pages, mean)
            if not observation.is_question:
                parts.append(mean)
            elif shared_by_heads:
                parts.append(max_over_ranks(peak.amax(1, keepdim=True)).expand_as(peak))
            else:
                parts.append(peak)
        return _flat(parts)

    def value_norms(self, cache: Cache, batch: CompactionBatch) -> torch.Tensor:
        return _flat(
            self.functions.value_norms(cache, pages, num_tokens) for _, pages, num_tokens in _sequences(cache, batch)
        )

    def distinctness(self, cache: Cache, batch: CompactionBatch, of_values: bool, pool: int) -> torch.Tensor:
        return _flat(
            self.functions.distinctness(cache, pages, num_tokens, of_values, pool)
            for _, pages, num_tokens in _sequences(cache, batch)
        )

    def mean_standardised(
        self, scores: torch.Tensor, batch: CompactionBatch, num_layers: int, num_heads: int
    ) -> torch.Tensor:
        return _flat(
            self.functions.mean_standardised(part, compaction.sinks, compaction.window)
            for compaction, part in zip(batch.compactions, batch.split(scores, num_layers, num_heads), strict=True)
        )

    def select_kept(
        self, scores: torch.Tensor, batch: CompactionBatch, num_layers: int, num_heads: int
    ) -> torch.Tensor:
        return _flat(
            self.functions.select_kept(
                part,
                compaction.resident_tokens - compaction.evicted_tokens,
                compaction.sinks,
                compaction.window,
                shared_by_heads=False,
            )
            for compaction, part in zip(batch.compactions, batch.split(scores, num_layers, num_heads), strict=True)
        )

    def copy_pages(self, cache: Cache, batch: CompactionBatch) -> None:
        if batch.copied_pages.shape[0] == 0:
            return
        row, place, page = batch.copied_pages.unbind(1)
        cache.copy_pages(batch.block_table[row, place].to(torch.int64), page)
        batch.block_table[row, place] = page.to(batch.block_table.dtype)

    def compact(self, cache: Cache, batch: CompactionBatch, is_kept: torch.Tensor, num_selections: int) -> None:
        kept = batch.split(is_kept, cache.num_layers, num_selections)
        for index, (compaction, part) in enumerate(zip(batch.compactions, kept, strict=True)):
            self.functions.compact(
                cache,
                batch.pages_before(index, cache.block_size),
                batch.pages_after(index),
                part.expand(-1, cache.num_kv_heads, -1).contiguous(),
                compaction.window,
            )

    def page_scores(
        self, plane: torch.Tensor, pages: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor
    ) -> torch.Tensor:
        scores: torch.Tensor = self.functions.page_scores(plane, pages, mean, deviation)
        return scores


def _sequences(cache: Cache, batch: CompactionBatch):
    """Yields the place in the batch, the pages, and the number of resident tokens of each sequence."""
    for index, compaction in enumerate(batch.compactions):
        yield index, batch.pages_before(index, cache.block_size), compaction.resident_tokens


def _forget(plane: torch.Tensor, pages: torch.Tensor, first: int, end: int) -> None:
    """No query has looked at tokens from ``first`` to before ``end``. Page by page: an index of all takes longer."""
    block_size = plane.shape[3]
    for place in range(first // block_size, -(-end // block_size)):
        slots = slice(max(0, first - place * block_size), end - place * block_size)
        plane[:, pages[place], :, slots] = NOT_OBSERVED


def _flat(parts) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def turned(vectors: torch.Tensor, turns: Turns, index: int) -> torch.Tensor:
    """``R`` of vectors, shape ``[num_layers, ..., head_size]``, for one sequence of the batch."""
    between = [1] * (vectors.dim() - 2)
    cos, sin = (part[index].view(part.shape[1], *between, -1) for part in (turns.cos, turns.sin))
    if turns.partner.shape[0] == 1:
        others = vectors[..., turns.partner[0]]
    else:
        others = vectors.gather(-1, turns.partner.view(turns.partner.shape[0], *between, -1).expand(vectors.shape))
    return cos * vectors + sin * others
