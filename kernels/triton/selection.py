"""Which tokens stay: scores of resident tokens, made comparable between heads that share a selection, and the best of
them.

Many sequences in one launch, see :mod:`vllm_qfilters.kernels.batch` for how they lie in flat tensors.
"""

import torch
import triton
import triton.language as tl

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.triton.columns import EVICTED, NUM_COLUMNS, RESIDENT, SINKS, TABLE_ROW, TOKEN_START, WINDOW


@triton.jit(do_not_specialize=["num_layers", "block_table_stride"])
def _gather_scores_kernel(
    plane_ptr,  # [num_layers, num_blocks, num_kv_heads, block_size]
    block_table_ptr,  # [max_num_sequences, max_num_pages]
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    scores_ptr,  # flat [num_layers, num_kv_heads, resident_tokens] per sequence
    num_layers,
    num_kv_heads,
    plane_layer_stride,
    plane_block_stride,
    plane_head_stride,
    block_table_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    resident = tl.load(sequence + RESIDENT)
    token = tl.program_id(2) * TILE + tl.arange(0, TILE)
    is_token = token < resident
    layer = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    head = tl.program_id(1) % num_kv_heads
    pages = block_table_ptr + tl.load(sequence + TABLE_ROW) * block_table_stride
    page = tl.load(pages + token // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
    at = (
        plane_ptr
        + layer * plane_layer_stride
        + page * plane_block_stride
        + head * plane_head_stride
        + token % BLOCK_SIZE
    )
    start = tl.load(sequence + TOKEN_START) * num_layers * num_kv_heads + tl.program_id(1) * resident
    tl.store(scores_ptr + start + token, tl.load(at, mask=is_token, other=0.0), mask=is_token)


def gather_scores(plane: torch.Tensor, batch: CompactionBatch) -> torch.Tensor:
    """The scores stored beside the keys, in the order of their tokens.

    Args:
        plane: shape ``[num_layers, num_blocks, num_kv_heads, block_size]``, float32.
        batch: the sequences.

    Returns:
        float32, flat: ``[num_layers, num_kv_heads, resident_tokens]`` per sequence.
    """
    num_layers, _, num_kv_heads, block_size = plane.shape
    assert plane.stride(3) == batch.block_table.stride(1) == 1
    scores = torch.empty(num_layers * num_kv_heads * batch.num_tokens, dtype=torch.float32, device=plane.device)
    tile = 1024
    _gather_scores_kernel[(batch.num_sequences, num_layers * num_kv_heads, triton.cdiv(batch.max_resident, tile))](
        plane,
        batch.block_table,
        batch.columns,
        scores,
        num_layers,
        num_kv_heads,
        *plane.stride()[:3],
        batch.block_table.stride(0),
        BLOCK_SIZE=block_size,
        TILE=tile,
    )
    return scores


@triton.jit(do_not_specialize=["num_layer_heads"])
def _head_moments_kernel(
    scores_ptr,  # flat [num_layers, num_heads, resident_tokens] per sequence
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    moments_ptr,  # [num_sequences, num_layers * num_heads, 2]
    num_layer_heads,
    TILE: tl.constexpr,
):
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    resident = tl.load(sequence + RESIDENT)
    first = tl.load(sequence + SINKS)
    last = resident - tl.load(sequence + WINDOW)
    scores = scores_ptr + tl.load(sequence + TOKEN_START) * num_layer_heads + tl.program_id(1) * resident
    # Two passes: the variance of scores far from zero would drown in the square of their mean.
    total = tl.zeros([TILE], tl.float32)
    for start in range(first, last, TILE):
        token = start + tl.arange(0, TILE)
        total += tl.load(scores + token, mask=token < last, other=0.0)
    count = tl.maximum(last - first, 1).to(tl.float32)
    mean = tl.sum(total) / count
    squares = tl.zeros([TILE], tl.float32)
    for start in range(first, last, TILE):
        token = start + tl.arange(0, TILE)
        deviation = tl.load(scores + token, mask=token < last, other=0.0) - mean
        squares += tl.where(token < last, deviation * deviation, 0.0)
    moments = moments_ptr + (tl.program_id(0).to(tl.int64) * num_layer_heads + tl.program_id(1)) * 2
    tl.store(moments, mean)
    tl.store(moments + 1, tl.maximum(tl.sqrt(tl.sum(squares) / count), 1e-12))


@triton.jit(do_not_specialize=["num_layers"])
def _mean_standardised_kernel(
    scores_ptr,  # flat [num_layers, num_heads, resident_tokens] per sequence
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    moments_ptr,  # [num_sequences, num_layers * num_heads, 2]
    shared_ptr,  # flat [num_layers, 1, resident_tokens] per sequence
    num_layers,
    num_heads,
    TILE: tl.constexpr,
):
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    layer = tl.program_id(1).to(tl.int64)
    resident = tl.load(sequence + RESIDENT)
    token_start = tl.load(sequence + TOKEN_START)
    token = tl.program_id(2) * TILE + tl.arange(0, TILE)
    is_token = token < resident
    scores = scores_ptr + (token_start * num_layers + layer * resident) * num_heads
    moments = moments_ptr + (tl.program_id(0).to(tl.int64) * num_layers + layer) * num_heads * 2
    total = tl.zeros([TILE], tl.float32)
    for head in range(num_heads):
        score = tl.load(scores + head * resident + token, mask=is_token, other=0.0)
        total += (score - tl.load(moments + 2 * head)) / tl.load(moments + 2 * head + 1)
    shared = shared_ptr + token_start * num_layers + layer * resident
    tl.store(shared + token, total / num_heads, mask=is_token)


def mean_standardised(scores: torch.Tensor, batch: CompactionBatch, num_layers: int, num_heads: int) -> torch.Tensor:
    """The mean over heads of each token's z-score among the tokens between sinks and window.

    Args:
        scores: float32, flat: ``[num_layers, num_heads, resident_tokens]`` per sequence.
        batch: the sequences.
        num_layers, num_heads: of ``scores``.

    Returns:
        float32, flat: ``[num_layers, 1, resident_tokens]`` per sequence.
    """
    moments = torch.empty(batch.num_sequences, num_layers * num_heads, 2, dtype=torch.float32, device=scores.device)
    _head_moments_kernel[(batch.num_sequences, num_layers * num_heads)](
        scores, batch.columns, moments, num_layers * num_heads, TILE=1024
    )
    shared = torch.empty(num_layers * batch.num_tokens, dtype=torch.float32, device=scores.device)
    tile = 1024
    _mean_standardised_kernel[(batch.num_sequences, num_layers, triton.cdiv(batch.max_resident, tile))](
        scores, batch.columns, moments, shared, num_layers, num_heads, TILE=tile
    )
    return shared


@triton.jit
def _ordered_bits(score):
    """uint32 in the order of the floats."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit(do_not_specialize=["num_layer_heads"])
def _select_kept_kernel(
    scores_ptr,  # flat [num_layers, num_heads, resident_tokens] per sequence
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    is_kept_ptr,  # flat [num_layers, num_heads, resident_tokens] per sequence
    num_layer_heads,
    TILE: tl.constexpr,
):
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    resident = tl.load(sequence + RESIDENT)
    first = tl.load(sequence + SINKS)
    last = resident - tl.load(sequence + WINDOW)
    first_score = tl.load(sequence + TOKEN_START) * num_layer_heads + tl.program_id(1) * resident
    scores = scores_ptr + first_score

    # The digits of the lowest score that stays, 8 bits at a time from the highest: each time those of the tokens that
    # agree with it so far are counted.
    digits = tl.arange(0, 256)
    threshold = tl.zeros([], tl.uint32)
    remaining = (last - first - tl.load(sequence + EVICTED)).to(tl.int32)
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros([256], tl.int32)
        for start in range(first, last, TILE):
            token = start + tl.arange(0, TILE)
            bits = _ordered_bits(tl.load(scores + token, mask=token < last, other=0.0))
            agrees = token < last
            if shift < 24:
                agrees = agrees & ((bits >> (shift + 8)) == (threshold >> (shift + 8)))
            counts += tl.histogram(tl.where(agrees, (bits >> shift) & 255, 0).to(tl.int32), 256)
            counts -= tl.where(digits == 0, tl.sum((~agrees).to(tl.int32)), 0)
        at_least = tl.sum(counts) - tl.cumsum(counts) + counts  # tokens whose digit is this or higher
        digit = tl.sum((at_least >= remaining).to(tl.int32)) - 1
        remaining -= tl.sum(tl.where(digits == digit, at_least - counts, 0))
        threshold |= digit.to(tl.uint32) << shift

    # Of the tokens at the threshold the first `remaining` stay.
    ties_before = 0
    for start in range(0, resident, TILE):
        token = start + tl.arange(0, TILE)
        is_candidate = (token >= first) & (token < last)
        bits = _ordered_bits(tl.load(scores + token, mask=is_candidate, other=0.0))
        is_tie = (is_candidate & (bits == threshold)).to(tl.int32)
        rank = ties_before + tl.cumsum(is_tie)
        is_best = (bits > threshold) | ((is_tie > 0) & (rank <= remaining))
        ties_before += tl.sum(is_tie)
        tl.store(is_kept_ptr + first_score + token, (is_best | ~is_candidate).to(tl.int8), mask=token < resident)


def select_kept(scores: torch.Tensor, batch: CompactionBatch, num_layers: int, num_heads: int) -> torch.Tensor:
    """The tokens each head keeps: the sinks, the window, and between them those with the highest scores.

    Exactly as many as stay, also among ties: the first of them.

    Args:
        scores: float32, flat: ``[num_layers, num_heads, resident_tokens]`` per sequence.
        batch: the sequences.
        num_layers, num_heads: of ``scores``; one head where the heads of a layer keep the same tokens.

    Returns:
        int8, flat like ``scores``: 1 for tokens that stay.
    """
    is_kept = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    _select_kept_kernel[(batch.num_sequences, num_layers * num_heads)](
        scores, batch.columns, is_kept, num_layers * num_heads, TILE=2048, num_warps=8
    )
    return is_kept
