"""vLLM's attention on GPUs with a score stored beside every key it writes: keys are read once for both.

One mixin for the backends whose cache holds key and value of a token side by side. Each backend's subclass is
registered in its place in the worker process; modules of backends that are not installed are never imported.
"""

from typing import Any, Protocol

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_qfilters.attention import in_its_dtype
from vllm_qfilters.attention.watched import WatchedAttention

BACKENDS = {
    AttentionBackendEnum.FLASH_ATTN: "vllm_qfilters.attention.backends.flash_attn.QFiltersFlashAttentionBackend",
    AttentionBackendEnum.TRITON_ATTN: "vllm_qfilters.attention.backends.triton_attn.QFiltersTritonAttentionBackend",
    AttentionBackendEnum.FLASHINFER: "vllm_qfilters.attention.backends.flashinfer.QFiltersFlashInferBackend",
}


class KeyWriter(Protocol):
    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        planes: torch.Tensor,
        slot_mapping: torch.Tensor,
        *,
        key_scale: torch.Tensor | None,
        value_scale: torch.Tensor | None,
    ) -> None:
        """:func:`vllm_qfilters.kernels.triton.write_and_score.write_and_score` with what it scores bound to it."""


class ScoringAttention(WatchedAttention):
    """Goes before an ``AttentionImpl``.

    Attributes, set by the model runner once the cache exists and before CUDA graphs are captured:
        write_and_score: writes keys and values and leaves numbers beside them; None: vLLM writes, and there are none.
        planes: where those go, shape ``[num_blocks, num_planes, num_kv_heads, block_size]``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.write_and_score: KeyWriter | None = None
        self.planes: torch.Tensor | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.write_and_score is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        self.write_and_score(
            key,
            value,
            in_its_dtype(kv_cache, self.kv_cache_dtype),
            self.planes,
            slot_mapping,
            key_scale=layer._k_scale,
            value_scale=layer._v_scale,
        )
