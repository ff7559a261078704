"""How many tokens each sequence has evicted, on the worker side. Owns ``evicted`` in this process."""

from collections.abc import Iterable, Sequence

import numpy as np


class EvictedTokens:
    """Tokens evicted per request; resident tokens are computed tokens minus these."""

    def __init__(self) -> None:
        self._evicted: dict[str, int] = {}

    def add(self, req_id: str, tokens: int) -> None:
        self._evicted[req_id] = self._evicted.get(req_id, 0) + tokens

    def forget(self, req_ids: Iterable[str]) -> None:
        """Requests that ended, or start again after a preemption."""
        for req_id in req_ids:
            self._evicted.pop(req_id, None)

    def rows(self, req_ids: Sequence[str]) -> np.ndarray | None:
        """Shape ``[len(req_ids)]``, int32; None if none of the requests has evicted anything."""
        if not self._evicted:
            return None
        return np.array([self._evicted.get(req_id, 0) for req_id in req_ids], dtype=np.int32)
