"""What the attention backends of all platforms share: queries are seen before attention is computed."""

import functools
from typing import Any

import torch

from vllm_qfilters.attention.queries import QueryRecorder
from vllm_qfilters.filters.statistics import JoinedLayers


def dequantised(layer: torch.nn.Module, query: torch.Tensor) -> torch.Tensor:
    """A query as the model made it: for attention in fp8 vLLM quantises it, with a scale of the layer or of each KV
    head.

    Args:
        layer: vLLM's attention layer.
        query: shape ``[num_tokens, num_heads, head_size]``.

    Returns:
        ``query`` itself, or float32 if it was in fp8.
    """
    if query.element_size() > 1:
        return query
    scales = layer._q_scale.view(-1)
    return (query.to(torch.float32).unflatten(1, (scales.numel(), -1)) * scales[:, None, None]).flatten(1, 2)


class WatchedAttention:
    """Goes before an ``AttentionImpl``.

    Attributes, set by the model runner once the cache exists:
        index: of the layer.
        recorder: keeps the last queries of prompts; None: nobody asks for them.
        statistics: while filters are calibrated, sees every query and key.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.index = 0
        self.recorder: QueryRecorder | None = None
        self.statistics: JoinedLayers | None = None

    def of_layer(self, attn_metadata: Any) -> Any:
        """What is this layer's of the metadata of the layers that share its cache."""
        return attn_metadata

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if key is None and layer.kv_sharing_target_layer_name is None:
            raise ValueError(
                f"KV compression does not support layers that write keys past their attention backend, as "
                f"{layer.layer_name} does"
            )
        if self.statistics is not None and attn_metadata is not None:
            num_tokens = attn_metadata.num_actual_tokens
            keys = None if key is None else key[:num_tokens]  # None: those of another layer
            self.statistics.observe(dequantised(layer, query[:num_tokens]), keys)
        if self.recorder is not None:
            self.recorder.record(self.index, query, functools.partial(dequantised, layer))
        return super().forward(layer, query, key, value, kv_cache, self.of_layer(attn_metadata), *args, **kwargs)
