"""vLLM's attention on GPUs. Where a method has token stats, the kernel that writes keys and values writes them as well.

One mixin for the backends whose cache holds key and value of a token side by side. Each backend's subclass is
registered in its place in the worker process; modules of backends that are not installed are never imported.
"""

from typing import Protocol

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_qfilters.attention import in_its_dtype
from vllm_qfilters.attention.watched import WatchedAttention

BACKENDS = {
    AttentionBackendEnum.FLASH_ATTN: "vllm_qfilters.attention.backends.flash_attn.QFiltersFlashAttentionBackend",
    AttentionBackendEnum.TRITON_ATTN: "vllm_qfilters.attention.backends.triton_attn.QFiltersTritonAttentionBackend",
    AttentionBackendEnum.FLASHINFER: "vllm_qfilters.attention.backends.flashinfer.QFiltersFlashInferBackend",
    # Models whose values are narrower than keys (MiMo-V2) choose one of these themselves.
    AttentionBackendEnum.FLASH_ATTN_DIFFKV: (
        "vllm_qfilters.attention.backends.flash_attn_diffkv.QFiltersFlashAttentionDiffKVBackend"
    ),
    AttentionBackendEnum.TRITON_ATTN_DIFFKV: (
        "vllm_qfilters.attention.backends.triton_attn_diffkv.QFiltersTritonAttentionDiffKVBackend"
    ),
}
MLA_BACKENDS = {
    AttentionBackendEnum.TRITON_MLA: "vllm_qfilters.attention.backends.triton_mla.QFiltersTritonMLABackend",
}


class StatsWriter(Protocol):
    def __call__(
        self,
        *,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor | None,
        slot_mapping: torch.Tensor,
        key_scale: torch.Tensor | None = None,
        value_scale: torch.Tensor | None = None,
    ) -> None:
        """:meth:`vllm_qfilters.kernels.ops.Ops.write`, with the stat, the planes and the filters of a layer bound to
        it.
        """


class ScoringBackend:
    """Goes before an ``AttentionBackend`` of vLLM whose implementation is a :class:`ScoringAttention`.

    Keys and values are written by ``do_kv_cache_update`` alone. From vLLM 0.33 on FLASH_ATTN and FLASHINFER also let a
    model's own kernel write them (Muse Spark): that would leave no token stats.
    """

    supports_kv_cache_update_bypass = False


class ScoringAttention(WatchedAttention):
    """Goes before an ``AttentionImpl`` whose write of keys and values is fused with that of token stats.

    Attributes, set by the model runner once the cache exists and before CUDA graphs are captured:
        write_stats: writes keys, values and token stats; None: vLLM writes, and there are no stats.
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
        if self.write_stats is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        self.write_stats(
            key=key,
            value=value,
            cache=in_its_dtype(kv_cache, self.kv_cache_dtype),
            slot_mapping=slot_mapping,
            key_scale=layer._k_scale,
            value_scale=layer._v_scale,
        )
