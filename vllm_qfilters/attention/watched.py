"""What the attention backends of all platforms share: queries are seen before attention is computed."""

from typing import Any

import torch

from vllm_qfilters.attention.recent_queries import QueryRecorder
from vllm_qfilters.filters.statistics import LayerStatistics


def query_scale(layer: torch.nn.Module, query: torch.Tensor) -> torch.Tensor | None:
    """What a query that vLLM has quantised for attention in fp8 is to be multiplied by, float32, shape ``[1]`` or
    ``[num_heads, 1]``; None: it is as the model made it.

    Args:
        layer: vLLM's attention layer.
        query: shape ``[num_tokens, num_heads, head_size]``.
    """
    if query.element_size() > 1:
        return None
    scale = layer._q_scale.view(-1)
    return scale if scale.numel() == 1 else scale.repeat_interleave(query.shape[1] // scale.numel()).unsqueeze(-1)


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
        self.statistics: LayerStatistics | None = None

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        scale = query_scale(layer, query)
        if self.statistics is not None and attn_metadata is not None:
            num_tokens = attn_metadata.num_actual_tokens
            self.statistics.observe(query[:num_tokens], key[:num_tokens], scale)
        if self.recorder is not None:
            self.recorder.record(self.index, query, scale)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
