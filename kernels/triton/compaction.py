"""Compaction in place: whole pages leave sequences, and the tokens that stay move up in their order. Any number of
sequences per launch.

What :func:`vllm_qfilters.kernels.reference.compact` does to one sequence, in three launches: private copies of pages
that may not be written, the numbers of the tokens that stay, and the moves.
"""

import torch
import triton
import triton.language as tl

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.triton.columns import (
    EVICTED,
    NEW_START,
    NUM_COLUMNS,
    RESIDENT,
    SOURCE_START,
    TABLE_ROW,
    TOKEN_START,
    WINDOW,
)

_ELEMENTS_AT_ONCE = 4096  # that one program moves: as many as its registers hold


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
def _kept_before_window(sequence):
    return tl.load(sequence + RESIDENT) - tl.load(sequence + EVICTED) - tl.load(sequence + WINDOW)


@triton.jit(do_not_specialize=["num_layer_selections"])
def _find_sources_kernel(
    is_kept_ptr,  # flat [num_layers, num_selections, resident_tokens] per sequence
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    sources_ptr,  # flat [num_layers, num_selections, kept_before_window] per sequence
    num_layer_selections,
    TILE: tl.constexpr,
):
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    resident = tl.load(sequence + RESIDENT)
    end = resident - tl.load(sequence + WINDOW)
    is_kept_ptr += tl.load(sequence + TOKEN_START) * num_layer_selections + tl.program_id(1) * resident
    sources_ptr += tl.load(sequence + SOURCE_START) * num_layer_selections
    sources_ptr += tl.program_id(1) * _kept_before_window(sequence)
    num_kept = 0
    for start in range(0, end, TILE):
        token = start + tl.arange(0, TILE)
        is_kept = (tl.load(is_kept_ptr + token, mask=token < end, other=0) != 0).to(tl.int32)
        tl.store(sources_ptr + num_kept + tl.cumsum(is_kept) - 1, token, mask=is_kept != 0)
        num_kept += tl.sum(is_kept)


@triton.jit(do_not_specialize=["num_layers", "block_table_stride"], do_not_specialize_on_alignment=["new_pages_ptr"])
def _move_kernel(
    cache_ptr,  # [num_layers, num_blocks, num_kv_heads, block_size, content]
    planes_ptr,  # [num_layers, num_blocks, num_planes, num_kv_heads, block_size]
    block_table_ptr,  # [max_num_sequences, max_num_pages]
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    new_pages_ptr,  # the pages of the sequences afterwards
    sources_ptr,  # flat [num_layers, num_selections, kept_before_window] per sequence
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
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    num_kept = _kept_before_window(sequence)
    evicted = tl.load(sequence + EVICTED)
    first_out = num_kept // BLOCK_SIZE * BLOCK_SIZE
    old_pages = block_table_ptr + tl.load(sequence + TABLE_ROW) * block_table_stride
    new_pages = new_pages_ptr + tl.load(sequence + NEW_START)
    sources = sources_ptr + tl.load(sequence + SOURCE_START) * num_layers * num_selections + layer_selection * num_kept
    cache = cache_ptr + layer * cache_layer_stride + head * cache_head_stride
    planes = planes_ptr + layer * planes_layer_stride + head * planes_head_stride
    plane = tl.arange(0, PLANES)
    element = tl.arange(0, ELEMENTS)

    # In one program, so that nothing is written before it is read: what moves back goes first to last; then what moves
    # on, which is what goes behind the pages taken out, last to first.
    num_tiles = tl.cdiv(num_kept, TILE)
    num_turns = num_tiles + num_tiles - first_out // TILE
    for turn in range(num_turns):
        moves_back = turn < num_tiles
        tile = tl.where(moves_back, turn, 2 * num_tiles - 1 - turn)
        place = tile * TILE + tl.arange(0, TILE)
        source = tl.load(sources + place, mask=place < num_kept, other=0)
        place_before = place + tl.where(place >= first_out, evicted, 0)
        is_move = (place < num_kept) & tl.where(moves_back, source > place_before, source < place_before)

        # Pages taken out are only in the old table; of all others the new one is right, also where the page is a copy.
        is_out = (source >= first_out) & (source < first_out + evicted)
        old_page = tl.load(old_pages + source // BLOCK_SIZE, mask=is_move & is_out, other=0).to(tl.int64)
        source_after = source - tl.where(source < first_out, 0, evicted)
        kept_page = tl.load(new_pages + source_after // BLOCK_SIZE, mask=is_move & (~is_out), other=0)
        source_page = tl.where(is_out, old_page, kept_page)
        page = tl.load(new_pages + place // BLOCK_SIZE, mask=is_move, other=0)

        mask = is_move[:, None] & (element < CONTENT)[None, :]
        source_at = cache + source_page * cache_block_stride + source % BLOCK_SIZE * cache_slot_stride
        place_at = cache + page * cache_block_stride + place % BLOCK_SIZE * cache_slot_stride
        content = tl.load(source_at[:, None] + element[None, :], mask=mask)
        plane_mask = is_move[:, None] & (plane < NUM_PLANES)[None, :]
        source_numbers = planes + source_page * planes_block_stride + source % BLOCK_SIZE
        place_numbers = planes + page * planes_block_stride + place % BLOCK_SIZE
        numbers = tl.load(source_numbers[:, None] + plane[None, :] * planes_plane_stride, mask=plane_mask)
        tl.debug_barrier()  # all of a tile is read before any of it is written
        tl.store(place_at[:, None] + element[None, :], content, mask=mask)
        tl.store(place_numbers[:, None] + plane[None, :] * planes_plane_stride, numbers, mask=plane_mask)
        tl.debug_barrier()


def compact(cache: StridedCache, batch: CompactionBatch, is_kept: torch.Tensor, num_selections: int) -> None:
    """Takes whole pages out of the sequences of ``batch``; the tokens that stay move up in their order.

    The pages taken out are the last whole pages before the window, so that the window stays where it is. No two
    sequences may write the same page, nor one write what another reads: :func:`copy_pages` before.

    Args:
        cache: of this rank; keys, values and planes move together.
        batch: the sequences.
        is_kept: int8, flat: ``[num_layers, num_selections, resident_tokens]`` per sequence, 1 for tokens that stay.
        num_selections: 1 where the heads of a layer keep the same tokens, else the number of KV heads.
    """
    assert num_selections in (1, cache.num_kv_heads), f"{num_selections} selections for {cache.num_kv_heads} KV heads"
    if batch.kept_before_windows == 0:
        return
    key_values = cache.key_values
    num_layer_selections = cache.num_layers * num_selections
    sources = torch.empty(num_layer_selections * batch.kept_before_windows, dtype=torch.int32, device=key_values.device)
    _find_sources_kernel[(batch.num_sequences, num_layer_selections)](
        is_kept, batch.columns, sources, num_layer_selections, TILE=1024
    )
    bits = key_values.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[key_values.element_size()])
    elements = triton.next_power_of_2(key_values.shape[4])
    _move_kernel[(batch.num_sequences, cache.num_layers * cache.num_kv_heads)](
        bits,
        cache.planes,
        batch.block_table,
        batch.columns,
        batch.new_pages,
        sources,
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
        TILE=max(1, _ELEMENTS_AT_ONCE // elements),
        ELEMENTS=elements,
    )
