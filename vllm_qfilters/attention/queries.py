"""Keeps the last queries of sequences, for methods that go by what a prompt's end, or the last tokens, look at."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch

from vllm_qfilters.methods.base import RecentQueries


@dataclasses.dataclass
class _Prompt:
    """Where the last queries of a prompt are.

    Attributes:
        row: theirs; they are the last ones in it.
        num_queries: kept.
        end: the position after the last one.
        num_tokens: of the whole prompt.
    """

    row: int
    num_queries: int = 0
    end: int = 0
    num_tokens: int = 0


class QueryRecorder:
    """The last queries of prompts, in all layers, while they are read and until their first eviction afterwards.

    Args:
        queries: the room for them, shape ``[num_layers, num_prompts, num_queries, num_heads, head_size]``. They take no
            more: a prompt for which there is no row is not observed. With as many rows as requests run at once there
            always is one.
        follows_decoding: the queries of generated tokens are kept too.

    Attributes:
        num_queries: kept of each prompt.
        prompt_bytes: these take.
    """

    def __init__(self, queries: torch.Tensor, follows_decoding: bool = False) -> None:
        _, num_prompts, self.num_queries, _, _ = queries.shape
        self.prompt_bytes = queries[:, :1].numel() * queries.element_size()
        self._follows_decoding = follows_decoding
        self._queries = queries
        self._free_rows = list(range(num_prompts))
        self._prompts: dict[str, _Prompt] = {}
        self._ignored: set[str] = set()
        self._tokens: list[int] = []  # of the step, whose queries are kept
        self._places: list[int] = []  # where: row * num_queries + place in the row
        self._indices: torch.Tensor | None = None  # both of them on the device, [2, len(_tokens)]

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
        start = 0
        for req_id, num_tokens, position, num_prompt in zip(
            req_ids, num_scheduled_tokens, computed, prompt, strict=True
        ):
            end = position + num_tokens
            if not self._follows_decoding:
                end = min(end, num_prompt)
            if end > position and self._has_row(req_id):
                num_new = min(end - position, self.num_queries)
                after_last = start + end - position
                self._tokens += range(after_last - num_new, after_last)
                self._places += self._make_room(req_id, num_new)
                self._prompts[req_id].end, self._prompts[req_id].num_tokens = end, num_prompt
            start += num_tokens

    def skip_step(self) -> None:
        """Announces a step whose queries are not to be kept."""
        self._tokens, self._places, self._indices = [], [], None

    def record(
        self, layer: int, query: torch.Tensor, dequantise: Callable[[torch.Tensor], torch.Tensor] = lambda query: query
    ) -> None:
        """Keeps what was announced of a step.

        Args:
            layer: index of the attention layer.
            query: of its tokens after RoPE, shape ``[num_tokens, num_heads, head_size]``.
            dequantise: makes of some tokens' query, where it is in fp8, what the model made.
        """
        if not self._tokens:
            return
        if self._indices is None:
            indices = torch.tensor([self._tokens, self._places], pin_memory=query.is_cuda)
            self._indices = indices.to(query.device, non_blocking=True)
        tokens, places = self._indices.unbind()
        bits = query.view(torch.uint8) if query.element_size() == 1 else query  # PyTorch need not index fp8
        kept = dequantise(bits.index_select(0, tokens).view(query.dtype))
        self._queries[layer].flatten(0, 1).index_copy_(0, places, kept.to(self._queries.dtype))

    def get(self, req_id: str) -> RecentQueries | None:
        """What is kept of a request's prompt, where it is kept: another step may write there."""
        prompt = self._prompts.get(req_id)
        if prompt is None:
            return None
        queries = self._queries[:, prompt.row, self.num_queries - prompt.num_queries :]
        return RecentQueries(queries.transpose(1, 2), prompt.end, prompt.num_tokens)

    def forget(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._ignored.discard(req_id)
            prompt = self._prompts.pop(req_id, None)
            if prompt is not None:
                self._free_rows.append(prompt.row)

    def _has_row(self, req_id: str) -> bool:
        """Whether queries of a request can be kept; it gets a row if there is one and it has none yet."""
        if req_id not in self._prompts and req_id not in self._ignored and self._free_rows:
            self._prompts[req_id] = _Prompt(self._free_rows.pop())
        return req_id in self._prompts

    def _make_room(self, req_id: str, num_new: int) -> range:
        """The last ``num_new`` places of a request's row; what is there moves forward, and the first of it out."""
        prompt = self._prompts[req_id]
        if prompt.num_queries and num_new < self.num_queries:
            row = self._queries[:, prompt.row]
            row[:, :-num_new] = row[:, num_new:].clone()
        prompt.num_queries = min(prompt.num_queries + num_new, self.num_queries)
        after_row = (prompt.row + 1) * self.num_queries
        return range(after_row - num_new, after_row)
