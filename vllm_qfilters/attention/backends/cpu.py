"""vLLM's CPU attention, with numbers for the scores left beside every key it writes."""

import dataclasses
from typing import Any, Self

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_qfilters.attention.resident import ResidentMetadata
from vllm_qfilters.attention.scoring import StatsWriter
from vllm_qfilters.attention.watched import WatchedAttention


@dataclasses.dataclass
class QFiltersCPUAttentionMetadata(CPUAttentionMetadata):
    """Attributes:

    by_window: the same step for the layers of each sliding window, -1 for those without one.
    """

    by_window: dict[int, CPUAttentionMetadata] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_windows(cls, by_window: dict[int, CPUAttentionMetadata]) -> Self:
        any_of_them = next(iter(by_window.values()))
        values = {field.name: getattr(any_of_them, field.name) for field in dataclasses.fields(CPUAttentionMetadata)}
        return cls(**values, by_window=by_window)


class PerWindowMetadataBuilder(CPUAttentionMetadataBuilder):
    """Plans the layers of each sliding window for themselves.

    vLLM (0.32, 0.33) plans layers with different windows that share a cache as if they had none; its kernel then cuts
    what one query attends to into parts that lie outside the window, and counts attention sinks (GPT-OSS) in them too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        self.windows = {layer.impl.sliding_window for layer in layers.values()}

    def build(self, *args: Any, **kwargs: Any) -> QFiltersCPUAttentionMetadata:
        by_window = {}
        for window in self.windows:
            self.window_size = window
            by_window[window] = super().build(*args, **kwargs)
        return QFiltersCPUAttentionMetadata.of_windows(by_window)


class QFiltersCPUAttentionMetadataBuilder(ResidentMetadata, PerWindowMetadataBuilder):
    pass


class QFiltersCPUAttentionImpl(WatchedAttention, CPUAttentionBackendImpl):
    """Attributes, set by the model runner once the cache exists:

    write_stats: writes token stats beside keys and values; None: there are none.
    """

    write_stats: StatsWriter | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.write_stats is not None:
            self.write_stats(key=key, value=value, cache=None, slot_mapping=slot_mapping)

    def of_layer(self, attn_metadata: QFiltersCPUAttentionMetadata | None) -> CPUAttentionMetadata | None:
        return None if attn_metadata is None else attn_metadata.by_window[self.sliding_window]


class QFiltersCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[QFiltersCPUAttentionImpl]:
        return QFiltersCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[QFiltersCPUAttentionMetadataBuilder]:
        return QFiltersCPUAttentionMetadataBuilder


BACKENDS = {
    AttentionBackendEnum.CPU_ATTN: f"{__name__}.{QFiltersCPUAttentionBackend.__name__}",
    AttentionBackendEnum.CPU_MLA: "vllm_qfilters.attention.backends.cpu_mla.QFiltersCPUMLABackend",
    AttentionBackendEnum.AMX_MLA: "vllm_qfilters.attention.backends.cpu_mla.QFiltersAMXMLABackend",
}
