"""vLLM's CPU attention, with numbers for the scores left beside every key it writes."""

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_qfilters.attention.watched import WatchedAttention
from vllm_qfilters.scorers import Scorer


class QFiltersCPUAttentionImpl(WatchedAttention, CPUAttentionBackendImpl):
    """Attributes, set by the model runner once the cache exists:

    scorer: sees keys and values as they are written; None: before compression starts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scorer: Scorer | None = None

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


class QFiltersCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[QFiltersCPUAttentionImpl]:
        return QFiltersCPUAttentionImpl


BACKENDS = {AttentionBackendEnum.CPU_ATTN: f"{__name__}.{QFiltersCPUAttentionBackend.__name__}"}
