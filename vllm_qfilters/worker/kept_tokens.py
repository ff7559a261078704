"""Which tokens of which positions every layer and KV head of this rank still holds: recorded for ``vllm-qfilters
inspect``.

Off unless asked for; a model runner then shows every eviction to a :class:`KeptTokens`. Knows tensors, not vLLM.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from vllm_qfilters.plan import PrefixHit, RequestCompaction


class KeptTokens:
    """The positions of resident tokens, in the order they lie in the cache, of requests that have evicted any.

    Args:
        num_layers, num_kv_heads: of this rank.
        block_size: tokens per page.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, block_size: int) -> None:
        self._shape = (num_layers, num_kv_heads)
        self._block_size = block_size
        self._positions: dict[str, torch.Tensor] = {}  # [num_layers, num_kv_heads, resident_tokens], int64
        self._ends: dict[str, int] = {}  # position after the last of them
        self._of_page: dict[int, torch.Tensor] = {}  # positions, of pages that sequences held behind a cut

    def follow(self, compaction: RequestCompaction, is_kept: torch.Tensor) -> None:
        """Follows the tokens of a sequence through a compaction.

        Args:
            compaction: what was planned.
            is_kept: what was decided, shape ``[num_layers, num_kv_heads or 1, resident_tokens]``.
        """
        positions = self._before(compaction)
        is_kept = is_kept.to("cpu", torch.bool).expand(*self._shape, -1)
        self._keep(compaction, positions[is_kept].view(*self._shape, -1))

    def take_out_pages(self, compaction: RequestCompaction, old_block_ids: Sequence[int]) -> None:
        """Page granularity: the pages of ``old_block_ids`` that ``compaction`` does not have any more left the
        sequence.
        """
        kept_pages = set(compaction.block_ids)
        is_kept = torch.tensor([block_id in kept_pages for block_id in old_block_ids])
        is_kept = is_kept.repeat_interleave(self._block_size)[: compaction.resident_tokens]
        self._keep(compaction, self._before(compaction)[..., is_kept])

    def start(self, hit: PrefixHit) -> None:
        """A request starts behind a compressed prefix, which was made since this record began."""
        self._positions[hit.req_id] = torch.cat([self._of_page[page] for page in hit.block_ids], dim=-1)
        self._ends[hit.req_id] = hit.cut

    def restart(self, req_ids: Iterable[str]) -> None:
        """Requests whose pages are gone, and which start again after a preemption."""
        for req_id in req_ids:
            self._positions.pop(req_id, None)
            self._ends.pop(req_id, None)

    def masks(self) -> dict[str, tuple[int, bytes]]:
        """By request: the number of positions before its last eviction, and which of them are held, one bit each.

        The bits are those of ``numpy.packbits`` of a bool array of shape ``[num_layers, num_kv_heads, num_positions]``.
        Positions after those are held by all.
        """
        found = {}
        for req_id, positions in self._positions.items():
            mask = torch.zeros(*self._shape, self._ends[req_id], dtype=torch.bool).scatter_(-1, positions, True)
            found[req_id] = (self._ends[req_id], np.packbits(mask.numpy()).tobytes())
        return found

    def _before(self, compaction: RequestCompaction) -> torch.Tensor:
        """Tokens since the last eviction lie behind those of then, in order."""
        known = self._positions.get(compaction.req_id, torch.zeros(*self._shape, 0, dtype=torch.int64))
        num_new = compaction.resident_tokens - known.shape[-1]
        new = torch.arange(compaction.position - num_new, compaction.position).expand(*self._shape, -1)
        return torch.cat((known, new), dim=-1)

    def _keep(self, compaction: RequestCompaction, positions: torch.Tensor) -> None:
        self._positions[compaction.req_id] = positions
        self._ends[compaction.req_id] = compaction.position
        # The last page may be filled later.
        self._of_page.update(zip(compaction.block_ids, positions.split(self._block_size, dim=-1), strict=False))
