"""Keeps the last queries of sequences, for methods that go by what a prompt's end, or the last tokens, look at."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from vllm_qfilters.kernels.ops import in_groups_of, joined_heads
from vllm_qfilters.methods.base import RecentQueries


def query_bytes(num_queries: int, num_heads: int, head_size: int, dtype: torch.dtype) -> int:
    """Those of a prompt take in one layer."""
    return num_queries * num_heads * head_size * dtype.itemsize


class KeptQueries:
    """Queries of one sequence where they were kept.

    They may still be on their way there from the device that computed them: only what the device is told later may read
    them, such as :meth:`to`.

    Args:
        pieces: the queries of one step after the other, each of shape
            ``[num_layers, num_queries, num_heads, head_size]``.
    """

    def __init__(self, pieces: Sequence[torch.Tensor]) -> None:
        self._pieces = pieces
        num_layers, _, num_heads, head_size = pieces[0].shape
        self.shape = num_layers, num_heads, sum(piece.shape[1] for piece in pieces), head_size

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self._pieces)

    def __getitem__(self, layers: slice) -> "KeptQueries":
        """Those of some layers."""
        return KeptQueries([piece[layers] for piece in self._pieces])

    def to(self, device: torch.device) -> torch.Tensor:
        """A copy on the device, shape ``[num_layers, num_heads, num_queries, head_size]``. Waits for nobody."""
        num_layers, num_heads, num_queries, head_size = self.shape
        found = torch.empty(num_layers, num_queries, num_heads, head_size, dtype=self._pieces[0].dtype, device=device)
        first = 0
        for piece in self._pieces:
            end = first + piece.shape[1]
            for layer in range(num_layers):  # contiguous memory alone is copied without waiting
                found[layer, first:end].copy_(piece[layer], non_blocking=True)
            first = end
        return found.transpose(1, 2)


@dataclasses.dataclass
class _Sequence:
    """What is kept of a sequence.

    Attributes:
        pieces: of :class:`KeptQueries`.
        end: the position after the last query.
        num_prompt_tokens: of the whole prompt.
    """

    pieces: list[torch.Tensor] = dataclasses.field(default_factory=list)
    end: int = 0
    num_prompt_tokens: int = 0


class _Block(NamedTuple):
    """Room for queries of a step: of the ``count`` tokens from ``first`` on, of those whose queries are kept."""

    first: int
    count: int
    queries: torch.Tensor


class QueryRecorder:
    """The last queries of sequences, in all layers.

    They are kept in the memory of the host, where GPUs have theirs apart: a layer's go there as they are computed, and
    come back when they are looked from. Those of prompts are given up at their first eviction, those of a recorder that
    follows decoding when their sequence ends.

    Args:
        num_layers, num_heads, head_size: of this rank; query heads of the cache that the most attend to.
        num_queries: kept of each prompt, at most.
        dtype: of the model.
        device: the queries are computed on.
        follows_decoding: the queries of generated tokens are kept too.
        num_kv_heads: of this rank; behind the query heads of each, zeros are kept where a layer has fewer.
        num_attending: by layer, how many layers attend to its keys; one each if empty.
    """

    def __init__(
        self,
        num_layers: int,
        num_queries: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        follows_decoding: bool = False,
        num_kv_heads: int = 1,
        num_attending: Sequence[int] = (),
    ) -> None:
        self.num_queries = num_queries
        self._num_layers, self._shape, self._dtype = num_layers, (num_heads, head_size), dtype
        self._is_pinned = device.type == "cuda"
        self._follows_decoding = follows_decoding
        self._num_kv_heads = num_kv_heads
        self._num_attending = num_attending or [1] * num_layers
        self._attending: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]  # what was seen of a layer's
        self._sequences: dict[str, _Sequence] = {}
        self._ignored: set[str] = set()
        self._tokens: list[int] = []  # of the step, whose queries are kept
        self._blocks: list[_Block] = []  # where
        self._indices: torch.Tensor | None = None  # _tokens on the device

    @property
    def sequence_bytes(self) -> int:
        """Those of a sequence take, where pinned memory comes in powers of two, as PyTorch has it."""
        exact = self._num_layers * query_bytes(self.num_queries, *self._shape, self._dtype)
        return 1 << (exact - 1).bit_length()

    def ignore(self, req_id: str) -> None:
        """Keeps nothing of a request until it is forgotten: it will not evict."""
        self._ignored.add(req_id)

    def start_step(
        self,
        req_ids: Sequence[str],
        num_scheduled_tokens: Sequence[int],
        computed: Sequence[int],
        prompt: Sequence[int],
    ) -> None:
        """Announces the tokens of a step, one number per request.

        Args:
            req_ids: in the order of their tokens.
            num_scheduled_tokens: of each in this step.
            computed: before this step.
            prompt: of the request; later queries are kept only by a recorder that follows decoding.
        """
        self.skip_step()
        start, kept = 0, []
        for req_id, num_tokens, position, num_prompt in zip(
            req_ids, num_scheduled_tokens, computed, prompt, strict=True
        ):
            end = position + num_tokens
            if not self._follows_decoding:
                end = min(end, num_prompt)
            if end > position and req_id not in self._ignored:
                num_new = min(end - position, self.num_queries)
                after_last = start + end - position
                self._tokens += range(after_last - num_new, after_last)
                sequence = self._sequences.setdefault(req_id, _Sequence())
                if sequence.end < position:  # a step between was not seen
                    sequence.pieces = []
                sequence.end, sequence.num_prompt_tokens = end, num_prompt
                kept.append((sequence, num_new))
            start += num_tokens
        self._make_blocks(kept)

    def skip_step(self) -> None:
        """Announces a step whose queries are not to be kept."""
        self._tokens, self._blocks, self._indices = [], [], None

    def record(
        self, layer: int, query: torch.Tensor, dequantise: Callable[[torch.Tensor], torch.Tensor] = lambda query: query
    ) -> None:
        """Keeps what was announced of a step, once the last layer is seen that attends to the same keys.

        Args:
            layer: index of the attention layer that has them.
            query: of its tokens after RoPE, shape ``[num_tokens, num_heads, head_size]``.
            dequantise: makes of some tokens' query, where it is in fp8, what the model made.
        """
        if not self._tokens:
            return
        if self._indices is None:
            indices = torch.tensor(self._tokens, pin_memory=query.is_cuda)
            self._indices = indices.to(query.device, non_blocking=True)
        bits = query.view(torch.uint8) if query.element_size() == 1 else query  # PyTorch need not index fp8
        attending = self._attending[layer]
        attending.append(dequantise(bits.index_select(0, self._indices).view(query.dtype)).to(self._dtype))
        if len(attending) < self._num_attending[layer]:
            return
        kept = joined_heads(attending, self._num_kv_heads, dim=1)
        kept = in_groups_of(self._shape[0] // self._num_kv_heads, kept, self._num_kv_heads, dim=1)
        attending.clear()
        for block in self._blocks:
            block.queries[layer].copy_(kept[block.first : block.first + block.count], non_blocking=True)

    def get(self, req_id: str, first_position: int = 0) -> RecentQueries | None:
        """The last queries of a request, from a position on; None if none are kept."""
        sequence = self._sequences.get(req_id)
        if sequence is None or sequence.end <= first_position:
            return None
        queries = KeptQueries(_last(sequence.pieces, sequence.end - first_position))
        return RecentQueries(queries, sequence.end, sequence.num_prompt_tokens)

    def blank(self) -> RecentQueries:
        """As many queries as are kept of a prompt, all of them zero, of a sequence that has just read it."""
        shape = self._num_layers, self._shape[0], self.num_queries, self._shape[1]
        return RecentQueries(torch.zeros(shape, dtype=self._dtype), end=0, num_prompt_tokens=0)

    def forget(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._ignored.discard(req_id)
            self._sequences.pop(req_id, None)

    def _make_blocks(self, kept: Sequence[tuple[_Sequence, int]]) -> None:
        """Takes room for the queries of a step, and gives each sequence its piece of it.

        A block is free when no sequence has a piece of it: a prompt has one of its own, since another may be kept for
        long. Where generated tokens are followed, all sequences go on together, and one copy per layer does for a step.
        """
        counts = [count for _, count in kept]
        if self._follows_decoding and kept:
            block = self._make_block(0, sum(counts))
            pieces = block.queries.split(counts, dim=1)
        else:
            firsts = [sum(counts[:index]) for index in range(len(counts))]
            pieces = [self._make_block(first, count).queries for first, count in zip(firsts, counts, strict=True)]
        for (sequence, _), piece in zip(kept, pieces, strict=True):
            sequence.pieces = _last([*sequence.pieces, piece], self.num_queries)

    def _make_block(self, first: int, count: int) -> _Block:
        shape = self._num_layers, count, *self._shape
        self._blocks.append(_Block(first, count, torch.empty(shape, dtype=self._dtype, pin_memory=self._is_pinned)))
        return self._blocks[-1]


def _last(pieces: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Of the last ``count`` queries."""
    found: list[torch.Tensor] = []
    for piece in reversed(pieces):
        if count <= 0:
            break
        found.insert(0, piece[:, -count:])
        count -= piece.shape[1]
    return found
