"""The write of a step's keys and values into the paged cache, fused with the scores of the keys: keys are read once."""

import torch
import triton
import triton.language as tl

from vllm_qfilters.kernels.ops import TokenStat

_PROJECTION: tl.constexpr = tl.constexpr(TokenStat.PROJECTION.value)
_NEGATIVE_KEY_NORM: tl.constexpr = tl.constexpr(TokenStat.NEGATIVE_KEY_NORM.value)
_RANDOM: tl.constexpr = tl.constexpr(TokenStat.RANDOM.value)

MOST_TOKENS_OF_SMALL_TILES = 512
LARGEST_OF_LARGE_TILES = 256  # elements of a key: registers for as many
NUMBERS_OF_TOKENS = (1, MOST_TOKENS_OF_SMALL_TILES + 1)  # one of each size of tile

_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit(
    do_not_specialize=["num_tokens", "seed"], do_not_specialize_on_alignment=["key_scale_ptr", "value_scale_ptr"]
)
def _write_and_score_kernel(
    key_ptr,  # [num_tokens, num_kv_heads, head_size]
    value_ptr,  # [num_tokens, num_kv_heads, value_size]
    cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size + value_size]; not read unless WRITES
    planes_ptr,  # [num_blocks, num_planes, num_kv_heads, block_size]
    filters_ptr,  # [num_kv_heads, head_size]
    slots_ptr,  # [num_tokens]
    key_scale_ptr,  # [1]
    value_scale_ptr,  # [1]
    num_tokens,
    seed,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_slot_stride,
    planes_block_stride,
    planes_head_stride,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WRITES: tl.constexpr,  # keys and values too
    BLOCK_SIZE: tl.constexpr,
    SCORE: tl.constexpr,
    FP8_MAX: tl.constexpr,  # 0: the cache has the dtype of keys and values
    TILE: tl.constexpr,
    DIMS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.load(slots_ptr + token, mask=token < num_tokens, other=-1)
    is_token = slot >= 0
    page = slot // BLOCK_SIZE
    in_page = slot % BLOCK_SIZE
    dim = tl.arange(0, DIMS)
    key_mask = is_token[:, None] & (dim < HEAD_SIZE)[None, :]
    value_mask = is_token[:, None] & (dim < VALUE_SIZE)[None, :]
    token = token.to(tl.int64)

    key_at = key_ptr + token[:, None] * key_token_stride + head * key_head_stride + dim[None, :]
    key = tl.load(key_at, mask=key_mask, other=0.0)

    if WRITES:
        value_at = value_ptr + token[:, None] * value_token_stride + head * value_head_stride + dim[None, :]
        value = tl.load(value_at, mask=value_mask, other=0.0)
        row = cache_ptr + page * cache_block_stride + head * cache_head_stride + in_page * cache_slot_stride
        at = row[:, None] + dim[None, :]
        if FP8_MAX > 0:
            # Rounded as by vLLM's operator for FLASH_ATTN and FLASHINFER, which divides exactly. On GPUs / does not,
            # nor does vLLM's kernel for TRITON_ATTN.
            scaled_key = tl.div_rn(key.to(tl.float32), tl.load(key_scale_ptr))
            scaled_value = tl.div_rn(value.to(tl.float32), tl.load(value_scale_ptr))
            quantised_key = tl.clamp(scaled_key, -FP8_MAX, FP8_MAX)
            quantised_value = tl.clamp(scaled_value, -FP8_MAX, FP8_MAX)
            tl.store(at, quantised_key.to(cache_ptr.dtype.element_ty), mask=key_mask)
            tl.store(at + HEAD_SIZE, quantised_value.to(cache_ptr.dtype.element_ty), mask=value_mask)
        else:
            tl.store(at, key, mask=key_mask)
            tl.store(at + HEAD_SIZE, value, mask=value_mask)

    if SCORE > 0:
        key = key.to(tl.float32)
        if SCORE == _NEGATIVE_KEY_NORM:
            score = -tl.sqrt(tl.sum(key * key, axis=1))
        elif SCORE == _PROJECTION:
            filters = tl.load(filters_ptr + head * HEAD_SIZE + dim, mask=dim < HEAD_SIZE, other=0.0)
            score = tl.sum(key * filters[None, :], axis=1)
        else:
            weight = (dim % 7 + 1).to(tl.float32)
            bits = tl.sum(key * weight[None, :], axis=1).to(tl.int32, bitcast=True)
            score = tl.rand(seed, bits)
        plane_at = planes_ptr + page * planes_block_stride + head * planes_head_stride + in_page
        tl.store(plane_at, score, mask=is_token)


def write_and_score(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor | None,
    planes: torch.Tensor,
    slot_mapping: torch.Tensor,
    stat: TokenStat,
    filters: torch.Tensor | None = None,
    seed: int = 0,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """Writes keys, values and the keys' scores to the slots of their tokens. Reads no tensor on the host: fit for CUDA
    graphs.

    Args:
        key: shape ``[num_tokens, num_kv_heads, head_size]``, elements of a head side by side; tokens beyond
            ``slot_mapping`` are padding.
        value: likewise, of ``value_size``, which is no more than ``head_size``.
        cache: one layer's view ``[num_blocks, num_kv_heads, block_size, head_size + value_size]``, of the dtype of the
            keys or fp8; None where vLLM has written keys and values.
        planes: of that layer, shape ``[num_blocks, num_planes, num_kv_heads, block_size]``, float32; written in place.
        slot_mapping: shape ``[num_tokens]``, int64: ``page * block_size + slot``, -1 for padding.
        stat: what to store in the first plane; computed before quantising.
        filters: shape ``[num_kv_heads, head_size]``, float32, for ``TokenStat.PROJECTION``.
        seed: for ``TokenStat.RANDOM``.
        key_scale, value_scale: one float32 each, for an fp8 cache: what is stored is ``key / key_scale``.
    """
    num_tokens, (num_kv_heads, head_size), value_size = slot_mapping.shape[0], key.shape[1:], value.shape[2]
    num_blocks, _, _, block_size = planes.shape
    assert planes.shape[2] == num_kv_heads and planes.dtype == torch.float32
    assert key.stride(2) == value.stride(2) == planes.stride(3) == 1, "innermost dimensions must be dense"
    assert value.shape[1] == num_kv_heads and value_size <= head_size, (
        f"values {tuple(value.shape)}, keys {tuple(key.shape)}"
    )
    is_fp8 = cache is not None and cache.dtype in _FP8_DTYPES
    if cache is not None:
        content = head_size + value_size
        assert cache.shape == (num_blocks, num_kv_heads, block_size, content) and cache.stride(3) == 1, (
            f"cache {tuple(cache.shape)} for keys {tuple(key.shape)} and values {tuple(value.shape)}"
        )
        assert is_fp8 or cache.dtype == key.dtype == value.dtype, (
            f"cache {cache.dtype}, keys {key.dtype}, values {value.dtype}"
        )
    assert not is_fp8 or key_scale.numel() == value_scale.numel() == 1, "an fp8 cache needs one scale each"
    assert stat != TokenStat.PROJECTION or (filters.shape == key.shape[1:] and filters.is_contiguous()), (
        "a filter per KV head"
    )
    if num_tokens == 0:
        return
    is_small = num_tokens <= MOST_TOKENS_OF_SMALL_TILES or head_size > LARGEST_OF_LARGE_TILES
    tile = 4 if is_small else 16
    _write_and_score_kernel[(triton.cdiv(num_tokens, tile), num_kv_heads)](
        key,
        value,
        cache,
        planes,
        filters,
        slot_mapping,
        key_scale,
        value_scale,
        num_tokens,
        seed,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        *((0, 0, 0) if cache is None else cache.stride()[:3]),
        planes.stride(0),
        planes.stride(2),
        HEAD_SIZE=head_size,
        VALUE_SIZE=value_size,
        WRITES=cache is not None,
        BLOCK_SIZE=block_size,
        SCORE=int(stat),
        FP8_MAX=torch.finfo(cache.dtype).max if cache is not None and is_fp8 else 0.0,
        TILE=tile,
        DIMS=triton.next_power_of_2(head_size),
    )
