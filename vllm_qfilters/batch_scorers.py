"""What tokens are worth to the queries to come, for all sequences of a step at once, on GPUs: see
:mod:`vllm_qfilters.scorers`.

What is left beside a key as it is written (``written``) is the business of the attention backend there, fused with the
write.
"""

from collections.abc import Callable, Sequence

import torch

from vllm_qfilters.filters.bank import FilterBank
from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.reference import NOT_OBSERVED
from vllm_qfilters.kernels.triton.distinctness import key_distinctness
from vllm_qfilters.kernels.triton.observation import Observation, observe
from vllm_qfilters.kernels.triton.score_resident import Turns, mean_softmax, score_resident
from vllm_qfilters.kernels.triton.selection import gather_scores
from vllm_qfilters.kernels.triton.write_and_score import Score
from vllm_qfilters.scorers import ExpectedAttentionScorer, RecentQueries, mix_in_observed


class BatchScorer:
    """Goes by what was left beside the keys.

    Args:
        cache: of this rank.
        written: what that is.
        filters: for ``Score.PROJECTION``, shape ``[num_layers, num_kv_heads, head_size]``, float32.

    Attributes:
        num_heads: of a layer that a token is scored for.
    """

    def __init__(self, cache: StridedCache, written: Score, filters: torch.Tensor | None = None) -> None:
        self.cache = cache
        self.written = written
        self.filters = filters
        self.num_heads = cache.num_kv_heads

    def resident_scores(self, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]) -> torch.Tensor:
        """float32, flat: ``[num_layers, num_kv_heads, resident_tokens]`` per row.

        Args:
            batch: the sequences, after :func:`vllm_qfilters.kernels.triton.compaction.copy_pages`.
            recent_queries: of the prompt of each row; None where they have been used after its end.
        """
        return gather_scores(self.cache.scores, batch)


class BatchKeyDiffScorer(BatchScorer):
    """See :class:`vllm_qfilters.scorers.KeyDiffScorer`."""

    def __init__(self, cache: StridedCache) -> None:
        super().__init__(cache, Score.NONE)

    def resident_scores(self, batch, recent_queries):
        return key_distinctness(self.cache, batch, pool=1)


class BatchRotaryFilterScorer(BatchScorer):
    """See :class:`vllm_qfilters.scorers.RotaryFilterScorer`.

    Args:
        bank: of this rank.
        key_scales: of an fp8 cache, one per layer.
        written: left beside the keys for subclasses.
    """

    def __init__(
        self, cache: StridedCache, bank: FilterBank, key_scales: torch.Tensor | None, written: Score = Score.NONE
    ) -> None:
        super().__init__(cache, written)
        device = cache.rows.device
        self.key_scales = key_scales
        by_head = bank.means.unflatten(1, (cache.num_kv_heads, -1))  # [num_layers, num_kv_heads, group, head_size]
        self.group = by_head.shape[2]
        self.means = bank.means[None].to(device)
        self.mean_of_group = by_head.mean(2)[None].to(device).contiguous()
        distinct = {rotation: index for index, rotation in enumerate(dict.fromkeys(bank.rotations))}
        self._rotations = [rotation.to(device) for rotation in distinct]
        self._rotation_of_layer = torch.tensor([distinct[rotation] for rotation in bank.rotations], device=device)
        partners = [rotation.partner for rotation in self._rotations if not rotation.is_identity] or [
            self._rotations[0].partner
        ]
        self._partner = partners[0]  # the identity takes any: its sines are zero
        if any(not torch.equal(partner, self._partner) for partner in partners):
            raise ValueError(
                "KV compression on GPUs needs rotary embeddings of one style in all layers: use filter 'static'"
            )

    def resident_scores(self, batch, recent_queries):
        turns = self.turns(batch.positions)
        return score_resident(self.cache, batch, self.mean_of_group, key_scales=self.key_scales, turns=turns)

    def turns(self, positions: torch.Tensor) -> Turns:
        """What turns filters to ``positions``, shape ``[num_rows]``, on the device."""
        tables = [rotation.table(positions) for rotation in self._rotations]
        cos, sin = (torch.stack(part, dim=1) for part in zip(*tables))  # [num_rows, num_rotations, head_size]
        length = (cos.square() + sin.square()).sqrt()
        cos, sin = cos / length, sin / length
        if len(tables) == 1:
            cos, sin = (part.expand(-1, self.cache.num_layers, -1) for part in (cos, sin))
        else:
            cos, sin = cos[:, self._rotation_of_layer], sin[:, self._rotation_of_layer]
        return Turns(cos, sin, self._partner)


class BatchExpectedAttentionScorer(BatchRotaryFilterScorer):
    """See :class:`vllm_qfilters.scorers.ExpectedAttentionScorer`.

    Args:
        scale: of the attention's logits.
        shared_by_heads: what one head is asked for, all heads of its layer keep.
        max_over_ranks: of a tensor, over ranks that hold other heads of the same layers.
    """

    def __init__(
        self,
        cache: StridedCache,
        bank: FilterBank,
        key_scales: torch.Tensor | None,
        scale: float,
        shared_by_heads: bool,
        max_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:
        super().__init__(cache, bank, key_scales, Score.VALUE_NORM)
        self.num_heads = bank.means.shape[1]
        self.scale = scale
        self.shared_by_heads = shared_by_heads
        self.max_over_ranks = max_over_ranks
        self.factors = (bank.factors * 0.5**0.5)[None].to(cache.rows.device) if bank.factors.shape[2] else None
        self.observes = cache.planes.shape[2] > 1

    def resident_scores(self, batch, recent_queries):
        turns = self.turns(batch.positions)
        logits = score_resident(self.cache, batch, self.means, self.factors, key_scales=self.key_scales, turns=turns)
        attention = mean_softmax(logits, batch, self.cache.num_layers, self.cache.num_kv_heads, self.group)
        del logits  # the largest of all that compaction makes
        if self.observes:
            attention = mix_in_observed(attention, self._observed(batch, recent_queries))
        return attention * gather_scores(self.cache.planes[:, :, ExpectedAttentionScorer.VALUE_NORMS], batch)

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
        plane = self.cache.planes[:, :, ExpectedAttentionScorer.OBSERVED]
        pools = ExpectedAttentionScorer.MEAN_POOL, ExpectedAttentionScorer.PEAK_POOL
        heads = self.shared_by_heads, self.max_over_ranks
        observed = observe(self.cache, batch, observations, plane, self.scale, *pools, *heads, self.key_scales)
        if (
            batch.has_distinct_tokens
        ):  # not looked at yet: what stands beside them, other sequences observed on shared pages
            observed.masked_fill_(batch.keeps_distinct(self.cache.num_layers * self.cache.num_kv_heads), NOT_OBSERVED)
        return observed
