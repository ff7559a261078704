"""The subclass of vLLM's TRITON_ATTN_DIFFKV backend that writes token stats and attends to resident tokens.

Its values are narrower than its keys. Imported in the worker where that backend is chosen.
"""

from vllm.v1.attention.backends.triton_attn_diffkv import (
    TritonAttentionDiffKVBackend,
    TritonAttentionDiffKVImpl,
    TritonAttentionDiffKVMetadataBuilder,
)

from vllm_qfilters.attention.resident import ResidentMetadata
from vllm_qfilters.attention.scoring import ScoringAttention, ScoringBackend


class QFiltersTritonAttentionDiffKVImpl(ScoringAttention, TritonAttentionDiffKVImpl):
    pass


class QFiltersTritonAttentionDiffKVMetadataBuilder(ResidentMetadata, TritonAttentionDiffKVMetadataBuilder):
    pass


class QFiltersTritonAttentionDiffKVBackend(ScoringBackend, TritonAttentionDiffKVBackend):
    @classmethod
    def set_head_size_v(cls, head_size_v: int) -> None:
        # vLLM's implementation reads it from vLLM's class.
        TritonAttentionDiffKVBackend.set_head_size_v(head_size_v)

    @staticmethod
    def get_impl_cls() -> type[QFiltersTritonAttentionDiffKVImpl]:
        return QFiltersTritonAttentionDiffKVImpl

    @staticmethod
    def get_builder_cls() -> type[QFiltersTritonAttentionDiffKVMetadataBuilder]:
        return QFiltersTritonAttentionDiffKVMetadataBuilder
