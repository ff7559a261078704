"""vLLM's CPU attention, with numbers for the scores left beside every key it writes."""

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_qfilters.filters.statistics import LayerStatistics
from vllm_qfilters.scorers import Scorer
from vllm_qfilters.attention.recent_queries import QueryRecorder


class QFiltersCPUAttentionImpl(CPUAttentionBackendImpl):
    """Attributes, set by the model runner once the cache exists:

    index: of the layer.
    scorer: sees keys and values as they are written; None: before compression starts.
    recorder: keeps the last queries of prompts; None: nobody asks for them.
    statistics: while filters are calibrated, sees every query and key.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.index = 0
        self.scorer: Scorer | None = None
        self.recorder: QueryRecorder | None = None
        self.statistics: LayerStatistics | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.scorer is not None:
            self.scorer.write(self.index, key, value, slot_mapping)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.statistics is not None and attn_metadata is not None:
            num_tokens = attn_metadata.num_actual_tokens
            self.statistics.observe(query[:num_tokens], key[:num_tokens])
        if self.recorder is not None:
            self.recorder.record(self.index, query)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)


class QFiltersCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[QFiltersCPUAttentionImpl]:
        return QFiltersCPUAttentionImpl


BACKENDS = {AttentionBackendEnum.CPU_ATTN: f"{__name__}.{QFiltersCPUAttentionBackend.__name__}"}
