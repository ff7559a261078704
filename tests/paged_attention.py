"""Attention over paged caches with xformers: its paged biases, with its Triton kernel or as a mask. Needs xformers."""

import itertools
import os
from collections.abc import Sequence

import torch

if not torch.cuda.is_available():
    os.environ["XFORMERS_ENABLE_TRITON"] = "1"  # before it is imported: its kernel then runs under Triton's interpreter

from xformers.ops import fmha
from xformers.ops.fmha import triton_splitk
from xformers.ops.fmha.attn_bias import (
    PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
    PagedBlockDiagonalPaddedKeysMask,
)


def keys_and_values(rows: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer of a ``StridedCache`` as xformers wants it: page behind page, without the planes between them.

    Args:
        rows: shape ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
        group: query heads per KV head.

    Returns:
        shape ``[1, num_blocks * block_size, num_kv_heads, group, head_size]`` each.
    """
    tokens = (
        rows.transpose(1, 2).flatten(0, 1).unsqueeze(2)[None]
    )  # [1, num_blocks * block_size, num_kv_heads, 1, content]
    return tuple(part.contiguous().expand(-1, -1, -1, group, -1) for part in tokens.chunk(2, dim=-1))


def paged_bias(
    pages: Sequence[Sequence[int]], lengths: Sequence[int], num_queries: int, block_size: int, device: torch.device
) -> PagedBlockDiagonalPaddedKeysMask:
    """The bias of several sequences' last tokens, each of which sees those before it and itself.

    Args:
        pages: of each sequence.
        lengths: tokens that each holds.
        num_queries: last tokens of each that are queries.
        block_size: tokens per page.
        device: of the cache.
    """
    unused = next(page for page in itertools.count() if not any(page in row for row in pages))
    most = max(map(len, pages))
    block_tables = torch.tensor(
        [[*row, *[unused] * (most - len(row))] for row in pages], dtype=torch.int32, device=device
    )
    bias = PagedBlockDiagonalCausalWithOffsetPaddedKeysMask if num_queries > 1 else PagedBlockDiagonalPaddedKeysMask
    return bias.from_seqlens([num_queries] * len(pages), lengths, block_tables, block_size, device=device)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: PagedBlockDiagonalPaddedKeysMask
) -> torch.Tensor:
    """With xformers' Triton kernel.

    Args:
        query: of all sequences, shape ``[1, num_tokens, num_kv_heads, group, head_size]``, float16 or bfloat16.
        key, value: of :func:`keys_and_values`.
        bias: of :func:`paged_bias`.

    Returns:
        the shape of ``query``.
    """
    operator = triton_splitk.FwOp
    if bias.page_size % operator.BLOCK_N:
        operator = operator.get_operator(1, block_n=bias.page_size)
    inputs = fmha.Inputs(query, key, value, attn_bias=bias)
    reasons = operator.not_supported_reasons(inputs) if query.is_cuda else []
    assert not reasons, reasons
    return operator.apply(inputs, needs_gradient=False)[0].view_as(query)


def attend_masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: PagedBlockDiagonalPaddedKeysMask
) -> torch.Tensor:
    """The same without a kernel: over all pages at once, with the bias as a mask. float32."""
    mask = bias.materialize((query.shape[1], bias.k_seqinfo.seqstart_py[-1]), device=query.device)
    query, key, value = query[0].float(), key[0, : mask.shape[1]].float(), value[0, : mask.shape[1]].float()
    logits = torch.einsum("mhgd,nhgd->hgmn", query, key) * query.shape[-1] ** -0.5 + mask
    return torch.einsum("hgmn,nhgd->mhgd", logits.softmax(-1), value)[None]
