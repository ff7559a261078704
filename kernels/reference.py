"""What every kernel computes, in plain PyTorch: the truth that fast versions are compared with.

Conventions: a higher score means keep; a filter points along the mean query, so that ``<key, filter>`` is high for keys
    that
queries like.
"""

import torch
from torch.nn.functional import avg_pool1d, max_pool1d, normalize, pad

from vllm_qfilters.kernels.batch import NOT_OBSERVED
from vllm_qfilters.kernels.layout import PagedCache, StridedCache
from vllm_qfilters.kernels.ops import PLAIN_SOFTMAX, Softmax


def score_and_store(
    key: torch.Tensor, filters: torch.Tensor, score_plane: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Stores the projections of a step's keys on the filters of their heads beside the keys.

    Args:
        key: shape ``[num_tokens, num_kv_heads, head_size]``; tokens beyond ``slot_mapping`` are padding.
        filters: shape ``[num_kv_heads, head_size]``, float32.
        score_plane: as for :func:`write_scores`; written in place.
        slot_mapping: as for :func:`write_scores`.
    """
    write_scores((key.to(torch.float32) * filters).sum(-1), score_plane, slot_mapping)


def write_scores(scores: torch.Tensor, score_plane: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Stores the scores of the tokens of a step beside their keys.

    Args:
        scores: shape ``[num_tokens, num_kv_heads]``; tokens beyond ``slot_mapping`` are padding.
        score_plane: shape ``[num_blocks, num_kv_heads, block_size]``, float32; written in place.
        slot_mapping: shape ``[num_tokens]``, int64: ``page * block_size + slot``, -1 for padding.
    """
    block_size = score_plane.shape[2]
    scores = scores[: slot_mapping.shape[0]]
    is_token = slot_mapping >= 0
    if not bool(is_token.all()):
        slot_mapping, scores = slot_mapping[is_token], scores[is_token]
    score_plane[slot_mapping // block_size, :, slot_mapping % block_size] = scores.to(torch.float32)


def expected_attention(
    cache: PagedCache | StridedCache,
    pages: torch.Tensor,
    num_tokens: int,
    means: torch.Tensor,
    factors: torch.Tensor,
    softmax: Softmax = PLAIN_SOFTMAX,
) -> torch.Tensor:
    """How much attention coming queries are expected to pay to each token of a sequence.

    For a normally distributed query of mean m and covariance ``sum_r b_r b_r^T`` the expectation of ``exp(<k, q>)`` is
    ``exp(<k, m> + sum_r <k, b_r>^2 / 2)``; it is normalised over the tokens and the sink, and averaged over the query
    heads of a KV head (the estimate of ExpectedAttention, arXiv 2510.00636, section 3). Of capped logits see
    :meth:`vllm_qfilters.kernels.ops.Ops.expected_attention`.

    Args:
        cache: whose keys are read.
        pages: of the sequence, shape ``[num_pages]``, int64.
        num_tokens: it holds.
        means: m times the scale of the logits, shape ``[num_layers, num_heads, head_size]``, float32.
        factors: b_r times that scale, shape ``[num_layers, num_heads, rank, head_size]``, float32; the rank may be 0.
        softmax: of the model.

    Returns:
        float32, shape ``[num_layers, num_kv_heads, num_tokens]``, each row of sum 1, or less where there are sinks.
    """
    num_layers, num_heads, rank, head_size = factors.shape
    num_kv_heads = cache.num_kv_heads
    attention = torch.empty(num_layers, num_kv_heads, num_tokens, device=means.device)
    num_padded = num_heads // num_kv_heads
    for layer in range(num_layers):
        keys = cache.resident_keys(layer, pages, num_tokens)
        group = softmax.group_size(layer, num_padded)
        mean = means[layer].view(num_kv_heads, num_padded, head_size)[:, :group]
        logits = mean @ keys.mT  # [num_kv_heads, group, num_tokens]
        directions = factors[layer].view(num_kv_heads, num_padded, rank, head_size)[:, :group].flatten(1, 2)
        variance = (directions @ keys.mT).square().view(*logits.shape[:2], rank, num_tokens).sum(2)
        logits = expected_logits(logits, variance, softmax.soft_cap)
        attention[layer] = softmax_beside_sinks(logits, softmax, layer).mean(1)
    return attention


def expected_logits(mean: torch.Tensor, variance: torch.Tensor, soft_cap: float) -> torch.Tensor:
    """The logarithm of the expectation of ``exp(g(x))`` for normally distributed x and a soft cap g, 0: none. See
    :meth:`vllm_qfilters.kernels.ops.Ops.expected_attention`.
    """
    if not soft_cap:
        return mean + variance / 2
    slope = 1 - ((mean + variance / 2) / soft_cap).tanh().square()
    return capped(mean + variance * slope, soft_cap) - variance * slope.square() / 2


def capped(logits: torch.Tensor, soft_cap: float) -> torch.Tensor:
    """``c tanh(x / c)`` of logits x; a soft cap c of 0: x."""
    return soft_cap * (logits / soft_cap).tanh() if soft_cap else logits


def softmax_beside_sinks(logits: torch.Tensor, softmax: Softmax, layer: int) -> torch.Tensor:
    """Over the last dimension, and the sink of each query head in ``layer``, where it has one.

    Args:
        logits: shape ``[num_kv_heads, group, ..., num_tokens]``, without padding.
    """
    if softmax.sinks is None:
        return logits.softmax(-1)
    sinks = softmax.sinks[layer].view(logits.shape[0], -1)[:, : logits.shape[1]]
    sinks = sinks.view(*logits.shape[:2], *[1] * (logits.dim() - 2)).expand(*logits.shape[:-1], 1)
    return torch.cat((logits, sinks), dim=-1).softmax(-1)[..., :-1]


def observed_attention(
    cache: PagedCache | StridedCache,
    pages: torch.Tensor,
    num_tokens: int,
    queries: torch.Tensor,
    num_newer: int,
    mean_pool: int,
    peak_reach: tuple[int, int],
    softmax: Softmax = PLAIN_SOFTMAX,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much attention the last queries of a prompt pay to each token of a sequence and its neighbours (after SnapKV,
    arXiv 2404.14469): on the whole, and at most.

    Args:
        cache: whose keys are read.
        pages: of the sequence, shape ``[num_pages]``, int64.
        num_tokens: it holds.
        queries: after RoPE, times the scale of the logits, shape ``[num_layers, num_heads, num_queries, head_size]``,
            float32.
        num_newer: of its last tokens came after the last query.
        mean_pool: neighbours, the token among them, odd.
        peak_reach: tokens before and behind one that is looked at which share its peak.
        softmax: of the model.

    Returns:
        float32, shape ``[num_layers, num_kv_heads, num_tokens]`` each; ``NOT_OBSERVED`` for newer tokens.

        mean: over queries, the query heads of a KV head, and neighbours.
        peak: the most that a query, of the query heads of a KV head, pays to a token within whose reach it lies.
    """
    num_layers, num_heads, num_queries, head_size = queries.shape
    num_kv_heads = cache.num_kv_heads
    num_seen = num_tokens - num_newer
    mean, peak = torch.empty(2, num_layers, num_kv_heads, num_seen, device=queries.device)
    is_future = torch.ones(num_queries, num_seen, dtype=torch.bool, device=queries.device).triu(
        num_seen - num_queries + 1
    )
    for layer in range(num_layers):
        keys = cache.resident_keys(layer, pages, num_seen)
        group = softmax.group_size(layer, num_heads // num_kv_heads)
        of_layer = queries[layer].view(num_kv_heads, -1, num_queries, head_size)[:, :group]
        logits = capped(of_layer @ keys[:, None].mT, softmax.soft_cap).masked_fill(is_future, float("-inf"))
        attention = softmax_beside_sinks(logits, softmax, layer)
        mean[layer], peak[layer] = attention.mean((1, 2)), attention.amax((1, 2))
    return pool_neighbours(mean, peak, num_newer, mean_pool, peak_reach)


def pool_neighbours(
    mean: torch.Tensor, peak: torch.Tensor, num_newer: int, mean_pool: int, peak_reach: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the attention to each token alone what :func:`observed_attention` returns.

    Args:
        mean, peak: shape ``[num_layers, num_kv_heads, num_tokens - num_newer]``.
    """
    mean = avg_pool1d(mean, mean_pool, stride=1, padding=mean_pool // 2)
    before, behind = peak_reach
    peak = max_pool1d(pad(peak, (behind, before)), before + 1 + behind, stride=1)
    return pad(mean, (0, num_newer), value=NOT_OBSERVED), pad(peak, (0, num_newer), value=NOT_OBSERVED)


def value_norms(cache: PagedCache | StridedCache, pages: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The norm of each value of a sequence, as it is stored.

    Args:
        cache: the cache of this rank.
        pages: the sequence's pages, shape ``[num_pages]``, int64.
        num_tokens: it holds.

    Returns:
        float32, shape ``[num_layers, num_kv_heads, num_tokens]``.
    """
    return torch.stack(
        [cache.resident_values(layer, pages, num_tokens).norm(dim=-1) for layer in range(cache.num_layers)]
    )


def distinctness(
    cache: PagedCache | StridedCache, pages: torch.Tensor, num_tokens: int, of_values: bool, pool: int
) -> torch.Tensor:
    """How unlike the others each key or value of a sequence is: minus its cosine with their mean direction in its head,
    averaged over neighbours (of keys and without neighbours: KeyDiff, arXiv 2504.15364).

    Args:
        cache: the cache of this rank.
        pages: the sequence's pages, shape ``[num_pages]``, int64.
        num_tokens: it holds.
        of_values: of values instead of keys.
        pool: neighbours to average over, odd.

    Returns:
        shape ``[num_layers, num_kv_heads, num_tokens]``, float32.
    """
    resident = cache.resident_values if of_values else cache.resident_keys
    by_layer = []
    for layer in range(cache.num_layers):
        directions = normalize(resident(layer, pages, num_tokens), dim=-1)
        anchors = normalize(directions.mean(1, keepdim=True), dim=-1)
        by_layer.append(-(directions * anchors).sum(-1))
    return mean_of_neighbours(torch.stack(by_layer), pool)


def mean_of_neighbours(values: torch.Tensor, pool: int) -> torch.Tensor:
    """Over the ``pool`` ones around each token, of those that are there; shape ``[num_layers, num_kv_heads,
    num_tokens]``.
    """
    return avg_pool1d(values, pool, stride=1, padding=pool // 2, count_include_pad=False)


def write_keys_and_values(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """Writes keys and values to the slots of their tokens: see :meth:`vllm_qfilters.kernels.ops.Ops.write`.

    Into an fp8 cache goes ``key / key_scale``, no more than the dtype can hold.
    """
    is_token = slot_mapping >= 0
    slot, num_tokens, head_size = slot_mapping[is_token], slot_mapping.shape[0], key.shape[-1]
    page, in_page = slot // cache.shape[2], slot % cache.shape[2]
    for tensor, scale, part in (
        (key, key_scale, cache[..., :head_size]),
        (value, value_scale, cache[..., head_size:]),
    ):
        stored = tensor[:num_tokens][is_token]
        if part.dtype.itemsize == 1:
            limit = torch.finfo(part.dtype).max
            stored = (stored.to(torch.float32) / scale).clamp(-limit, limit).to(part.dtype).view(torch.uint8)
            part = part.view(torch.uint8)
        part[page, :, in_page] = stored


def random_of_keys(key: torch.Tensor, seed: int) -> torch.Tensor:
    """Numbers in [0, 1) that look random, and are the same for the same key and seed.

    Args:
        key: shape ``[num_tokens, num_kv_heads, head_size]``.

    Returns:
        float32, shape ``[num_tokens, num_kv_heads]``.
    """
    weight = torch.arange(key.shape[-1], device=key.device) % 7 + 1
    bits = (key.to(torch.float32) * weight).sum(-1).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    bits = (bits + 0x9E3779B9 * (seed + 1)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the mixing steps of a 32-bit hash
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return ((bits ^ (bits >> 16)) >> 8).to(torch.float32) / (1 << 24)


def score_resident(keys: torch.Tensor, filters: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
    """``<k, f> + sum_r <k, g_r>^2 / 2`` of every resident key ``k`` of one sequence, for each query head.

    Args:
        keys: shape ``[num_layers, num_kv_heads, resident_tokens, head_size]``.
        filters: ``f``, float32, shape ``[num_layers, num_heads, head_size]``, those of one KV head side by side.
        factors: ``g_r``, float32, shape ``[num_layers, num_heads, rank, head_size]``; None: none.

    Returns:
        float32, shape ``[num_layers, num_heads, resident_tokens]``.
    """
    keys = keys.to(torch.float32).repeat_interleave(filters.shape[1] // keys.shape[1], dim=1)
    scores = torch.einsum("lhtd,lhd->lht", keys, filters)
    if factors is not None:
        scores = scores + torch.einsum("lhtd,lhrd->lhtr", keys, factors).square().sum(-1) / 2
    return scores


def page_scores(plane: torch.Tensor, pages: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """The mean over layers, heads and slots of the standardised scores of full pages.

    Args:
        plane: shape ``[num_layers, num_blocks, num_kv_heads, block_size]``, float32.
        pages: shape ``[num_pages]``, int64.
        mean, deviation: of the scores of each head, shape ``[num_layers, num_kv_heads]``.

    Returns:
        float32, shape ``[num_pages]``.
    """
    standardised = (plane[:, pages] - mean[:, None, :, None]) / deviation[:, None, :, None]
    return standardised.mean((0, 2, 3))


def select_kept(scores: torch.Tensor, kept: int, sinks: int, window: int, shared_by_heads: bool) -> torch.Tensor:
    """The tokens each head keeps: the first ``sinks``, the last ``window``, and between them those with the highest
    scores.

    Args:
        scores: shape ``[num_layers, num_kv_heads, resident_tokens]``, float32.
        kept: tokens kept per layer and head, exactly, also among ties.
        sinks: first tokens, kept.
        window: last tokens, kept.
        shared_by_heads: the heads of a layer keep the same tokens, by the mean of their standardised scores.

    Returns:
        bool, shape ``[num_layers, num_kv_heads, resident_tokens]``.
    """
    resident = scores.shape[-1]
    candidates = scores[..., sinks : resident - window]
    is_kept = torch.ones_like(scores, dtype=torch.bool)
    is_kept[..., sinks : resident - window] = False
    count = kept - sinks - window
    if count > 0:
        if shared_by_heads:
            shared = mean_standardised(scores, sinks, window)[..., sinks : resident - window]
            top = shared.topk(count, sorted=False).indices.expand(-1, scores.shape[1], -1)
        else:
            top = candidates.topk(count, sorted=False).indices
        is_kept.scatter_(-1, top + sinks, True)
    return is_kept


def mean_standardised(scores: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """The mean over heads of each token's z-score among the tokens between sinks and window.

    Args:
        scores: shape ``[num_layers, num_heads, resident_tokens]``, float32.

    Returns:
        shape ``[num_layers, 1, resident_tokens]``.
    """
    candidates = scores[..., sinks : scores.shape[-1] - window]
    mean = candidates.mean(-1, keepdim=True)
    deviation = candidates.std(-1, correction=0, keepdim=True).clamp(min=1e-12)
    return ((scores - mean) / deviation).mean(1, keepdim=True)


def compact(
    cache: PagedCache | StridedCache,
    old_pages: torch.Tensor,
    new_pages: torch.Tensor,
    is_kept: torch.Tensor,
    window: int,
) -> None:
    """Takes whole pages out of a sequence; the tokens that stay move up in their order.

    The pages taken out are the last whole pages before the window, so that the window stays where it is. Pages of
    ``new_pages`` that are not the corresponding old ones are private copies, made here.

    Args:
        cache: the cache of this rank; keys, values and planes move together.
        old_pages: the sequence's pages, shape ``[num_old_pages]``, int64.
        new_pages: its pages afterwards, shape ``[num_new_pages]``, int64.
        is_kept: shape ``[num_layers, num_kv_heads, resident_tokens]``; the same count everywhere, a whole number of
            pages less than there are.
        window: last tokens, all kept.
    """
    bs, resident = cache.block_size, is_kept.shape[-1]
    page_table, *bounds = take_out_pages(cache, old_pages, new_pages, resident, window)
    layer, head, source, place = moves(is_kept, *bounds)
    from_page, from_slot = page_table[source // bs], source % bs
    to_page, to_slot = page_table[place // bs], place % bs
    cache.write(layer, to_page, head, to_slot, *cache.read(layer, from_page, head, from_slot))
    cache.planes[layer, to_page, :, head, to_slot] = cache.planes[layer, from_page, :, head, from_slot]


def moves(
    is_kept: torch.Tensor, first_out: int, after_out: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which tokens go where in :func:`compact`: layer, head, source and place of each, as tokens lay before.

    Args:
        is_kept: shape ``[num_layers, num_kv_heads, resident_tokens]``.
        first_out, after_out: of :func:`taken_out`.
    """
    num_layers, num_kv_heads, resident = is_kept.shape
    layer, head, source = is_kept.nonzero(as_tuple=True)
    tokens = torch.arange(resident, device=is_kept.device)
    place = torch.cat((tokens[:first_out], tokens[after_out:])).repeat(num_layers * num_kv_heads)
    is_move = source != place
    return layer[is_move], head[is_move], source[is_move], place[is_move]


def taken_out(resident: int, evicted: int, window: int, block_size: int) -> tuple[int, int]:
    """Which pages :func:`compact` takes out: the last whole ones before the window.

    Returns:
        first_out: the first token of the pages taken out.
        after_out: the first token behind them.
    """
    first_out = (resident - evicted - window) // block_size * block_size
    return first_out, first_out + evicted


def take_out_pages(
    cache: PagedCache | StridedCache,
    old_pages: torch.Tensor,
    new_pages: torch.Tensor,
    resident: int,
    window: int,
) -> tuple[torch.Tensor, int, int]:
    """Makes the private copies of :func:`compact`.

    Returns:
        page_table: where the tokens lie once the copies are made, those taken out included, shape ``[num_old_pages]``.
        first_out, after_out: of :func:`taken_out`.
    """
    bs = cache.block_size
    bounds = taken_out(resident, bs * (old_pages.shape[0] - new_pages.shape[0]), window, bs)
    first_page, after_page = bounds[0] // bs, bounds[1] // bs
    remaining = torch.cat((old_pages[:first_page], old_pages[after_page:]))
    is_copy = new_pages != remaining
    if bool(is_copy.any()):
        cache.copy_pages(remaining[is_copy], new_pages[is_copy])

    page_table = old_pages.clone()
    page_table[:first_page] = new_pages[:first_page]
    page_table[after_page:] = new_pages[first_page:]
    return page_table, *bounds
