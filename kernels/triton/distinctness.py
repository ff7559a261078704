"""How unlike the others of its head each resident key or value is: those of many sequences, two reads of them."""

import torch
import triton
import triton.language as tl

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.triton.columns import NUM_COLUMNS, RESIDENT, TABLE_ROW, TOKEN_START


@triton.jit
def vectors_of_program(
    cache_ptr,
    block_table_ptr,
    columns_ptr,
    num_kv_heads,
    block_table_stride,
    layer_stride,
    head_stride,
    FIRST_DIM: tl.constexpr,
):
    """The program's sequence is its first number, layer and head its second: (sequence, resident tokens, pages, vectors
    of layer and head).
    """
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    pages = block_table_ptr + tl.load(sequence + TABLE_ROW) * block_table_stride
    layer = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    vectors = cache_ptr + layer * layer_stride + tl.program_id(1) % num_kv_heads * head_stride + FIRST_DIM
    return sequence, tl.load(sequence + RESIDENT), pages, vectors


@triton.jit
def _anchor_at(anchors_ptr, dim, SIZE: tl.constexpr):
    """Where the program's anchor is."""
    return anchors_ptr + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * SIZE + dim


@triton.jit
def load_vectors(
    vectors,  # of one layer and head
    pages,
    token,
    resident,
    dim,
    block_stride,
    slot_stride,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """float32, a row per token, and their norms; 0, and at least a little, beyond the resident ones."""
    page = tl.load(pages + token // BLOCK_SIZE, mask=token < resident, other=0).to(tl.int64)
    at = vectors + page * block_stride + token % BLOCK_SIZE * slot_stride
    mask = (token < resident)[:, None] & (dim < SIZE)[None, :]
    loaded = tl.load(at[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    return loaded, tl.maximum(tl.sqrt(tl.sum(loaded * loaded, axis=1)), 1e-12)


@triton.jit(do_not_specialize=["block_table_stride"])
def _anchor_kernel(
    cache_ptr,  # [num_layers, num_blocks, num_kv_heads, block_size, content]
    block_table_ptr,  # [max_num_sequences, max_num_pages]
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    anchors_ptr,  # [num_sequences, num_layers * num_kv_heads, SIZE]
    num_kv_heads,
    block_table_stride,
    layer_stride,
    block_stride,
    head_stride,
    slot_stride,
    FIRST_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    _, resident, pages, vectors = vectors_of_program(
        cache_ptr, block_table_ptr, columns_ptr, num_kv_heads, block_table_stride, layer_stride, head_stride, FIRST_DIM
    )
    dim = tl.arange(0, DIMS)
    total = tl.zeros([DIMS], tl.float32)
    for start in range(0, resident, TILE):
        token = start + tl.arange(0, TILE)
        loaded, norms = load_vectors(vectors, pages, token, resident, dim, block_stride, slot_stride, SIZE, BLOCK_SIZE)
        total += tl.sum(loaded / norms[:, None], axis=0)
    norm = tl.maximum(tl.sqrt(tl.sum(total * total)), 1e-12)
    tl.store(_anchor_at(anchors_ptr, dim, SIZE), total / norm, mask=dim < SIZE)


@triton.jit(do_not_specialize=["block_table_stride"])
def _distinctness_kernel(
    cache_ptr,  # [num_layers, num_blocks, num_kv_heads, block_size, content]
    block_table_ptr,  # [max_num_sequences, max_num_pages]
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    anchors_ptr,  # [num_sequences, num_layers * num_kv_heads, SIZE]
    distinctness_ptr,  # flat [num_layers, num_kv_heads, resident_tokens] per sequence
    num_kv_heads,
    block_table_stride,
    layer_stride,
    block_stride,
    head_stride,
    slot_stride,
    FIRST_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence, resident, pages, vectors = vectors_of_program(
        cache_ptr, block_table_ptr, columns_ptr, num_kv_heads, block_table_stride, layer_stride, head_stride, FIRST_DIM
    )
    token = tl.program_id(2) * TILE + tl.arange(0, TILE)
    if tl.program_id(2) * TILE >= resident:
        return
    dim = tl.arange(0, DIMS)
    anchor = tl.load(_anchor_at(anchors_ptr, dim, SIZE), mask=dim < SIZE, other=0.0)
    loaded, norms = load_vectors(vectors, pages, token, resident, dim, block_stride, slot_stride, SIZE, BLOCK_SIZE)
    cosine = tl.sum(loaded * anchor[None, :], axis=1) / norms
    start = tl.load(sequence + TOKEN_START) * tl.num_programs(1) + tl.program_id(1) * resident
    tl.store(distinctness_ptr + start + token, -cosine, mask=token < resident)


@triton.jit
def _mean_of_neighbours_kernel(
    values_ptr,  # flat [num_layers, num_kv_heads, resident_tokens] per sequence
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    means_ptr,  # flat like values
    POOL: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    resident = tl.load(sequence + RESIDENT)
    token = tl.program_id(2) * TILE + tl.arange(0, TILE)
    start = tl.load(sequence + TOKEN_START) * tl.num_programs(1) + tl.program_id(1) * resident
    total = tl.zeros([TILE], tl.float32)
    count = tl.zeros([TILE], tl.float32)
    for offset in tl.static_range(POOL):
        neighbour = token + offset - POOL // 2
        is_there = (neighbour >= 0) & (neighbour < resident)
        total += tl.load(values_ptr + start + neighbour, mask=is_there, other=0.0)
        count += is_there.to(tl.float32)
    tl.store(means_ptr + start + token, total / tl.maximum(count, 1.0), mask=token < resident)


def constants_of(cache: StridedCache, of_values: bool) -> dict[str, int]:
    """What kernels that read values, or keys, are specialised on."""
    elements = cache.value_places if of_values else slice(0, cache.head_size)
    size = elements.stop - elements.start
    dims = triton.next_power_of_2(size)
    return {
        "FIRST_DIM": elements.start,
        "SIZE": size,
        "DIMS": dims,
        "BLOCK_SIZE": cache.block_size,
        "TILE": 8 if dims > 256 else 8192 // dims,  # as many tokens as there are registers for
        "num_warps": 8,
    }


def distinctness(cache: StridedCache, batch: CompactionBatch, of_values: bool, pool: int) -> torch.Tensor:
    """See :func:`vllm_qfilters.kernels.reference.distinctness`. The scales of an fp8 cache do not matter to angles.

    Args:
        cache: of this rank.
        batch: the sequences.
        of_values: of values instead of keys.
        pool: neighbours to average over, odd.

    Returns:
        float32, flat: ``[num_layers, num_kv_heads, resident_tokens]`` per sequence.
    """
    key_values = cache.key_values
    assert key_values.dtype.is_floating_point, f"keys and values of dtype {key_values.dtype}: view an fp8 cache as such"
    num_heads = cache.num_layers * cache.num_kv_heads
    constants = constants_of(cache, of_values)
    anchors = torch.empty(
        batch.num_sequences, num_heads, constants["SIZE"], dtype=torch.float32, device=key_values.device
    )
    turned_away = torch.empty(num_heads * batch.num_tokens, dtype=torch.float32, device=key_values.device)
    strides = cache.num_kv_heads, batch.block_table.stride(0), *key_values.stride()[:4]
    tables = key_values, batch.block_table, batch.columns, anchors
    _anchor_kernel[(batch.num_sequences, num_heads)](*tables, *strides, **constants)
    grid = (batch.num_sequences, num_heads, triton.cdiv(batch.max_resident, constants["TILE"]))
    _distinctness_kernel[grid](*tables, turned_away, *strides, **constants)
    if pool == 1:
        return turned_away
    means = torch.empty_like(turned_away)
    _mean_of_neighbours_kernel[(batch.num_sequences, num_heads, triton.cdiv(batch.max_resident, 1024))](
        turned_away, batch.columns, means, POOL=pool, TILE=1024
    )
    return means
