"""Compaction in place: whole pages leave sequences, and only the survivors in them move. Any number of sequences per
launch.

What :func:`vllm_qfilters.kernels.reference.compact` does to one sequence, in three launches: private copies of pages
that may not be written, the pairing of survivors with holes, and the moves.
"""

import torch
import triton
import triton.language as tl

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.triton.columns import (
    EVICTED,
    MOVE_START,
    NEW_START,
    NUM_COLUMNS,
    RESIDENT,
    SINKS,
    TABLE_ROW,
    TOKEN_START,
    WINDOW,
)


@triton.jit(do_not_specialize=["block_table_stride"], do_not_specialize_on_alignment=["copied_pages_ptr"])
def _copy_pages_kernel(
    words_ptr,  # [num_layers, num_blocks, num_words]
    block_table_ptr,  # [max_num_sequences, max_num_pages]
    copied_pages_ptr,  # [num_copies, 3]
    num_words,
    block_table_stride,
    layer_stride,
    block_stride,
    TILE: tl.constexpr,
):
    copy = copied_pages_ptr + tl.program_id(0) * 3
    source = tl.load(block_table_ptr + tl.load(copy) * block_table_stride + tl.load(copy + 1)).to(tl.int64)
    layer = words_ptr + tl.program_id(1).to(tl.int64) * layer_stride
    word = tl.program_id(2) * TILE + tl.arange(0, TILE)
    content = tl.load(layer + source * block_stride + word, mask=word < num_words)
    tl.store(layer + tl.load(copy + 2) * block_stride + word, content, mask=word < num_words)


def copy_pages(cache: StridedCache, batch: CompactionBatch) -> None:
    """Makes private copies of pages that may not be written, planes included, and enters them in the block table."""
    num_copies, tile = batch.copied_pages.shape[0], 2048
    if num_copies == 0:
        return
    for words in (cache.words, cache.words_of_planes):
        if words is None:
            continue
        num_words = words.shape[2]
        _copy_pages_kernel[(num_copies, cache.num_layers, triton.cdiv(num_words, tile))](
            words,
            batch.block_table,
            batch.copied_pages,
            num_words,
            batch.block_table.stride(0),
            words.stride(0),
            words.stride(1),
            TILE=tile,
        )
    row, place, page = batch.copied_pages.unbind(1)
    batch.block_table[row, place] = page.to(batch.block_table.dtype)


@triton.jit
def _taken_out(sequence, BLOCK_SIZE: tl.constexpr):
    """The first token of the pages taken out, the first behind them, and the first behind those that make room for
    sinks.
    """
    evicted = tl.load(sequence + EVICTED)
    first_out = (tl.load(sequence + RESIDENT) - evicted - tl.load(sequence + WINDOW)) // BLOCK_SIZE * BLOCK_SIZE
    return first_out, first_out + evicted, tl.maximum(tl.load(sequence + SINKS), first_out) + evicted


@triton.jit
def _max_moves(sequence):
    evicted = tl.load(sequence + EVICTED)
    return tl.minimum(evicted, tl.load(sequence + RESIDENT) - evicted - tl.load(sequence + WINDOW))


@triton.jit(do_not_specialize=["num_layer_selections"])
def _pair_moves_kernel(
    is_kept_ptr,  # flat [num_layers, num_selections, resident_tokens] per sequence
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    sources_ptr,  # flat [num_layers, num_selections, max_moves] per sequence
    holes_ptr,  # flat [num_layers, num_selections, max_moves] per sequence
    counts_ptr,  # [num_sequences, num_layers * num_selections]
    num_layer_selections,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    resident = tl.load(sequence + RESIDENT)
    first_out, after_out, after_displaced = _taken_out(sequence, BLOCK_SIZE)
    is_kept_ptr += tl.load(sequence + TOKEN_START) * num_layer_selections + tl.program_id(1) * resident
    moves_start = tl.load(sequence + MOVE_START) * num_layer_selections + tl.program_id(1) * _max_moves(sequence)
    num_sources = 0
    num_holes = 0
    for start in range(0, resident - tl.load(sequence + WINDOW), TILE):
        token = start + tl.arange(0, TILE)
        is_token = token < resident - tl.load(sequence + WINDOW)
        is_kept = tl.load(is_kept_ptr + token, mask=is_token, other=0) != 0
        is_out = (token >= first_out) & (token < after_out)
        is_displaced = (token >= after_out) & (token < after_displaced)
        is_source = is_token & is_kept & (is_out | is_displaced)
        is_hole = is_token & (~is_out) & ((~is_kept) | is_displaced)
        source = num_sources + tl.cumsum(is_source.to(tl.int32)) - 1
        hole = num_holes + tl.cumsum(is_hole.to(tl.int32)) - 1
        tl.store(sources_ptr + moves_start + source, token, mask=is_source)
        tl.store(holes_ptr + moves_start + hole, token, mask=is_hole)
        num_sources += tl.sum(is_source.to(tl.int32))
        num_holes += tl.sum(is_hole.to(tl.int32))
    tl.store(counts_ptr + tl.program_id(0) * num_layer_selections + tl.program_id(1), num_sources)


@triton.jit(do_not_specialize=["num_layers", "block_table_stride"])
def _move_kernel(
    cache_ptr,  # [num_layers, num_blocks, num_kv_heads, block_size, content]
    planes_ptr,  # [num_layers, num_blocks, num_planes, num_kv_heads, block_size]
    block_table_ptr,  # [max_num_sequences, max_num_pages]
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    new_pages_ptr,  # the pages of the sequences afterwards
    sources_ptr,  # flat [num_layers, num_selections, max_moves] per sequence
    holes_ptr,  # flat [num_layers, num_selections, max_moves] per sequence
    counts_ptr,  # [num_sequences, num_layers * num_selections]
    num_layers,
    num_kv_heads,
    num_selections,
    block_table_stride,
    cache_layer_stride,
    cache_block_stride,
    cache_head_stride,
    cache_slot_stride,
    planes_layer_stride,
    planes_block_stride,
    planes_plane_stride,
    planes_head_stride,
    CONTENT: tl.constexpr,  # elements of a key and a value, or of a key that stands alone
    NUM_PLANES: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    layer = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    head = tl.program_id(1) % num_kv_heads
    layer_selection = layer * num_selections + tl.minimum(head, num_selections - 1)
    count = tl.load(counts_ptr + tl.program_id(0) * num_layers * num_selections + layer_selection)
    first_tile = tl.program_id(2)
    num_tiles = tl.cdiv(count, TILE)
    if first_tile >= num_tiles:
        return

    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    first_out, after_out, after_displaced = _taken_out(sequence, BLOCK_SIZE)
    if after_displaced == after_out:
        num_tiles = first_tile + 1
    elif first_tile > 0:
        return
    # Where sinks displace tokens, a later move reads what an earlier one writes to: one program does all, from the last
    # on.

    old_pages = block_table_ptr + tl.load(sequence + TABLE_ROW) * block_table_stride
    new_pages = new_pages_ptr + tl.load(sequence + NEW_START)
    pages_out = tl.load(sequence + EVICTED) // BLOCK_SIZE
    moves = tl.load(sequence + MOVE_START) * num_layers * num_selections + layer_selection * _max_moves(sequence)
    cache = cache_ptr + layer * cache_layer_stride + head * cache_head_stride
    planes = planes_ptr + layer * planes_layer_stride + head * planes_head_stride
    plane = tl.arange(0, PLANES)
    element = tl.arange(0, ELEMENTS)
    for done in range(num_tiles - first_tile):
        move = (num_tiles - 1 - done) * TILE + tl.arange(0, TILE)
        is_move = move < count
        source = tl.load(sources_ptr + moves + move, mask=is_move, other=0)
        hole = tl.load(holes_ptr + moves + move, mask=is_move, other=0)

        # Pages taken out are only in the old table; of all others the new one is right, also where the page is a copy.
        is_out = (source >= first_out) & (source < after_out)
        old_page = tl.load(old_pages + source // BLOCK_SIZE, mask=is_move & is_out, other=0).to(tl.int64)
        source_index = source // BLOCK_SIZE - tl.where(source >= after_out, pages_out, 0)
        kept_page = tl.load(new_pages + source_index, mask=is_move & (~is_out), other=0)
        source_page = tl.where(is_out, old_page, kept_page)
        hole_index = hole // BLOCK_SIZE - tl.where(hole >= after_out, pages_out, 0)
        hole_page = tl.load(new_pages + hole_index, mask=is_move, other=0)

        mask = is_move[:, None] & (element < CONTENT)[None, :]
        source_at = cache + source_page * cache_block_stride + source % BLOCK_SIZE * cache_slot_stride
        hole_at = cache + hole_page * cache_block_stride + hole % BLOCK_SIZE * cache_slot_stride
        content = tl.load(source_at[:, None] + element[None, :], mask=mask)
        plane_mask = is_move[:, None] & (plane < NUM_PLANES)[None, :]
        source_numbers = planes + source_page * planes_block_stride + source % BLOCK_SIZE
        hole_numbers = planes + hole_page * planes_block_stride + hole % BLOCK_SIZE
        numbers = tl.load(source_numbers[:, None] + plane[None, :] * planes_plane_stride, mask=plane_mask)
        tl.debug_barrier()  # all of a tile is read before any of it is written
        tl.store(hole_at[:, None] + element[None, :], content, mask=mask)
        tl.store(hole_numbers[:, None] + plane[None, :] * planes_plane_stride, numbers, mask=plane_mask)
        tl.debug_barrier()


def compact(cache: StridedCache, batch: CompactionBatch, is_kept: torch.Tensor, num_selections: int) -> None:
    """Takes whole pages out of the sequences of ``batch``; the survivors in them fill the holes before the window.

    The pages taken out are the last whole pages before the window. No other token moves, so the window stays in order,
    and sinks stay first. No two sequences may write the same page, nor one write what another reads: :func:`copy_pages`
    before.

    Args:
        cache: of this rank; keys, values and planes move together.
        batch: the sequences.
        is_kept: int8, flat: ``[num_layers, num_selections, resident_tokens]`` per sequence, 1 for tokens that stay.
        num_selections: 1 where the heads of a layer keep the same tokens, else the number of KV heads.
    """
    assert num_selections in (1, cache.num_kv_heads), f"{num_selections} selections for {cache.num_kv_heads} KV heads"
    if batch.max_moves == 0:
        return
    key_values = cache.key_values
    num_layer_selections = cache.num_layers * num_selections
    sources = torch.empty(num_layer_selections * batch.num_moves, dtype=torch.int32, device=key_values.device)
    holes = torch.empty_like(sources)
    counts = torch.empty(batch.num_sequences, num_layer_selections, dtype=torch.int32, device=key_values.device)
    _pair_moves_kernel[(batch.num_sequences, num_layer_selections)](
        is_kept,
        batch.columns,
        sources,
        holes,
        counts,
        num_layer_selections,
        BLOCK_SIZE=cache.block_size,
        TILE=1024,
    )
    tile = 16
    bits = key_values.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[key_values.element_size()])
    _move_kernel[(batch.num_sequences, cache.num_layers * cache.num_kv_heads, triton.cdiv(batch.max_moves, tile))](
        bits,
        cache.planes,
        batch.block_table,
        batch.columns,
        batch.new_pages,
        sources,
        holes,
        counts,
        cache.num_layers,
        cache.num_kv_heads,
        num_selections,
        batch.block_table.stride(0),
        *bits.stride()[:4],
        *cache.planes.stride()[:4],
        CONTENT=key_values.shape[4],
        NUM_PLANES=cache.planes.shape[2],
        PLANES=triton.next_power_of_2(max(1, cache.planes.shape[2])),
        BLOCK_SIZE=cache.block_size,
        TILE=tile,
        ELEMENTS=triton.next_power_of_2(key_values.shape[4]),
    )
