"""The attention that the last queries of prompts pay to the tokens of their sequences: what is left of it beside the
keys.

What :func:`vllm_qfilters.kernels.reference.observed_attention` computes of one sequence, for all prompts of a step in
three launches: the terms of each query's softmax; mean and peak over queries and query heads; both over neighbours.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from vllm_qfilters.kernels.batch import NOT_OBSERVED, CompactionBatch
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.ops import OBSERVATIONS_AT_ONCE, Observation, Softmax
from vllm_qfilters.kernels.triton import dots
from vllm_qfilters.kernels.triton.columns import NUM_COLUMNS, RESIDENT, TABLE_ROW, TOKEN_START, UNOBSERVED
from vllm_qfilters.kernels.triton.dots import capped
from vllm_qfilters.kernels.triton.selection import gather_scores

_NOT_OBSERVED: tl.constexpr = tl.constexpr(NOT_OBSERVED)


@triton.jit
def _load_observation(observations_ptr, columns_ptr):
    """(pointer to the sequence of the batch, first query, number of queries, tokens that the last query has seen, is a
    question).
    """
    observation = observations_ptr + tl.program_id(0) * 5
    sequence = columns_ptr + tl.load(observation) * NUM_COLUMNS
    num_seen = tl.load(sequence + RESIDENT) - tl.load(observation + 3)
    return sequence, tl.load(observation + 1), tl.load(observation + 2), num_seen, tl.load(observation + 4) != 0


@triton.jit
def _logits(
    query_at,  # of each query
    index,  # of each query
    key_at,  # of each token
    token,  # of each token
    num_queries,
    num_group_queries,
    num_seen,
    scale,
    SOFT_CAP: tl.constexpr,  # 0: none
    OPERAND: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of each query and token; those to come are not seen."""
    logits = tl.zeros([QUERIES, TILE], tl.float32)
    is_query = index < num_group_queries
    is_token = token < num_seen
    for first in range(0, HEAD_SIZE, DIMS):
        dim = first + tl.arange(0, DIMS)
        is_dim = dim < HEAD_SIZE
        queries = tl.load(query_at[:, None] + dim[None, :], mask=is_query[:, None] & is_dim[None, :], other=0.0)
        keys = tl.load(key_at[None, :] + dim[:, None], mask=is_token[None, :] & is_dim[:, None], other=0.0)
        logits = tl.dot(queries.to(OPERAND), keys.to(OPERAND), logits, input_precision="tf32x3")
    last_seen = num_seen - num_queries + index % num_queries
    logits = capped(logits * scale, SOFT_CAP)
    return tl.where(token[None, :] <= last_seen[:, None], logits, float("-inf"))


@triton.jit
def _group_size(group_sizes_ptr, layer, GROUP: tl.constexpr, HAS_GROUP_SIZES: tl.constexpr):
    """Query heads of a KV head of a layer; there are ``GROUP``, and some of them may be padding."""
    group = GROUP
    if HAS_GROUP_SIZES:
        group = tl.load(group_sizes_ptr + layer).to(tl.int32)
    return group


@triton.jit
def _key_at(keys, pages, token, num_seen, block_stride, slot_stride, BLOCK_SIZE: tl.constexpr):
    """Where the keys of tokens lie, of one layer and head."""
    page = tl.load(pages + token // BLOCK_SIZE, mask=token < num_seen, other=0).to(tl.int64)
    return keys + page * block_stride + token % BLOCK_SIZE * slot_stride


@triton.jit(
    do_not_specialize=["max_group_queries", "block_table_stride", "queries_layer_stride", "queries_head_stride"],
    do_not_specialize_on_alignment=["sinks_ptr", "group_sizes_ptr"],
)
def _observed_terms_kernel(
    cache_ptr,  # [num_layers, num_blocks, num_kv_heads, block_size, head_size + value_size]
    block_table_ptr,  # [max_num_sequences, max_num_pages]
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    observations_ptr,  # [num_observations, 5]
    queries_ptr,  # [num_layers, num_heads, all queries, head_size]
    terms_ptr,  # [num_observations, num_layers * num_kv_heads, max_group_queries, 2]
    sinks_ptr,  # [num_layers, num_heads]
    group_sizes_ptr,  # [num_layers]
    scale,
    num_kv_heads,
    max_group_queries,
    block_table_stride,
    queries_layer_stride,
    queries_head_stride,
    queries_query_stride,
    cache_layer_stride,
    cache_block_stride,
    cache_head_stride,
    cache_slot_stride,
    GROUP: tl.constexpr,
    HAS_GROUP_SIZES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    OPERAND: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,  # multiplied at once
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,  # of one program
    TILE: tl.constexpr,
):
    sequence, first_query, num_queries, num_seen, _ = _load_observation(observations_ptr, columns_ptr)
    index = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    layer = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    head = tl.program_id(1) % num_kv_heads
    num_group_queries = _group_size(group_sizes_ptr, layer, GROUP, HAS_GROUP_SIZES) * num_queries
    if tl.program_id(2) * QUERIES >= num_group_queries:
        return
    query_at = queries_ptr + layer * queries_layer_stride + (head * GROUP + index // num_queries) * queries_head_stride
    query_at += (first_query + index % num_queries) * queries_query_stride
    pages = block_table_ptr + tl.load(sequence + TABLE_ROW) * block_table_stride
    cache = cache_ptr + layer * cache_layer_stride + head * cache_head_stride
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in range(0, num_seen, TILE):
        token = start + tl.arange(0, TILE)
        key_at = _key_at(cache, pages, token, num_seen, cache_block_stride, cache_slot_stride, BLOCK_SIZE)
        logits = _logits(
            query_at, index, key_at, token, num_queries, num_group_queries, num_seen, scale, SOFT_CAP, OPERAND,
            HEAD_SIZE, DIMS, QUERIES, TILE,
        )  # fmt: skip
        # The first tile holds the first token, which every query sees: from there on nothing is -inf - -inf.
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger[:, None]), axis=1)
        largest = larger
    if HAS_SINKS:
        sink_at = sinks_ptr + (layer * num_kv_heads + head) * GROUP + index // num_queries
        sink = tl.load(sink_at, mask=index < num_group_queries, other=float("-inf"))
        larger = tl.maximum(largest, sink)
        total = total * tl.exp(largest - larger) + tl.exp(sink - larger)
        largest = larger
    heads = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    terms = terms_ptr + (heads * max_group_queries + index) * 2
    tl.store(terms, largest, mask=index < num_group_queries)
    tl.store(terms + 1, total, mask=index < num_group_queries)


@triton.jit(
    do_not_specialize=["max_group_queries", "block_table_stride", "queries_layer_stride", "queries_head_stride"],
    do_not_specialize_on_alignment=["sinks_ptr", "group_sizes_ptr"],
)
def _observed_attention_kernel(
    cache_ptr,  # [num_layers, num_blocks, num_kv_heads, block_size, head_size + value_size]
    block_table_ptr,  # [max_num_sequences, max_num_pages]
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    observations_ptr,  # [num_observations, 5]
    queries_ptr,  # [num_layers, num_heads, all queries, head_size]
    terms_ptr,  # [num_observations, num_layers * num_kv_heads, max_group_queries, 2]
    mean_ptr,  # flat [num_layers, num_kv_heads, resident_tokens] per sequence
    peak_ptr,  # likewise
    sinks_ptr,  # [num_layers, num_heads]
    group_sizes_ptr,  # [num_layers]
    scale,
    num_kv_heads,
    max_group_queries,
    block_table_stride,
    queries_layer_stride,
    queries_head_stride,
    queries_query_stride,
    cache_layer_stride,
    cache_block_stride,
    cache_head_stride,
    cache_slot_stride,
    GROUP: tl.constexpr,
    HAS_GROUP_SIZES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    OPERAND: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,  # multiplied at once
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,  # at once
    TILE: tl.constexpr,
):
    sequence, first_query, num_queries, num_seen, _ = _load_observation(observations_ptr, columns_ptr)
    resident = tl.load(sequence + RESIDENT)
    token = tl.program_id(2) * TILE + tl.arange(0, TILE)
    if tl.program_id(2) * TILE >= resident:
        return
    layer = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    head = tl.program_id(1) % num_kv_heads
    pages = block_table_ptr + tl.load(sequence + TABLE_ROW) * block_table_stride
    cache = cache_ptr + layer * cache_layer_stride + head * cache_head_stride
    key_at = _key_at(cache, pages, token, num_seen, cache_block_stride, cache_slot_stride, BLOCK_SIZE)
    heads = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    total_attention = tl.zeros([TILE], tl.float32)
    peak = tl.zeros([TILE], tl.float32)
    num_group_queries = _group_size(group_sizes_ptr, layer, GROUP, HAS_GROUP_SIZES) * num_queries
    for first in range(0, num_group_queries, QUERIES):
        index = first + tl.arange(0, QUERIES)
        query_at = (
            queries_ptr + layer * queries_layer_stride + (head * GROUP + index // num_queries) * queries_head_stride
        )
        query_at += (first_query + index % num_queries) * queries_query_stride
        is_query = index < num_group_queries
        terms = terms_ptr + (heads * max_group_queries + index) * 2
        largest = tl.load(terms, mask=is_query, other=float("inf"))
        total = tl.load(terms + 1, mask=is_query, other=1.0)
        logits = _logits(
            query_at, index, key_at, token, num_queries, num_group_queries, num_seen, scale, SOFT_CAP, OPERAND,
            HEAD_SIZE, DIMS, QUERIES, TILE,
        )  # fmt: skip
        attention = tl.exp(logits - largest[:, None]) / total[:, None]
        total_attention += tl.sum(attention, axis=0)
        peak = tl.maximum(peak, tl.max(attention, axis=0))
    start = tl.load(sequence + TOKEN_START) * tl.num_programs(1) + tl.program_id(1) * resident
    tl.store(mean_ptr + start + token, total_attention / num_group_queries, mask=token < resident)
    tl.store(peak_ptr + start + token, peak, mask=token < resident)


@triton.jit(do_not_specialize=["block_table_stride"])
def _pool_kernel(
    mean_ptr,  # flat [num_layers, num_kv_heads, resident_tokens] per sequence
    peak_ptr,  # likewise
    block_table_ptr,  # [max_num_sequences, max_num_pages]
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    observations_ptr,  # [num_observations, 5]
    plane_ptr,  # [num_layers, num_blocks, num_kv_heads, block_size]
    observed_ptr,  # flat [num_layers, num_kv_heads, resident_tokens] per sequence
    num_kv_heads,
    block_table_stride,
    plane_layer_stride,
    plane_block_stride,
    plane_head_stride,
    MEAN_POOL: tl.constexpr,
    PEAK_BEFORE: tl.constexpr,
    PEAK_BEHIND: tl.constexpr,
    SHARED_BY_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence, _, _, num_seen, is_question = _load_observation(observations_ptr, columns_ptr)
    resident = tl.load(sequence + RESIDENT)
    token = tl.program_id(2) * TILE + tl.arange(0, TILE)
    start = tl.load(sequence + TOKEN_START) * tl.num_programs(1) + tl.program_id(1) * resident
    mean = tl.zeros([TILE], tl.float32)
    for offset in tl.static_range(MEAN_POOL):
        neighbour = token + offset - MEAN_POOL // 2
        mean += (
            tl.load(mean_ptr + start + neighbour, mask=(neighbour >= 0) & (neighbour < num_seen), other=0.0) / MEAN_POOL
        )
    layer = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    head = tl.program_id(1) % num_kv_heads
    pages = block_table_ptr + tl.load(sequence + TABLE_ROW) * block_table_stride
    page = tl.load(pages + token // BLOCK_SIZE, mask=token < resident, other=0).to(tl.int64)
    at = (
        plane_ptr
        + layer * plane_layer_stride
        + page * plane_block_stride
        + head * plane_head_stride
        + token % BLOCK_SIZE
    )
    mean = tl.where(token < num_seen, mean, _NOT_OBSERVED)
    tl.store(at, mean, mask=token < resident)
    observed = mean
    if is_question:
        peak = tl.zeros([TILE], tl.float32)
        first_head, num_heads = start, 1
        if SHARED_BY_HEADS:
            first_head, num_heads = start - head * resident, num_kv_heads
        for offset in tl.static_range(PEAK_BEFORE + 1 + PEAK_BEHIND):
            neighbour = token + offset - PEAK_BEHIND
            is_seen = (neighbour >= 0) & (neighbour < num_seen)
            for any_head in range(num_heads):
                at_head = peak_ptr + first_head + any_head * resident
                peak = tl.maximum(peak, tl.load(at_head + neighbour, mask=is_seen, other=0.0))
        observed = tl.where(token < num_seen, peak, _NOT_OBSERVED)
    tl.store(observed_ptr + start + token, observed, mask=token < resident)


@triton.jit(do_not_specialize=["block_table_stride"])
def _forget_kernel(
    block_table_ptr,  # [max_num_sequences, max_num_pages]
    columns_ptr,  # [num_sequences, NUM_COLUMNS]
    plane_ptr,  # [num_layers, num_blocks, num_kv_heads, block_size]
    num_kv_heads,
    block_table_stride,
    plane_layer_stride,
    plane_block_stride,
    plane_head_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence = columns_ptr + tl.program_id(0) * NUM_COLUMNS
    resident = tl.load(sequence + RESIDENT)
    first = resident - tl.load(sequence + UNOBSERVED)
    if (tl.program_id(2) + 1) * TILE <= first:
        return
    token = tl.program_id(2) * TILE + tl.arange(0, TILE)
    is_unobserved = (token >= first) & (token < resident)
    pages = block_table_ptr + tl.load(sequence + TABLE_ROW) * block_table_stride
    page = tl.load(pages + token // BLOCK_SIZE, mask=is_unobserved, other=0).to(tl.int64)
    layer = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    of_head = plane_ptr + layer * plane_layer_stride + tl.program_id(1) % num_kv_heads * plane_head_stride
    at = of_head + page * plane_block_stride + token % BLOCK_SIZE
    tl.store(at, tl.full([TILE], _NOT_OBSERVED, tl.float32), mask=is_unobserved)


def observe(
    cache: StridedCache,
    batch: CompactionBatch,
    observations: Sequence[Observation],
    plane: torch.Tensor,
    softmax: Softmax,
    mean_pool: int,
    peak_reach: tuple[int, int],
    shared_by_heads: bool,
    max_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    key_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes the mean attention observed in some sequences of ``batch`` to a plane, for all tokens they hold, and
    ``NOT_OBSERVED`` for the ``unobserved_tokens`` of the others.

    Args:
        cache: of this rank.
        batch: the sequences; the last query of each has seen at least as many tokens as there are queries.
        observations: of different sequences.
        plane: shape ``[num_layers, num_blocks, num_kv_heads, block_size]``, float32; written in place.
        softmax: of the model.
        mean_pool: neighbours, the token among them, odd.
        peak_reach: tokens before and behind one that is looked at which share its peak.
        shared_by_heads: the peak is that of all heads of a layer.
        max_over_ranks: of a tensor, over ranks that hold other heads of the same layers.
        key_scales: float32, shape ``[num_layers]``, for an fp8 cache: keys are what is stored times this.

    Returns:
        What the tokens of all sequences are judged by, float32, flat: ``[num_layers, num_kv_heads, resident_tokens]``
        per
        sequence: what is in the plane, but the peak for a question.
    """
    assert cache.key_values.dtype.is_floating_point, (
        f"keys of dtype {cache.key_values.dtype}: view an fp8 cache as such"
    )
    assert mean_pool % 2 == 1 and plane.stride(3) == 1
    for observation in observations:
        num_layers, num_heads, _, head_size = observation.queries.shape
        assert (num_layers, head_size) == (cache.num_layers, cache.head_size) and num_heads % cache.num_kv_heads == 0, (
            f"queries {tuple(observation.queries.shape)} for {cache.num_layers} layers x {cache.num_kv_heads} KV "
            "heads x "
            f"{cache.head_size}"
        )
    # The queries of a launch lie in one tensor: a few sequences each, so that the copy of theirs stays small.
    wide = 1024
    _forget_kernel[(batch.num_sequences, cache.num_layers * cache.num_kv_heads, triton.cdiv(batch.max_resident, wide))](
        batch.block_table,
        batch.columns,
        plane,
        cache.num_kv_heads,
        batch.block_table.stride(0),
        *plane.stride()[:3],
        BLOCK_SIZE=cache.block_size,
        TILE=wide,
    )
    observed = gather_scores(plane, batch)
    for first in range(0, len(observations), OBSERVATIONS_AT_ONCE):
        some = observations[first : first + OBSERVATIONS_AT_ONCE]
        _observe(
            cache,
            batch,
            some,
            plane,
            observed,
            softmax,
            mean_pool,
            peak_reach,
            shared_by_heads,
            max_over_ranks,
            key_scales,
        )
    return observed


def _side_by_side(observations: Sequence[Observation], device: torch.device) -> torch.Tensor:
    """The queries of all observations, shape ``[num_layers, num_heads, num_queries, head_size]``. One by one: beside
    those of a launch there is room for those of one sequence."""
    length = sum(observation.queries.shape[2] for observation in observations)
    found, first = None, 0
    for observation in observations:
        queries = observation.queries.to(device)
        if found is None:
            found = queries.new_empty(*queries.shape[:2], length, queries.shape[3])
        end = first + queries.shape[2]
        found[:, :, first:end] = queries
        first = end
        del queries  # before the next ones come
    assert found is not None
    return found


def _observe(
    cache: StridedCache,
    batch: CompactionBatch,
    observations: Sequence[Observation],
    plane: torch.Tensor,
    observed: torch.Tensor,
    softmax: Softmax,
    mean_pool: int,
    peak_reach: tuple[int, int],
    shared_by_heads: bool,
    max_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    key_scales: torch.Tensor | None,
) -> None:
    key_values = cache.key_values
    numbers, num_queries = [], 0
    for observation in observations:
        length = observation.queries.shape[2]
        numbers += [observation.sequence, num_queries, length, observation.num_newer, int(observation.is_question)]
        num_queries += length
    table = torch.tensor(numbers, dtype=torch.int64, pin_memory=key_values.is_cuda).to(
        key_values.device, non_blocking=True
    )
    queries = _side_by_side(observations, key_values.device)
    if key_scales is not None:
        queries *= key_scales.view(-1, 1, 1, 1)
    num_layer_heads, group = cache.num_layers * cache.num_kv_heads, queries.shape[1] // cache.num_kv_heads
    most_queries = group * max(observation.queries.shape[2] for observation in observations)
    max_resident = max(batch.compactions[observation.sequence].resident_tokens for observation in observations)
    terms = torch.empty(
        len(observations), num_layer_heads, most_queries, 2, dtype=torch.float32, device=key_values.device
    )
    mean = torch.empty(num_layer_heads * batch.num_tokens, dtype=torch.float32, device=key_values.device)
    peak = torch.empty_like(mean)
    sizes = (
        softmax.sinks,
        softmax.group_sizes,
        softmax.scale,
        cache.num_kv_heads,
        most_queries,
        batch.block_table.stride(0),
        *queries.stride()[:3],
        *key_values.stride()[:4],
    )
    operand, tile = dots.operand_dtype(key_values.dtype), 64
    at_once = 32 if operand == tl.float32 else 64  # operands of four bytes: registers for half as many queries
    constants = dict(
        GROUP=group,
        HAS_GROUP_SIZES=softmax.group_sizes is not None,
        HAS_SINKS=softmax.sinks is not None,
        SOFT_CAP=softmax.soft_cap,
        OPERAND=operand,
        HEAD_SIZE=cache.head_size,
        DIMS=dots.dims_at_once(key_values.dtype),
        BLOCK_SIZE=cache.block_size,
        QUERIES=at_once,
        TILE=tile,
    )
    grid = len(observations), num_layer_heads
    _observed_terms_kernel[(*grid, triton.cdiv(most_queries, at_once))](
        key_values, batch.block_table, batch.columns, table, queries, terms, *sizes, **constants
    )
    _observed_attention_kernel[(*grid, triton.cdiv(max_resident, tile))](
        key_values, batch.block_table, batch.columns, table, queries, terms, mean, peak, *sizes, **constants
    )
    if shared_by_heads and any(observation.is_question for observation in observations):
        peak = max_over_ranks(peak)
    wide = 1024
    _pool_kernel[(*grid, triton.cdiv(max_resident, wide))](
        mean,
        peak,
        batch.block_table,
        batch.columns,
        table,
        plane,
        observed,
        cache.num_kv_heads,
        batch.block_table.stride(0),
        *plane.stride()[:3],
        MEAN_POOL=mean_pool,
        PEAK_BEFORE=peak_reach[0],
        PEAK_BEHIND=peak_reach[1],
        SHARED_BY_HEADS=shared_by_heads,
        BLOCK_SIZE=cache.block_size,
        TILE=wide,
    )
