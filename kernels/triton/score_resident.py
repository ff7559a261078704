"""Scores of resident keys under filters of the moment: the paged keys of many sequences are read once for all query
heads.
"""

import torch
import triton
import triton.language as tl

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.ops import PLAIN_SOFTMAX, Softmax, Turns
from vllm_qfilters.kernels.triton import dots
from vllm_qfilters.kernels.triton.columns import NUM_COLUMNS, RESIDENT, TABLE_ROW, TOKEN_START
from vllm_qfilters.kernels.triton.dots import capped, split, tanh


@triton.jit
def _load_vectors(
    filters, factors, dim, slot, member, GROUP: tl.constexpr, RANK: tl.constexpr, HEAD_SIZE: tl.constexpr
):
    """Some dimensions of the filter (slot 0) and the factors (slots 1 to RANK) of each query head; 0 elsewhere."""
    is_member = (member < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]
    at = filters + member[:, None] * HEAD_SIZE + dim[None, :]
    vectors = tl.load(at, mask=is_member & (slot == 0)[:, None], other=0.0)
    if RANK > 0:
        at = factors + (member * RANK + slot - 1)[:, None] * HEAD_SIZE + dim[None, :]
        vectors += tl.load(at, mask=is_member & ((slot > 0) & (slot <= RANK))[:, None], other=0.0)
    return vectors


@triton.jit(
    do_not_specialize=[
        "num_layers",
        "block_table_stride",
        "filters_sequence_stride",
        "factors_sequence_stride",
        "turn_sequence_stride",
        "turn_layer_stride",
        "partner_layer_stride",
    ],
    do_not_specialize_on_alignment=["key_scales_ptr"],
)
def _score_resident_kernel(
    cache_ptr,  # [num_layers, num_blocks, num_kv_heads, block_size, head_size + value_size]
    block_table_ptr,  # [max_num_sequences, max_num_pages]
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    filters_ptr,  # [num_sequences or 1, num_layers, num_heads, head_size]
    factors_ptr,  # [num_sequences or 1, num_layers, num_heads, rank, head_size]
    key_scales_ptr,  # [num_layers]
    cos_ptr,  # [num_sequences, num_layers, head_size]
    sin_ptr,  # [num_sequences, num_layers, head_size]
    partner_ptr,  # [num_layers or 1, head_size]
    scores_ptr,  # flat [num_layers, num_heads, resident_tokens] per sequence
    num_layers,
    num_kv_heads,
    block_table_stride,
    filters_sequence_stride,
    factors_sequence_stride,
    turn_sequence_stride,
    turn_layer_stride,
    partner_layer_stride,
    cache_layer_stride,
    cache_block_stride,
    cache_head_stride,
    cache_slot_stride,
    GROUP: tl.constexpr,  # query heads per KV head
    MEMBERS: tl.constexpr,  # of them at once
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,  # of the filter and the factors, at once
    IS_SCALED: tl.constexpr,
    IS_TURNED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SOFT_CAP: tl.constexpr,  # 0: none
    OPERAND: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,  # multiplied at once
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    resident = tl.load(sequence + RESIDENT)
    token = tl.program_id(2) * TILE + tl.arange(0, TILE)
    is_token = token < resident
    if tl.program_id(2) * TILE >= resident:
        return
    parts: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    layer = (tl.program_id(1) // (num_kv_heads * parts)).to(tl.int64)
    head = tl.program_id(1) // parts % num_kv_heads
    members = tl.program_id(1) % parts * MEMBERS + tl.arange(0, MEMBERS)
    pages = block_table_ptr + tl.load(sequence + TABLE_ROW) * block_table_stride
    page = tl.load(pages + token // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
    key_at = cache_ptr + layer * cache_layer_stride + head * cache_head_stride
    key_at += page * cache_block_stride + token % BLOCK_SIZE * cache_slot_stride

    # The vectors of several query heads are the rows of one matrix, the keys the columns of another.
    num_heads = num_kv_heads * GROUP
    layer_head = layer * num_heads + head * GROUP
    filters = filters_ptr + tl.program_id(0) * filters_sequence_stride + layer_head * HEAD_SIZE
    factors = factors_ptr
    if RANK > 0:
        factors += tl.program_id(0) * factors_sequence_stride + layer_head * RANK * HEAD_SIZE
    turn = tl.program_id(0) * turn_sequence_stride + layer * turn_layer_stride
    vector = tl.arange(0, MEMBERS * SLOTS)
    member = tl.program_id(1) % parts * MEMBERS + vector // SLOTS
    score = tl.zeros([MEMBERS, TILE], tl.float32)
    variance = tl.zeros([MEMBERS, TILE], tl.float32)  # of capped logits
    for first_slot in range(0, 1 + RANK, SLOTS):
        slot = first_slot + vector % SLOTS
        projections = tl.zeros([MEMBERS * SLOTS, TILE], tl.float32)
        for first in range(0, HEAD_SIZE, DIMS):
            dim = first + tl.arange(0, DIMS)
            is_dim = dim < HEAD_SIZE
            keys = tl.load(key_at[None, :] + dim[:, None], mask=is_token[None, :] & is_dim[:, None], other=0.0).to(
                OPERAND
            )
            vectors = _load_vectors(filters, factors, dim, slot, member, GROUP, RANK, HEAD_SIZE)
            if IS_TURNED:
                partner = tl.load(partner_ptr + layer * partner_layer_stride + dim, mask=is_dim, other=HEAD_SIZE)
                others = _load_vectors(filters, factors, partner, slot, member, GROUP, RANK, HEAD_SIZE)
                cos = tl.load(cos_ptr + turn + dim, mask=is_dim, other=0.0)
                sin = tl.load(sin_ptr + turn + dim, mask=is_dim, other=0.0)
                vectors = vectors * cos[None, :] + others * sin[None, :]
            if IS_SPLIT:
                high, low = split(vectors)
                projections = tl.dot(high.to(OPERAND), keys, projections)
                projections = tl.dot(low.to(OPERAND), keys, projections)
            else:
                projections = tl.dot(vectors, keys, projections, input_precision="tf32x3")
        if IS_SCALED:
            projections *= tl.load(key_scales_ptr + layer)
        is_filter = (slot == 0)[:, None]
        if SOFT_CAP == 0:
            terms = tl.where(is_filter, projections, projections * projections / 2)
        else:
            terms = tl.where(is_filter, projections, 0.0)
            squares = tl.where(is_filter, 0.0, projections * projections)
            variance += tl.sum(tl.reshape(squares, [MEMBERS, SLOTS, TILE]), axis=1)
        score += tl.sum(tl.reshape(terms, [MEMBERS, SLOTS, TILE]), axis=1)
    if SOFT_CAP != 0:
        of_uncapped = tanh((score + variance / 2) / SOFT_CAP)
        slope = 1 - of_uncapped * of_uncapped
        score = capped(score + variance * slope, SOFT_CAP) - variance * slope * slope / 2

    scores = scores_ptr + tl.load(sequence + TOKEN_START) * num_layers * num_heads + layer_head * resident
    mask = (members < GROUP)[:, None] & is_token[None, :]
    tl.store(scores + members[:, None] * resident + token[None, :], score, mask=mask)


def score_resident(
    cache: StridedCache,
    batch: CompactionBatch,
    filters: torch.Tensor,
    factors: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    turns: Turns | None = None,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """``<k, R f> + sum_r <k, R g_r>^2 / 2`` of every resident key ``k``, for filter ``f`` and factors ``g_r`` of each
    query head; capped as :meth:`vllm_qfilters.kernels.ops.Ops.expected_attention` caps its exponents.

    Args:
        cache: of this rank.
        batch: the sequences.
        filters: float32, shape ``[num_sequences or 1, num_layers, num_heads, head_size]``: for each sequence its own,
            or one for all; ``num_heads`` a multiple of the KV heads, those of one KV head side by side.
        factors: float32, shape ``[num_sequences or 1, num_layers, num_heads, rank, head_size]``; None: none.
        key_scales: float32, shape ``[num_layers]``, for an fp8 cache: keys are what is stored times this.
        turns: ``R``, of each sequence; None: the identity.
        soft_cap: 0: none.

    Returns:
        float32, flat: ``[num_layers, num_heads, resident_tokens]`` per sequence.
    """
    num_filter_sets, num_layers, num_heads, head_size = filters.shape
    assert (num_layers, head_size) == (cache.num_layers, cache.head_size) and num_heads % cache.num_kv_heads == 0, (
        f"filters {tuple(filters.shape)} for {cache.num_layers} layers x {cache.num_kv_heads} KV heads x "
        f"{cache.head_size}"
    )
    assert filters.is_contiguous() and num_filter_sets in (1, batch.num_sequences)
    rank = 0
    if factors is not None:
        rank = factors.shape[3]
        assert factors.shape == (factors.shape[0], num_layers, num_heads, rank, head_size) and factors.is_contiguous()
        assert factors.shape[0] in (1, batch.num_sequences)
    key_values = cache.key_values
    assert key_values.dtype.is_floating_point, f"keys of dtype {key_values.dtype}: view an fp8 cache as such"
    if turns is not None:
        assert turns.cos.shape == turns.sin.shape == (batch.num_sequences, num_layers, head_size)
        assert turns.cos.stride() == turns.sin.stride() and turns.cos.stride(2) == 1
        assert turns.partner.shape in ((1, head_size), (num_layers, head_size)) and turns.partner.is_contiguous()
    scores = torch.empty(num_layers * num_heads * batch.num_tokens, dtype=torch.float32, device=key_values.device)
    # At ranks up to 15 all query heads of eight share one read of the keys.
    group, slots = num_heads // cache.num_kv_heads, min(triton.next_power_of_2(1 + rank), 128)
    members = max(min(triton.next_power_of_2(group), 128 // slots), dots.SMALLEST // slots)
    tile = min(256, (1 << 13) // (members * slots))
    num_parts = num_layers * cache.num_kv_heads * triton.cdiv(group, members)
    _score_resident_kernel[(batch.num_sequences, num_parts, triton.cdiv(batch.max_resident, tile))](
        key_values,
        batch.block_table,
        batch.columns,
        filters,
        factors,
        key_scales,
        None if turns is None else turns.cos,
        None if turns is None else turns.sin,
        None if turns is None else turns.partner,
        scores,
        num_layers,
        cache.num_kv_heads,
        batch.block_table.stride(0),
        filters.stride(0) if num_filter_sets > 1 else 0,
        factors.stride(0) if rank and factors.shape[0] > 1 else 0,
        0 if turns is None else turns.cos.stride(0),
        0 if turns is None else turns.cos.stride(1),
        head_size if turns is not None and turns.partner.shape[0] > 1 else 0,
        *key_values.stride()[:4],
        GROUP=group,
        MEMBERS=members,
        RANK=rank,
        SLOTS=slots,
        IS_SCALED=key_scales is not None,
        IS_TURNED=turns is not None,
        IS_SPLIT=dots.is_narrow(key_values.dtype),
        SOFT_CAP=soft_cap,
        OPERAND=dots.operand_dtype(key_values.dtype),
        HEAD_SIZE=head_size,
        DIMS=dots.dims_at_once(key_values.dtype),
        BLOCK_SIZE=cache.block_size,
        TILE=tile,
        num_warps=8,
        num_stages=2,
    )
    return scores


@triton.jit(do_not_specialize=["num_layer_heads"], do_not_specialize_on_alignment=["sinks_ptr"])
def _softmax_terms_kernel(
    logits_ptr,  # flat [num_layers, num_heads, resident_tokens] per sequence
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    terms_ptr,  # [num_sequences, num_layers * num_heads, 2]
    sinks_ptr,  # [num_layers * num_heads]
    num_layer_heads,
    HAS_SINKS: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    resident = tl.load(sequence + RESIDENT)
    logits = logits_ptr + tl.load(sequence + TOKEN_START) * num_layer_heads + tl.program_id(1) * resident
    largest = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, resident, TILE):
        token = start + tl.arange(0, TILE)
        largest = tl.maximum(largest, tl.load(logits + token, mask=token < resident, other=float("-inf")))
    top = tl.max(largest, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + tl.program_id(1))
        top = tl.maximum(top, sink)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, resident, TILE):
        token = start + tl.arange(0, TILE)
        total += tl.exp(tl.load(logits + token, mask=token < resident, other=float("-inf")) - top)
    terms = terms_ptr + (tl.program_id(0).to(tl.int64) * num_layer_heads + tl.program_id(1)) * 2
    tl.store(terms, top)
    sum_of_all = tl.sum(total, axis=0)
    if HAS_SINKS:
        sum_of_all += tl.exp(sink - top)
    tl.store(terms + 1, sum_of_all)


@triton.jit(do_not_specialize=["num_layer_kv_heads"], do_not_specialize_on_alignment=["group_sizes_ptr"])
def _mean_softmax_kernel(
    logits_ptr,  # flat [num_layers, num_kv_heads * GROUP, resident_tokens] per sequence
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    terms_ptr,  # [num_sequences, num_layers * num_kv_heads * GROUP, 2]
    attention_ptr,  # flat [num_layers, num_kv_heads, resident_tokens] per sequence
    group_sizes_ptr,  # [num_layers]
    num_layer_kv_heads,
    num_kv_heads,
    GROUP: tl.constexpr,
    HAS_GROUP_SIZES: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    resident = tl.load(sequence + RESIDENT)
    token = tl.program_id(2) * TILE + tl.arange(0, TILE)
    is_token = token < resident
    start = tl.load(sequence + TOKEN_START) * num_layer_kv_heads + tl.program_id(1) * resident
    terms = terms_ptr + (tl.program_id(0).to(tl.int64) * num_layer_kv_heads + tl.program_id(1)) * GROUP * 2
    total = tl.zeros([TILE], tl.float32)
    group = GROUP
    if HAS_GROUP_SIZES:
        group = tl.load(group_sizes_ptr + tl.program_id(1) // num_kv_heads).to(tl.int32)
    for member in range(group):
        logits = tl.load(logits_ptr + start * GROUP + member * resident + token, mask=is_token, other=0.0)
        total += tl.exp(logits - tl.load(terms + 2 * member)) / tl.load(terms + 2 * member + 1)
    tl.store(attention_ptr + start + token, total / group, mask=is_token)


def mean_softmax(
    logits: torch.Tensor,
    batch: CompactionBatch,
    num_layers: int,
    num_kv_heads: int,
    group: int,
    softmax: Softmax = PLAIN_SOFTMAX,
) -> torch.Tensor:
    """The softmax over tokens, and a sink, of each query head's logits, averaged over the query heads of a KV head.

    Args:
        logits: float32, flat: ``[num_layers, num_kv_heads * group, resident_tokens]`` per sequence.
        batch: the sequences.
        num_layers, num_kv_heads, group: of ``logits``.
        softmax: its sinks and group sizes.

    Returns:
        float32, flat: ``[num_layers, num_kv_heads, resident_tokens]`` per sequence.
    """
    num_heads, tile = num_layers * num_kv_heads, 1024
    terms = torch.empty(batch.num_sequences, num_heads * group, 2, dtype=torch.float32, device=logits.device)
    _softmax_terms_kernel[(batch.num_sequences, num_heads * group)](
        logits,
        batch.columns,
        terms,
        softmax.sinks,
        num_heads * group,
        HAS_SINKS=softmax.sinks is not None,
        TILE=tile,
    )
    attention = torch.empty(num_heads * batch.num_tokens, dtype=torch.float32, device=logits.device)
    _mean_softmax_kernel[(batch.num_sequences, num_heads, triton.cdiv(batch.max_resident, tile))](
        logits,
        batch.columns,
        terms,
        attention,
        softmax.group_sizes,
        num_heads,
        num_kv_heads,
        GROUP=group,
        HAS_GROUP_SIZES=softmax.group_sizes is not None,
        TILE=tile,
    )
    return attention
