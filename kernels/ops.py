"""What methods and the compactor ask of the paged cache: one protocol, with an implementation per kind of device.

:class:`vllm_qfilters.kernels.by_sequence.SequenceOps` goes through a batch sequence by sequence, with the functions of
``reference`` (plain PyTorch, the truth) or ``cpp`` (csrc/); :class:`vllm_qfilters.kernels.triton.TritonOps` launches
one kernel for all sequences. A result over tokens is flat: see :mod:`vllm_qfilters.kernels.batch`.

Conventions: a higher score means keep; a filter points along the mean query, so that ``<key, filter>`` is high for keys
that queries like.
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.layout import PagedCache, StridedCache

Cache = PagedCache | StridedCache
OBSERVATIONS_AT_ONCE = 8  # sequences whose queries are looked at in one launch, a copy of them side by side


class TokenStat(enum.IntEnum):
    """What is written to the first plane with each key: nothing, its projection on the head's filter, minus its norm,
    or a number drawn from its bits.
    """

    NONE = 0
    PROJECTION = 1
    NEGATIVE_KEY_NORM = 2
    RANDOM = 3


@dataclasses.dataclass(frozen=True)
class Turns:
    """A linear map ``R`` per sequence and layer, ``(R f)_i = cos_i f_i + sin_i f_partner(i)``: a rotary embedding.

    Attributes:
        cos, sin: float32, shape ``[num_sequences, num_layers, head_size]``, of the same strides.
        partner: shape ``[num_layers or 1, head_size]``, int64.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    partner: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Softmax:
    """How the layers of a model make attention of the products of queries and keys.

    Operators take queries, or vectors that stand for them, of as many query heads in every layer; those of one KV head
    lie side by side.

    Attributes:
        scale: of the products, which makes them logits.
        soft_cap: c, where a logit x becomes ``c tanh(x / c)`` (Gemma 2); 0: logits stay what they are.
        sinks: a logit beside those of the tokens for each query head (GPT-OSS), float32, shape
            ``[num_layers, num_heads]``; None: there are none.
        group_sizes: query heads of each KV head by layer, int64, shape ``[num_layers]``, where layers differ: the first
            ones of each KV head count, what lies behind them is padding. None: all count.
    """

    scale: float = 1.0
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    group_sizes: torch.Tensor | None = None

    def of_layers(self, layers: slice) -> "Softmax":
        """That of some layers."""
        sinks, group_sizes = (part if part is None else part[layers] for part in (self.sinks, self.group_sizes))
        return dataclasses.replace(self, sinks=sinks, group_sizes=group_sizes)

    def group_size(self, layer: int, num_padded: int) -> int:
        """Query heads of a KV head in ``layer``, of ``num_padded`` with padding. Reads the device."""
        return num_padded if self.group_sizes is None else int(self.group_sizes[layer])


PLAIN_SOFTMAX = Softmax()


def in_groups_of(size: int, heads: torch.Tensor, num_kv_heads: int, dim: int = 0) -> torch.Tensor:
    """Query heads of one layer, padded with zeros so that each KV head has ``size`` of them.

    Args:
        heads: along dimension ``dim``, those of one KV head side by side.

    Returns:
        ``heads`` itself where it needs no padding.
    """
    if heads.shape[dim] == num_kv_heads * size:
        return heads
    by_kv_head = heads.unflatten(dim, (num_kv_heads, -1))
    shape = list(by_kv_head.shape)
    shape[dim + 1] = size - shape[dim + 1]
    return torch.cat((by_kv_head, heads.new_zeros(shape)), dim=dim + 1).flatten(dim, dim + 1)


def joined_heads(layers: Sequence[torch.Tensor], num_kv_heads: int, dim: int = 0) -> torch.Tensor:
    """Query heads of layers that attend to the same keys, as if they were those of one layer.

    Args:
        layers: with their heads along dimension ``dim``, those of one KV head side by side, as in what is returned.
    """
    if len(layers) == 1:
        return layers[0]
    return torch.cat([heads.unflatten(dim, (num_kv_heads, -1)) for heads in layers], dim + 1).flatten(dim, dim + 1)


class Queries(Protocol):
    """A tensor, or what becomes one: queries of all layers wait in the memory of the host until they are looked from.

    Attributes:
        shape: of the tensor.
        nbytes: of the tensor.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, layers: slice) -> "Queries":
        """Those of some layers."""

    def to(self, device: torch.device) -> torch.Tensor:
        """The tensor on ``device``."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """The last queries of one sequence, which look at the tokens it holds.

    Attributes:
        sequence: its place in the batch.
        queries: after RoPE, shape ``[num_layers, num_heads, num_queries, head_size]``, on whatever device.
        num_newer: how many of the sequence's last tokens came after the last query.
        is_question: tokens are judged by the most that any query pays, not by the mean.
    """

    sequence: int
    queries: Queries
    num_newer: int
    is_question: bool = False


class Ops(Protocol):
    """Operators on the caches of one rank. None of them waits for a device.

    Attributes:
        name: of the kernels, for the log.
        warm_up_tokens: numbers of tokens to write before an engine serves, one for each kernel that is compiled at its
            first launch; none where nothing is compiled.
    """

    name: str
    warm_up_tokens: tuple[int, ...]

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
        """Writes the token stats of a step of one layer, and its keys and values where ``cache`` is given.

        Args:
            stat: what to write to the first plane, computed before anything is quantised.
            key: shape ``[num_tokens, num_kv_heads, head_size]``; tokens beyond ``slot_mapping`` are padding.
            value: likewise, of ``value_size``, which is no more than ``head_size``.
            cache: the layer's view ``[num_blocks, num_kv_heads, block_size, head_size + value_size]``, of the dtype of
                the keys or fp8; None where vLLM has written keys and values.
            planes: the layer's, shape ``[num_blocks, num_planes, num_kv_heads, block_size]``, float32; written in
                place.
            slot_mapping: shape ``[num_tokens]``, int64: ``page * block_size + slot``, -1 for padding.
            filters: shape ``[num_kv_heads, head_size]``, float32, for ``PROJECTION``.
            seed: for ``RANDOM``; another one per layer.
            key_scale, value_scale: one float32 each, for an fp8 cache: what is stored is ``key / key_scale``.
        """

    def gather(self, plane: torch.Tensor, batch: CompactionBatch) -> torch.Tensor:
        """Reads one plane of token stats in the order of the tokens.

        Args:
            plane: shape ``[num_layers, num_blocks, num_kv_heads, block_size]``, float32.

        Returns:
            float32, flat, ``num_kv_heads`` heads.
        """

    def project(self, cache: Cache, batch: CompactionBatch, filters: torch.Tensor, turns: Turns | None) -> torch.Tensor:
        """``<k, R f>`` of every resident key ``k`` and the filter ``f`` of each head.

        Args:
            filters: float32, shape ``[num_layers, num_heads, head_size]``; those of one KV head side by side.
            turns: ``R``; None: the identity.

        Returns:
            float32, flat, ``num_heads`` heads.
        """

    def expected_attention(
        self,
        cache: Cache,
        batch: CompactionBatch,
        means: torch.Tensor,
        factors: torch.Tensor,
        turns: Turns,
        softmax: Softmax,
    ) -> torch.Tensor:
        """The attention that coming queries are expected to pay to each token, averaged over the query heads of a KV
        head.

        For a normally distributed query of mean ``R m`` and covariance ``sum_r (R b_r)(R b_r)^T`` the expectation of
        ``exp(<k, q>)`` is ``exp(<k, R m> + sum_r <k, R b_r>^2 / 2)``; it is normalised over the tokens of a sequence
        (the estimate of ExpectedAttention, arXiv 2510.00636, section 3). Sinks count in what it is normalised by. Where
        logits are capped, ``g`` being the cap, m the mean logit and v its variance, the exponent is that of Laplace's
        method after one step from the uncapped one: ``g(m + v s) - v s^2 / 2`` with ``s = g'(m + v / 2)``.

        Args:
            means: ``m`` times the scale of the logits, float32, shape ``[num_layers, num_heads, head_size]``.
            factors: ``b_r`` times that scale, float32, shape ``[num_layers, num_heads, rank, head_size]``; the rank may
                be 0.
            softmax: of the model; its scale is not asked for.

        Returns:
            float32, flat, ``num_kv_heads`` heads, each row of sum 1, or less where there are sinks.
        """

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
        """How much attention the last queries pay to each token and its neighbours (after SnapKV, arXiv 2404.14469).

        The mean over queries, the query heads of a KV head, and neighbours is written to ``plane``; the peak is the
        most that a query of the group pays to a token within whose reach it lies. Tokens that came after the last query
        get ``NOT_OBSERVED``, and so do the ``unobserved_tokens`` of a sequence that nobody looks at now.

        Args:
            observations: of different sequences.
            plane: shape ``[num_layers, num_blocks, num_kv_heads, block_size]``, float32; written in place.
            softmax: of the model.
            mean_pool: neighbours, the token among them, odd.
            peak_reach: tokens before and behind one that is looked at which share its peak.
            shared_by_heads: the peak is that of all heads of a layer, on all ranks.
            max_over_ranks: the largest over ranks that hold other heads of the same layers; may write to its argument.

        Returns:
            What the tokens of all sequences are judged by, float32, flat, ``num_kv_heads`` heads: the peak of a
            question, else what stands in the plane.
        """

    def value_norms(self, cache: Cache, batch: CompactionBatch) -> torch.Tensor:
        """The norm of each value, as it is stored: without the scale of an fp8 cache.

        Returns:
            float32, flat, ``num_kv_heads`` heads.
        """

    def distinctness(self, cache: Cache, batch: CompactionBatch, of_values: bool, pool: int) -> torch.Tensor:
        """How unlike the others of its head each key or value is: minus its cosine to their mean direction (of keys:
        KeyDiff, arXiv 2504.15364), averaged over neighbours.

        Args:
            of_values: of values instead of keys.
            pool: neighbours, the token among them, odd.

        Returns:
            float32, flat, ``num_kv_heads`` heads.
        """

    def mean_standardised(
        self, scores: torch.Tensor, batch: CompactionBatch, num_layers: int, num_heads: int
    ) -> torch.Tensor:
        """The mean over the heads of a layer of each token's z-score among the tokens between sinks and window.

        Returns:
            float32, flat, one head.
        """

    def select_kept(
        self, scores: torch.Tensor, batch: CompactionBatch, num_layers: int, num_heads: int
    ) -> torch.Tensor:
        """Which tokens stay: sinks, window, and between them those of the highest scores, exactly as many as stay.

        Args:
            scores: float32, flat; of one head where the heads of a layer keep the same tokens.

        Returns:
            bool or int8, flat like ``scores``, 1 for tokens that stay.
        """

    def copy_pages(self, cache: Cache, batch: CompactionBatch) -> None:
        """Makes private copies of pages that may not be written, planes included, and enters them in the block
        table.
        """

    def compact(self, cache: Cache, batch: CompactionBatch, is_kept: torch.Tensor, num_selections: int) -> None:
        """Takes whole pages out of the sequences; the tokens that stay move up in their order, so that neighbours in
        the cache are neighbours in the text.

        The pages taken out are the last whole pages before the window, which stays where it is. No two sequences may
        write the same page, nor one write what another reads: :meth:`copy_pages` goes before.

        Args:
            is_kept: of :meth:`select_kept`.
            num_selections: 1 where the heads of a layer keep the same tokens, else the number of KV heads.
        """

    def page_scores(
        self, plane: torch.Tensor, pages: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor
    ) -> torch.Tensor:
        """The mean over layers, heads and slots of the standardised token stats of full pages.

        Args:
            plane: shape ``[num_layers, num_blocks, num_kv_heads, block_size]``, float32.
            pages: shape ``[num_pages]``, int64.
            mean, deviation: of each head, float32, shape ``[num_layers, num_kv_heads]``.

        Returns:
            float32, shape ``[num_pages]``.
        """
