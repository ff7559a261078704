"""Caches of latents (MLA, DeepSeek-V2, arXiv 2405.04434): one key per token, which all query heads share.

Such a key is a latent, normalised, and behind it a rotary part. Queries that the model's projections have been absorbed
into attend to it, and the latent alone is its value. Filters, and what is observed, are of such queries.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.attention import MLAAttention

from vllm_qfilters.attention.queries import QueryRecorder
from vllm_qfilters.attention.scoring import StatsWriter
from vllm_qfilters.filters.statistics import JoinedLayers


class LatentAttention:
    """Goes before an ``MLAAttentionImpl`` whose metadata builder is a ``ResidentMetadata``.

    Attributes, set by the model runner once the cache exists:
        write_stats: writes token stats of keys that vLLM has written; None: there are none.
        index: of the layer.
        recorder: keeps the last queries of prompts; None: nobody asks for them.
        statistics: while filters are calibrated, sees every query and key.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.write_stats: StatsWriter | None = None
        self.index = 0
        self.recorder: QueryRecorder | None = None
        self.statistics: JoinedLayers | None = None

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        *skip_scale: bool,
    ) -> None:
        # skip_scale: from vLLM 0.33 on.
        super().do_kv_cache_update(  # type: ignore[misc]
            kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, *skip_scale
        )
        if self.write_stats is not None:
            key, value = joined(kv_c_normed, k_pe), kv_c_normed.unsqueeze(1)
            self.write_stats(key=key, value=value, cache=None, slot_mapping=slot_mapping.flatten())

    def absorb(self, layer: MLAAttention, query: torch.Tensor) -> torch.Tensor:
        """Queries of heads, without their rotary part, as they attend to latents.

        Args:
            query: shape ``[num_heads, num_tokens, qk_nope_head_dim]``.

        Returns:
            shape ``[num_heads, num_tokens, kv_lora_rank]``.
        """
        return torch.bmm(query, layer.W_UK_T)


def joined(latent: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Keys of shape ``[num_tokens, 1, head_size]``.

    Args:
        latent: shape ``[num_tokens, kv_lora_rank]``.
        rotary: shape ``[num_tokens, 1, qk_rope_head_dim]``.
    """
    return torch.cat((latent.unsqueeze(1), rotary), dim=-1)


def absorbed(layer: MLAAttention, query: torch.Tensor) -> torch.Tensor:
    """Queries as they attend to keys of the cache.

    Args:
        query: of heads, after RoPE, shape ``[num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim]``.

    Returns:
        shape ``[num_tokens, num_heads, head_size]``.
    """
    nope, rotary = query.split((layer.qk_nope_head_dim, layer.qk_rope_head_dim), dim=-1)
    return torch.cat((layer.impl.absorb(layer, nope.transpose(0, 1)).transpose(0, 1), rotary), dim=-1)


def watch_queries(layer: MLAAttention) -> None:
    """Has the layer's implementation see queries before attention is computed: vLLM hands it those of prompts and those
    of generated tokens apart, the latter absorbed already."""
    layer.forward_impl = functools.partial(_watched, layer, layer.forward_impl)


def _watched(
    layer: MLAAttention,
    forward_impl: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: Any,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    impl = layer.impl
    if attn_metadata is not None and impl.statistics is not None:
        num_tokens = attn_metadata.num_actual_tokens
        impl.statistics.observe(absorbed(layer, q[:num_tokens]), joined(k_c_normed[:num_tokens], k_pe[:num_tokens]))
    if attn_metadata is not None and impl.recorder is not None:
        impl.recorder.record(impl.index, q, functools.partial(absorbed, layer))
    return forward_impl(q, k_c_normed, k_pe, kv_cache, attn_metadata, *args, **kwargs)


def with_heads(kv_cache: torch.Tensor) -> torch.Tensor:
    """A layer's cache as it is laid out for KV heads, of which one of latents, ``[num_blocks, block_size, head_size]``,
    has one."""
    return kv_cache.unsqueeze(1) if kv_cache.dim() == 3 else kv_cache


def write_keys(layer: MLAAttention, key: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Writes keys as the layer's backend does.

    Args:
        key: shape ``[num_tokens, 1, head_size]``.
        kv_cache: shape ``[num_blocks, 1, block_size, head_size]``, of the dtype of the keys.
        slot_mapping: shape ``[num_tokens]``, int64.
    """
    latent, rotary = (part.contiguous() for part in key.split((layer.kv_lora_rank, layer.qk_rope_head_dim), dim=-1))
    layer.impl.do_kv_cache_update(
        latent.squeeze(1), rotary, kv_cache.squeeze(1), slot_mapping, layer.kv_cache_dtype, layer._k_scale
    )
