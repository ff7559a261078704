"""Attention backends that score keys as they are written."""

from collections.abc import Mapping

import torch
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

FP8_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}  # by vLLM's names; it stores them as bytes


def in_its_dtype(kv_cache: torch.Tensor, name: str) -> torch.Tensor:
    """A cache as vLLM stores it, viewed as what it holds; name: vLLM's, of its dtype."""
    return kv_cache.view(FP8_DTYPES[name]) if name in FP8_DTYPES else kv_cache


def register(backends: Mapping[AttentionBackendEnum, str]) -> None:
    """Puts classes, given by their paths, in the places of vLLM's attention backends, in this process."""
    for backend, path in backends.items():
        register_backend(backend, path)
    selector._cached_get_attn_backend.cache_clear()  # an engine that ran in this process before has chosen already
