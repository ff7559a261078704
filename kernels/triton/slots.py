"""Where the tokens of a step go in the cache, and how many tokens their sequences then hold there: in one launch."""

import torch
import triton
import triton.language as tl

_PAD_SLOT: tl.constexpr = tl.constexpr(-1)


@triton.jit
def _slots_and_lengths_kernel(
    idx_mapping_ptr,  # [num_reqs], row of each request in the block tables, -1 for requests that stand for nobody
    query_start_loc_ptr,  # [num_reqs + 1]
    positions_ptr,  # [num_tokens]
    evicted_ptr,  # [num_reqs]
    compressed_ptr,  # [num_groups]
    block_table_ptrs,  # [num_groups], addresses of int32 [max_num_reqs, max_num_blocks]
    block_table_strides,  # [num_groups]
    block_sizes,  # [num_groups]
    has_slots_ptr,  # [num_groups]
    slots_ptr,  # [num_groups, max_num_tokens]
    lengths_ptr,  # [num_groups, max_num_reqs]
    slots_stride,
    lengths_stride,
    TILE: tl.constexpr,
):
    group = tl.program_id(0)
    request = tl.program_id(1)
    slots = slots_ptr + group * slots_stride
    lengths = lengths_ptr + group * lengths_stride
    start = tl.load(query_start_loc_ptr + request)
    if request == tl.num_programs(1) - 1:
        # What lies behind the step's tokens and requests may be read by graphs that were captured for more of them.
        for first in range(start, slots_stride, TILE):
            token = first + tl.arange(0, TILE)
            tl.store(slots + token, _PAD_SLOT, mask=token < slots_stride)
        for first in range(request, lengths_stride, TILE):
            row = first + tl.arange(0, TILE)
            tl.store(lengths + row, 0, mask=row < lengths_stride)
        return
    end = tl.load(query_start_loc_ptr + request + 1)
    table_row = tl.load(idx_mapping_ptr + request)
    is_real = (table_row >= 0) & (tl.load(has_slots_ptr + group) != 0)
    shift = tl.load(evicted_ptr + request) * tl.load(compressed_ptr + group)
    block_size = tl.load(block_sizes + group)
    pages = tl.cast(tl.load(block_table_ptrs + group), tl.pointer_type(tl.int32))
    pages += table_row * tl.load(block_table_strides + group)
    for first in range(start, end, TILE):
        token = first + tl.arange(0, TILE)
        place = tl.load(positions_ptr + token, mask=token < end, other=0) - shift
        page = tl.load(pages + place // block_size, mask=(token < end) & is_real, other=0).to(tl.int64)
        slot = tl.where(is_real, page * block_size + place % block_size, _PAD_SLOT)
        tl.store(slots + token, slot, mask=token < end)
    last = tl.load(positions_ptr + end - 1, mask=end > start, other=-1)
    tl.store(lengths + request, (last + 1 - tl.where(end > start, shift, 0)).to(tl.int32))


def compute_slots_and_lengths(
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    evicted: torch.Tensor,
    compressed: torch.Tensor,
    block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    block_sizes: torch.Tensor,
    has_slots: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Writes the slots of a step's tokens, and what their sequences hold with them; without context parallelism.

    Args:
        idx_mapping: row of each request in the block tables, shape ``[num_reqs]``, int; -1: its tokens go nowhere.
        query_start_loc: first token of each request, shape ``[num_reqs + 1]`` or more, int32.
        positions: of the tokens, shape ``[num_tokens]`` or more, int64.
        evicted: from each request, in tokens, shape ``[num_reqs]`` or more, int32.
        compressed: 1 for groups of layers that evict, shape ``[num_groups]``, int32.
        block_table_ptrs: addresses of the groups' block tables, shape ``[num_groups]``, uint64.
        block_table_strides: their rows' lengths, shape ``[num_groups]``, int64.
        block_sizes: tokens per page, shape ``[num_groups]``, int32.
        has_slots: groups whose tokens have slots, shape ``[num_groups]``, bool.
        slots: written in place, -1 behind the last token, shape ``[num_groups, max_num_tokens]``, int64.
        lengths: written in place, 0 behind the last request, shape ``[num_groups, max_num_reqs]``, int32.
    """
    assert slots.is_contiguous() and lengths.is_contiguous() and slots.shape[0] == lengths.shape[0]
    num_reqs = idx_mapping.shape[0]
    _slots_and_lengths_kernel[(slots.shape[0], num_reqs + 1)](
        idx_mapping,
        query_start_loc,
        positions,
        evicted,
        compressed,
        block_table_ptrs,
        block_table_strides,
        block_sizes,
        has_slots,
        slots,
        lengths,
        slots.stride(0),
        lengths.stride(0),
        TILE=1024,
    )
