"""Operators in Triton, for GPUs: one launch for all sequences of a batch. Imported where Triton is.

Kernels are specialised on what an engine keeps as long as it runs, such as strides of its cache, and on nothing that
differs between launches, such as how many layers are cut at once: what is compiled in the warm-up is all that is
compiled.
"""

from collections.abc import Callable, Sequence

import torch

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.ops import Observation, Softmax, TokenStat, Turns
from vllm_qfilters.kernels.triton import compaction, distinctness, observation, score_pages, selection, value_norms
from vllm_qfilters.kernels.triton.score_resident import mean_softmax, score_resident
from vllm_qfilters.kernels.triton.write_and_score import NUMBERS_OF_TOKENS, write_and_score


class TritonOps:
    """Implements :class:`vllm_qfilters.kernels.ops.Ops`."""

    name = "Triton"
    warm_up_tokens = NUMBERS_OF_TOKENS

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
        write_and_score(key, value, cache, planes, slot_mapping, stat, filters, seed, key_scale, value_scale)

    def gather(self, plane: torch.Tensor, batch: CompactionBatch) -> torch.Tensor:
        return selection.gather_scores(plane, batch)

    def project(
        self, cache: StridedCache, batch: CompactionBatch, filters: torch.Tensor, turns: Turns | None
    ) -> torch.Tensor:
        return score_resident(cache, batch, filters[None], key_scales=cache.key_scales, turns=turns)

    def expected_attention(
        self,
        cache: StridedCache,
        batch: CompactionBatch,
        means: torch.Tensor,
        factors: torch.Tensor,
        turns: Turns,
        softmax: Softmax,
    ) -> torch.Tensor:
        by_rank = factors[None] if factors.shape[2] else None
        logits = score_resident(cache, batch, means[None], by_rank, cache.key_scales, turns, softmax.soft_cap)
        group = means.shape[1] // cache.num_kv_heads
        return mean_softmax(logits, batch, cache.num_layers, cache.num_kv_heads, group, softmax)

    def observe(
        self,
        cache: StridedCache,
        batch: CompactionBatch,
        observations: Sequence[Observation],
        plane: torch.Tensor,
        softmax: Softmax,
        mean_pool: int,
        peak_reach: tuple[int, int],
        shared_by_heads: bool,
        max_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        heads = shared_by_heads, max_over_ranks, cache.key_scales
        return observation.observe(cache, batch, observations, plane, softmax, mean_pool, peak_reach, *heads)

    value_norms = staticmethod(value_norms.value_norms)

    def distinctness(self, cache: StridedCache, batch: CompactionBatch, of_values: bool, pool: int) -> torch.Tensor:
        return distinctness.distinctness(cache, batch, of_values, pool)

    mean_standardised = staticmethod(selection.mean_standardised)
    select_kept = staticmethod(selection.select_kept)
    copy_pages = staticmethod(compaction.copy_pages)
    compact = staticmethod(compaction.compact)
    page_scores = staticmethod(score_pages.page_scores)
