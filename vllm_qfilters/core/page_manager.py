"""The block manager of page granularity: knows the score of every page, and frees the lowest-scoring ones.

Runs in the engine process. A page's score is the mean over its tokens, KV heads and layers of their normalised scores
(worker/page_scorer.py). It is final once the page is full, and belongs to the page, not to a sequence: sequences that
share a page share its score, a prefix-cached page keeps it for the next request that hits it, and a preempted request
finds it again or fills other pages anew. It is forgotten when the page is filled anew.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.request import Request

from vllm_qfilters.budget import cdiv
from vllm_qfilters.core.manager import QFiltersManager
from vllm_qfilters.plan import RequestCompaction


class PageManager(QFiltersManager):
    """Takes the lowest-scoring pages out of a sequence. No page is written or copied, so shared ones need no care."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.block_scores = np.zeros(self.block_pool.num_gpu_blocks, dtype=np.float32)  # by page; of full pages
        self._awaited: Counter[int] = Counter()  # by page: steps in flight that fill it, whose score is still to come

    def expect_scores(self, request: Request, num_tokens: int, num_unverified: int = 0) -> list[int]:
        """The pages a step fills; their scores are unknown from here until :meth:`receive_scores`.

        Args:
            request: it is scheduled, and its computed tokens count the step's already.
            num_tokens: it computes in the step.
            num_unverified: how many of its computed tokens may turn out to be rejected drafts. Their pages are
                filled by a later step, and scored again.
        """
        resident = self.resident_tokens(request)
        first = max(0, resident - num_tokens - num_unverified) // self.block_size
        filled = range(first, resident // self.block_size)
        block_ids = [self.req_to_blocks[request.request_id][i].block_id for i in filled]
        self._awaited.update(block_ids)
        return block_ids

    def receive_scores(self, block_ids: Sequence[int], scores: Sequence[float]) -> None:
        """Takes the scores of the pages a step filled, step by step in order. Whoever holds the pages by now."""
        for block_id, score in zip(block_ids, scores, strict=True):
            self.block_scores[block_id] = score
            self._awaited[block_id] -= 1
            if not self._awaited[block_id]:
                del self._awaited[block_id]

    def awaits_scores(self, request: Request, evicted_tokens: int) -> bool:
        """Whether pages that :meth:`plan_eviction` would choose among have scores that are still to come."""
        candidates = self._candidates(request, evicted_tokens)
        blocks = self.req_to_blocks[request.request_id]
        is_choice = len(candidates) > evicted_tokens // self.block_size
        return is_choice and any(blocks[i].block_id in self._awaited for i in candidates)

    def plan_eviction(self, request: Request, evicted_tokens: int) -> RequestCompaction:
        """Takes the lowest-scoring pages, ``evicted_tokens`` in all, out of a running sequence; among equals the
        oldest.

        Call :meth:`release` after the last request of a step.
        """
        self._take_place(request)
        candidates = self._candidates(request, evicted_tokens)
        blocks = self.req_to_blocks[request.request_id]
        scores = self.block_scores[[blocks[i].block_id for i in candidates]]
        lowest = np.argsort(scores, kind="stable")[: evicted_tokens // self.block_size]
        sinks, window = self.limits[request.request_id].sinks, self._window(request, evicted_tokens)
        return self._take_out(request, sorted(candidates[i] for i in lowest), sinks, window)

    def _candidates(self, request: Request, evicted_tokens: int) -> range:
        """Where in the sequence the pages are that lie wholly outside sinks and window; at least as many as are
        evicted.
        """
        first = cdiv(self.limits[request.request_id].sinks, self.block_size)
        end = (self.resident_tokens(request) - self._window(request, evicted_tokens)) // self.block_size
        return range(first, end)

    def _window(self, request: Request, evicted_tokens: int) -> int:
        kept = self.resident_tokens(request) - evicted_tokens
        return self.limits[request.request_id].protected_window(kept)
