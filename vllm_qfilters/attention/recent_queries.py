"""Keeps the last queries of every prompt, for scorers that go by what a prompt's end looks at."""

from collections.abc import Iterable, Sequence

import torch

from vllm_qfilters.scorers import RecentQueries


class QueryRecorder:
    """The last queries of prompts, in all layers, while they are read and until their first eviction afterwards.

    Args:
        num_layers: attention layers of this rank.
        num_queries: kept per prompt.
    """

    def __init__(self, num_layers: int, num_queries: int) -> None:
        self.num_queries = num_queries
        self._num_layers = num_layers
        self._kept: dict[str, torch.Tensor] = {}  # [num_layers, num_queries, num_heads, head_size]
        self._ends: dict[str, tuple[int, int]] = {}  # the position after the last query, and the prompt's length
        self._ignored: set[str] = set()
        self._rows: dict[str, slice] = {}  # of the step's queries
        self._tokens: list[int] = []  # whose queries those are
        self._indices: torch.Tensor | None = None  # the same on the device
        self._queries: torch.Tensor | None = None  # of the step, [num_layers, len(_tokens), num_heads, head_size]

    def ignore(self, req_id: str) -> None:
        """Keeps nothing of a request until it is forgotten: it will not evict."""
        self._ignored.add(req_id)

    def start_step(
        self, req_ids: Sequence[str], num_scheduled_tokens: Sequence[int], computed: Sequence[int], prompt: Sequence[int]
    ) -> None:
        """Announces the tokens of a step, one number per request.

        Args:
            req_ids: in the order of their tokens.
            num_scheduled_tokens: of each in this step.
            computed: before this step.
            prompt: to be prefilled; later queries are not kept.
        """
        self.skip_step()
        start = 0
        for req_id, num_tokens, position, num_prompt in zip(req_ids, num_scheduled_tokens, computed, prompt, strict=True):
            end = min(position + num_tokens, num_prompt)
            if end > position and req_id not in self._ignored:
                first = len(self._tokens)
                self._tokens += range(start + max(0, end - position - self.num_queries), start + end - position)
                self._rows[req_id] = slice(first, len(self._tokens))
                self._ends[req_id] = end, num_prompt
            start += num_tokens

    def skip_step(self) -> None:
        """Announces a step whose queries are not to be kept."""
        self._file()
        self._rows, self._tokens = {}, []

    def record(self, layer: int, query: torch.Tensor) -> None:
        """query: of a step's tokens after RoPE, shape ``[num_tokens, num_heads, head_size]``."""
        if not self._tokens:
            return
        if self._queries is None:
            tokens = torch.tensor(self._tokens, pin_memory=query.is_cuda)
            self._indices = tokens.to(query.device, non_blocking=True)
            self._queries = query.new_empty(self._num_layers, len(self._tokens), *query.shape[1:])
        torch.index_select(query, 0, self._indices, out=self._queries[layer])

    def get(self, req_id: str) -> RecentQueries | None:
        """What is kept of a request's prompt."""
        self._file()
        if req_id not in self._ends:
            return None
        return RecentQueries(self._kept[req_id].transpose(1, 2), *self._ends[req_id])

    def forget(self, req_ids: Iterable[str]) -> None:
        self._file()
        for req_id in req_ids:
            self._ignored.discard(req_id)
            self._kept.pop(req_id, None)
            self._ends.pop(req_id, None)

    def _file(self) -> None:
        """Puts what a step has recorded to what is kept of its requests."""
        if self._queries is None:
            return
        for req_id, rows in self._rows.items():
            new, old = self._queries[:, rows], self._kept.get(req_id)
            missing = self.num_queries - new.shape[1]
            # A copy, for one request's queries must not keep alive those of all others in its step.
            self._kept[req_id] = new.clone() if old is None or not missing else torch.cat((old[:, -missing:], new), dim=1)
        self._queries = None
