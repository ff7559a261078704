"""What every kernel computes, in plain PyTorch: the truth that fast versions are compared with.

Conventions: a higher score means keep; a filter points along the mean query, so that ``<key, filter>`` is high for keys that
queries like.
"""

import torch

from vllm_qfilters.kernels.layout import PagedCache


def score_and_store(key: torch.Tensor, filters: torch.Tensor, score_plane: torch.Tensor, slot_mapping: torch.Tensor) -> None:
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


def select_kept(scores: torch.Tensor, kept: int, sinks: int, window: int, shared_by_heads: bool) -> torch.Tensor:
    """The tokens each head keeps: the first ``sinks``, the last ``window``, and between them those with the highest scores.

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
            mean = candidates.mean(-1, keepdim=True)
            deviation = candidates.std(-1, correction=0, keepdim=True).clamp(min=1e-12)
            candidates = ((candidates - mean) / deviation).mean(1, keepdim=True).expand_as(candidates)
            top = candidates[:, :1].topk(count, sorted=False).indices.expand(-1, scores.shape[1], -1)
        else:
            top = candidates.topk(count, sorted=False).indices
        is_kept.scatter_(-1, top + sinks, True)
    return is_kept


def compact(
    cache: PagedCache, old_pages: torch.Tensor, new_pages: torch.Tensor, is_kept: torch.Tensor, sinks: int, window: int
) -> None:
    """Takes whole pages out of a sequence; the survivors in them fill the holes before the window.

    The pages taken out are the last whole pages before the window. No other token moves, so the window stays in order, and
    sinks stay first. Pages of ``new_pages`` that are not the corresponding old ones are private copies, made here.

    Args:
        cache: the cache of this rank; keys, values and scores move together.
        old_pages: the sequence's pages, shape ``[num_old_pages]``, int64.
        new_pages: its pages afterwards, shape ``[num_new_pages]``, int64.
        is_kept: shape ``[num_layers, num_kv_heads, resident_tokens]``; the same count everywhere, a whole number of pages less
            than there are.
        sinks: first tokens, all kept.
        window: last tokens, all kept.
    """
    bs, resident = cache.block_size, is_kept.shape[-1]
    page_table, first_out, after_out, after_displaced = take_out_pages(cache, old_pages, new_pages, resident, sinks, window)
    is_out = torch.zeros(resident, dtype=torch.bool)
    is_out[first_out:after_out] = True
    is_displaced = torch.zeros_like(is_out)
    is_displaced[after_out:after_displaced] = True
    # Both lists run by (layer, head, token), with equal counts per (layer, head): they pair up one to one, sinks first.
    layer, head, source = (is_kept & (is_out | is_displaced)).nonzero(as_tuple=True)
    _, _, hole = (~is_out & (~is_kept | is_displaced)).nonzero(as_tuple=True)
    from_page, from_slot = page_table[source // bs], source % bs
    to_page, to_slot = page_table[hole // bs], hole % bs
    cache.write(layer, to_page, head, to_slot, *cache.read(layer, from_page, head, from_slot))
    cache.scores[layer, to_page, head, to_slot] = cache.scores[layer, from_page, head, from_slot]


def take_out_pages(
    cache: PagedCache, old_pages: torch.Tensor, new_pages: torch.Tensor, resident: int, sinks: int, window: int
) -> tuple[torch.Tensor, int, int, int]:
    """Decides which pages :func:`compact` takes out, and makes the private copies.

    Returns:
        page_table: where the tokens lie once the copies are made, those taken out included, shape ``[num_old_pages]``.
        first_out: the first token of the pages taken out.
        after_out: the first token behind them.
        after_displaced: where the page that ends the sinks is itself taken out, the tokens from ``after_out`` up to here make
            room for them; else ``after_out``.
    """
    bs = cache.block_size
    evicted = bs * (old_pages.shape[0] - new_pages.shape[0])
    first_out = (resident - evicted - window) // bs
    after_out = first_out + evicted // bs
    remaining = torch.cat((old_pages[:first_out], old_pages[after_out:]))
    is_copy = new_pages != remaining
    if bool(is_copy.any()):
        cache.copy_pages(remaining[is_copy], new_pages[is_copy])

    page_table = old_pages.clone()
    page_table[:first_out] = new_pages[:first_out]
    page_table[after_out:] = new_pages[first_out:]
    return page_table, first_out * bs, after_out * bs, max(sinks, first_out * bs) + evicted
