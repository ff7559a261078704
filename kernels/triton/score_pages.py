"""Scores of whole pages, from the scores stored beside their keys."""

import torch
import triton
import triton.language as tl


@triton.jit
def _page_scores_kernel(
    plane_ptr,  # [num_layers, num_blocks, num_kv_heads, block_size]
    pages_ptr,  # [num_pages]
    mean_ptr,  # [num_layers, num_kv_heads]
    deviation_ptr,  # [num_layers, num_kv_heads]
    page_scores_ptr,  # [num_pages]
    num_layers,
    num_kv_heads,
    layer_stride,
    block_stride,
    head_stride,
    BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
):
    page = tl.load(pages_ptr + tl.program_id(0))
    head = tl.arange(0, HEADS)
    slot = tl.arange(0, SLOTS)
    mask = (head < num_kv_heads)[:, None] & (slot < BLOCK_SIZE)[None, :]
    total = tl.zeros([HEADS, SLOTS], tl.float32)
    at = plane_ptr + page * block_stride + head[:, None] * head_stride + slot[None, :]
    for layer in range(num_layers):
        score = tl.load(at, mask=mask, other=0.0)
        at += layer_stride
        mean = tl.load(mean_ptr + layer * num_kv_heads + head, mask=head < num_kv_heads, other=0.0)
        deviation = tl.load(deviation_ptr + layer * num_kv_heads + head, mask=head < num_kv_heads, other=1.0)
        total += tl.where(mask, (score - mean[:, None]) / deviation[:, None], 0.0)
    score = tl.sum(tl.sum(total, axis=1), axis=0) / (num_layers * num_kv_heads * BLOCK_SIZE)
    tl.store(page_scores_ptr + tl.program_id(0), score)


def page_scores(plane: torch.Tensor, pages: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """The mean over layers, heads and slots of the standardised scores of full pages.

    Args:
        plane: shape ``[num_layers, num_blocks, num_kv_heads, block_size]``, float32.
        pages: full pages, shape ``[num_pages]``, int64.
        mean, deviation: of the scores of each head, shape ``[num_layers, num_kv_heads]``, float32.

    Returns:
        float32, shape ``[num_pages]``.
    """
    num_layers, _, num_kv_heads, block_size = plane.shape
    assert (
        mean.shape == deviation.shape == (num_layers, num_kv_heads)
        and mean.is_contiguous()
        and deviation.is_contiguous()
    )
    scores = torch.empty(pages.shape, dtype=torch.float32, device=plane.device)
    if pages.shape[0] == 0:
        return scores
    _page_scores_kernel[(pages.shape[0],)](
        plane,
        pages,
        mean,
        deviation,
        scores,
        num_layers,
        num_kv_heads,
        *plane.stride()[:3],
        BLOCK_SIZE=block_size,
        SLOTS=triton.next_power_of_2(block_size),
        HEADS=triton.next_power_of_2(num_kv_heads),
    )
    return scores
