"""Attention backends that score keys as they are written."""

from collections.abc import Mapping

from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


def register(backends: Mapping[AttentionBackendEnum, str]) -> None:
    """Puts classes, given by their paths, in the places of vLLM's attention backends, in this process."""
    for backend, path in backends.items():
        register_backend(backend, path)
    selector._cached_get_attn_backend.cache_clear()  # an engine that ran in this process before has chosen already
