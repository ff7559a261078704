"""What a method is: it looks at keys and values twice, as they are written and when a sequence is about to be
compacted.

To add a method, write a subclass of :class:`Method` in a file of its own and name it in the catalogue. The method runs
on CPUs and GPUs alike, because it asks the operators (:class:`vllm_qfilters.kernels.ops.Ops`) for everything that
depends on the device.
"""

import copy
import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import NoReturn, Self

import torch

from vllm_qfilters.filters.bank import FilterBank
from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.ops import PLAIN_SOFTMAX, Cache, Ops, Queries, Softmax, TokenStat
from vllm_qfilters.methods.catalog import Entry


@dataclasses.dataclass(frozen=True)
class RecentQueries:
    """The last queries of a sequence that were recorded.

    Attributes:
        queries: after RoPE, shape ``[num_layers, num_heads, num_queries, head_size]``, on whatever device.
        end: the position after the last one.
        num_prompt_tokens: of the whole prompt, which may not have been read to its end.
    """

    queries: Queries
    end: int
    num_prompt_tokens: int

    def of_layers(self, layers: slice) -> "RecentQueries":
        """Those of some layers."""
        return dataclasses.replace(self, queries=self.queries[layers])

    def have_read_prompt_at(self, position: int) -> bool:
        """Whether a sequence that stands at ``position`` has read its prompt, so that these queries are what it asks
        for.
        """
        return position >= self.num_prompt_tokens


def _no_filters() -> NoReturn:
    raise AssertionError("the catalogue does not say that this method needs filters")


@dataclasses.dataclass(frozen=True)
class Model:
    """What a method may know of the model on this rank.

    Attributes:
        cache: keys, values and token stats.
        ops: the operators of its device.
        softmax: of its attention.
        shared_by_heads: the heads of a layer keep the same tokens.
        max_over_ranks: the largest of a tensor over ranks that hold other heads of the same layers.
        static_filters: makes the paper's filters of the KV heads, shape ``[num_layers, num_kv_heads, head_size]``.
        filter_bank: makes the statistics of the coming queries.
    """

    cache: Cache
    ops: Ops
    softmax: Softmax = PLAIN_SOFTMAX
    shared_by_heads: bool = False
    max_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
    static_filters: Callable[[], torch.Tensor] = _no_filters
    filter_bank: Callable[[], FilterBank] = _no_filters

    @property
    def device(self) -> torch.device:
        return self.cache.planes.device


class Method:
    """Goes by the token stats that were written with the keys.

    Attributes:
        cache: of the layers that are scored, all or some.
        first_layer: the index of the first of them.
        stat: what is written to the first plane beside each key.
        filters: for ``TokenStat.PROJECTION``, shape ``[num_layers, num_kv_heads, head_size]``, float32.
    """

    stat = TokenStat.NONE
    filters: torch.Tensor | None = None

    def __init__(self, model: Model) -> None:
        self.model = model
        self.cache = model.cache
        self.ops = model.ops
        self.first_layer = 0

    def of_layers(self, layers: slice) -> Self:
        """The same method for some of its layers, so that what it computes takes less memory at once. To be extended
        by methods that hold anything else by layer.
        """
        part = copy.copy(self)
        part.cache = self.cache.of_layers(layers)
        part.model = dataclasses.replace(self.model, softmax=self.model.softmax.of_layers(layers))
        part.first_layer = self.first_layer + layers.start
        return part

    def scores(self, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]) -> torch.Tensor:
        """What each resident token is worth to the queries to come: higher = keep.

        Args:
            batch: the sequences, after :meth:`vllm_qfilters.kernels.ops.Ops.copy_pages`.
            recent_queries: of each sequence; None where none are kept.

        Returns:
            float32, flat: ``[num_layers, num_kv_heads, resident_tokens]`` per sequence.
        """
        return self.ops.gather(self.cache.scores, batch)


class PerSequence(Method):
    """Scores one layer of one sequence at a time, in plain PyTorch: simple, and slow on GPUs with many layers."""

    def scores(self, batch: CompactionBatch, recent_queries: Sequence[RecentQueries | None]) -> torch.Tensor:
        parts = []
        for index, compaction in enumerate(batch.compactions):
            pages, num_tokens = batch.pages_before(index, self.cache.block_size), compaction.resident_tokens
            for layer in range(self.cache.num_layers):
                keys = self.cache.resident_keys(layer, pages, num_tokens)
                values = self.cache.resident_values(layer, pages, num_tokens)
                seed = compaction.position * self.model.cache.num_layers + self.first_layer + layer
                parts.append(self.scores_of_layer(keys, values, compaction.sinks, seed).flatten())
        return torch.cat(parts)

    def scores_of_layer(self, keys: torch.Tensor, values: torch.Tensor, sinks: int, seed: int) -> torch.Tensor:
        """The scores of one layer of one sequence.

        Args:
            keys, values: float32, shape ``[num_kv_heads, num_tokens, head_size]``; keys after RoPE.
            sinks: first tokens, which stay whatever they score.
            seed: of this cut and layer, the same on all ranks.

        Returns:
            float32, shape ``[num_kv_heads, num_tokens]``.
        """
        raise NotImplementedError


def make(entry: Entry, model: Model) -> Method:
    """The method of a catalogue entry for one rank's part of a model."""
    module, _, name = entry.implementation.partition(":")
    method: type[Method] = getattr(importlib.import_module(f"vllm_qfilters.methods.{module}"), name)
    return method(model)
