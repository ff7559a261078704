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
        self._layers: list[dict[str, torch.Tensor]] = [{} for _ in range(num_layers)]  # [num_queries, num_heads, head_size]
        self._ends: dict[str, tuple[int, int]] = {}  # the position after the last query, and the prompt's length
        self._rows: list[tuple[str, int, int]] = []

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
            if end > position:
                self._rows.append((req_id, start, start + end - position))
                self._ends[req_id] = end, num_prompt
            start += num_tokens

    def skip_step(self) -> None:
        """Announces a step whose queries are not to be kept."""
        self._rows = []

    def record(self, layer: int, query: torch.Tensor) -> None:
        """query: of a step's tokens after RoPE, shape ``[num_tokens, num_heads, head_size]``."""
        kept = self._layers[layer]
        for req_id, start, end in self._rows:
            new = query[max(start, end - self.num_queries) : end]
            old = kept.get(req_id)
            missing = self.num_queries - new.shape[0]
            kept[req_id] = new.clone() if old is None or not missing else torch.cat((old[-missing:], new))

    def get(self, req_id: str) -> RecentQueries | None:
        """What is kept of a request's prompt."""
        if req_id not in self._ends:
            return None
        queries = torch.stack([layer[req_id] for layer in self._layers])
        return RecentQueries(queries.transpose(1, 2), *self._ends[req_id])

    def forget(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            if self._ends.pop(req_id, None) is not None:
                for layer in self._layers:
                    layer.pop(req_id, None)
