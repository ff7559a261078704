"""The norm of each resident value: those of many sequences, one read of them."""

import torch
import triton
import triton.language as tl

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.triton.columns import TOKEN_START
from vllm_qfilters.kernels.triton.distinctness import constants_of, load_vectors, vectors_of_program


@triton.jit(do_not_specialize=["block_table_stride"])
def _value_norms_kernel(
    cache_ptr,  # [num_layers, num_blocks, num_kv_heads, block_size, content]
    block_table_ptr,  # [max_num_sequences, max_num_pages]
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    norms_ptr,  # flat [num_layers, num_kv_heads, resident_tokens] per sequence
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
    sequence, resident, pages, values = vectors_of_program(
        cache_ptr, block_table_ptr, columns_ptr, num_kv_heads, block_table_stride, layer_stride, head_stride, FIRST_DIM
    )
    token = tl.program_id(2) * TILE + tl.arange(0, TILE)
    if tl.program_id(2) * TILE >= resident:
        return
    dim = tl.arange(0, DIMS)
    _, norms = load_vectors(values, pages, token, resident, dim, block_stride, slot_stride, SIZE, BLOCK_SIZE)
    start = tl.load(sequence + TOKEN_START) * tl.num_programs(1) + tl.program_id(1) * resident
    tl.store(norms_ptr + start + token, norms, mask=token < resident)


def value_norms(cache: StridedCache, batch: CompactionBatch) -> torch.Tensor:
    """See :func:`vllm_qfilters.kernels.reference.value_norms`.

    Returns:
        float32, flat: ``[num_layers, num_kv_heads, resident_tokens]`` per sequence.
    """
    key_values = cache.key_values
    assert key_values.dtype.is_floating_point, f"values of dtype {key_values.dtype}: view an fp8 cache as such"
    num_heads = cache.num_layers * cache.num_kv_heads
    norms = torch.empty(num_heads * batch.num_tokens, dtype=torch.float32, device=key_values.device)
    constants = constants_of(cache, of_values=True)
    _value_norms_kernel[(batch.num_sequences, num_heads, triton.cdiv(batch.max_resident, constants["TILE"]))](
        key_values,
        batch.block_table,
        batch.columns,
        norms,
        cache.num_kv_heads,
        batch.block_table.stride(0),
        *key_values.stride()[:4],
        **constants,
    )
    return norms
