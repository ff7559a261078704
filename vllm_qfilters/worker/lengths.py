"""How many tokens sequences hold in the caches that are compressed. The only owner of that in a worker process.

vLLM's model runners keep counting positions. What must count resident tokens asks here: metadata builders of our
attention backends (:mod:`vllm_qfilters.attention.resident`) take what was evicted off the lengths that attention sees,
and slots are shifted where they are computed. A group of layers that is not compressed has a shift of 0.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata


class ResidentLengths:
    """Tokens evicted per request; resident tokens are computed tokens minus these.

    Args:
        compressed: of each group of layers that share a cache, whether it is compressed.

    Attributes:
        of_step: tokens evicted from each request of the step, in the order of the batch, shape ``[num_reqs]``, int32;
            None where none of them has evicted any.
    """

    def __init__(self, compressed: Sequence[bool] = (True,)) -> None:
        self.compressed = tuple(compressed)
        self.of_step: np.ndarray[Any, np.dtype[np.int32]] | None = None
        self._evicted: dict[str, int] = {}

    def add(self, req_id: str, tokens: int) -> None:
        self._evicted[req_id] = self._evicted.get(req_id, 0) + tokens

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drops requests that ended, or start again after a preemption."""
        for req_id in req_ids:
            self._evicted.pop(req_id, None)

    def start_step(self, req_ids: Sequence[str]) -> None:
        """Announces the requests of a step, in the order of the batch."""
        evicted = [self._evicted.get(req_id, 0) for req_id in req_ids] if self._evicted else []
        self.of_step = np.array(evicted, dtype=np.int32) if any(evicted) else None

    def skip_step(self) -> None:
        """Announces a step without requests, which vLLM runs to warm up or to keep others company."""
        self.of_step = None

    def resident(self, metadata: CommonAttentionMetadata, group: int) -> CommonAttentionMetadata:
        """The metadata of a step with lengths in resident tokens.

        Args:
            metadata: vLLM's, with lengths in positions.
            group: of layers.
        """
        if self.of_step is None or not self.compressed[group]:
            return metadata
        return dataclasses.replace(
            metadata,
            seq_lens=self._less_evicted(metadata.seq_lens),
            _num_computed_tokens_cache=None,
            **self._on_host(metadata),
        )

    def shifted(self, positions: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        """Where the tokens of a step stand among the resident ones of their requests; on CPUs.

        Args:
            positions: of the tokens, shape ``[num_tokens]``, int64.
            query_start_loc: of the requests, shape ``[num_reqs + 1]``.
        """
        if self.of_step is None:
            return positions
        num_tokens = query_start_loc.diff()[: len(self.of_step)]
        by_token = torch.repeat_interleave(torch.from_numpy(self.of_step), num_tokens)
        return positions - by_token

    def _on_host(self, metadata: CommonAttentionMetadata) -> dict[str, Any]:
        upper_bound = metadata.seq_lens_cpu_upper_bound
        if upper_bound is None:
            return {}
        upper_bound = self._less_evicted(upper_bound)
        return {"seq_lens_cpu_upper_bound": upper_bound, "max_seq_len": int(upper_bound.max())}

    def _less_evicted(self, lengths: torch.Tensor) -> torch.Tensor:
        """``lengths``, on the host, of the step's requests and padding behind them."""
        assert self.of_step is not None
        lengths = lengths.clone()
        lengths[: len(self.of_step)].sub_(torch.from_numpy(self.of_step))
        return lengths


class DeviceResidentLengths(ResidentLengths):
    """Writes lengths to buffers that stay where they are, since captured CUDA graphs read them there.

    Args:
        compressed: as above.
        max_num_reqs: most requests of a step.
        device: of the buffers.
    """

    def __init__(self, compressed: Sequence[bool], max_num_reqs: int, device: torch.device) -> None:
        super().__init__(compressed)
        self._lengths = torch.zeros(len(compressed), max_num_reqs, dtype=torch.int32, device=device)
        self._compressed = torch.tensor(compressed, dtype=torch.int32, device=device)
        self._nothing = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self._is_real = False  # of_step and the buffers are those of a step with requests

    def start_step(self, req_ids: Sequence[str]) -> None:
        super().start_step(req_ids)
        self._is_real = True

    def skip_step(self) -> None:
        super().skip_step()
        self._is_real = False

    def resident(self, metadata: CommonAttentionMetadata, group: int) -> CommonAttentionMetadata:
        if not self.compressed[group]:
            return metadata
        lengths = self._lengths[group, : metadata.seq_lens.shape[0]]
        if not self._is_real:
            lengths.copy_(metadata.seq_lens)
        on_host = {} if self.of_step is None else self._on_host(metadata)
        return dataclasses.replace(metadata, seq_lens=lengths, _num_computed_tokens_cache=None, **on_host)

    def compute_slot_mappings(
        self,
        block_tables: Any,
        idx_mapping: torch.Tensor,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        num_tokens_padded: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Stands in for the method of vLLM's ``BlockTables``: slots and resident lengths, in the one launch that slots
        take anyway.

        Args:
            block_tables: vLLM's ``BlockTables``.
            idx_mapping, query_start_loc, positions, num_tokens_padded, out: as for the method.
        """
        from vllm_qfilters.kernels.triton.slots import compute_slots_and_lengths

        assert out is None and block_tables.cp_size == 1
        evicted = self._nothing if self.of_step is None else async_tensor_h2d(self.of_step, device=self._nothing.device)
        compute_slots_and_lengths(
            idx_mapping,
            query_start_loc,
            positions,
            evicted,
            self._compressed,
            block_tables.block_table_ptrs,
            block_tables.block_table_strides,
            block_tables.block_sizes_tensor,
            block_tables.slot_mapping_enabled,
            block_tables.slot_mappings,
            self._lengths,
        )
        return block_tables.slot_mappings[:, :num_tokens_padded]
