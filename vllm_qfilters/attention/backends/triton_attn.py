"""The subclass of vLLM's TRITON_ATTN backend that writes token stats and attends to resident tokens.

Imported in the worker where that backend is chosen.
"""

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_qfilters.attention.resident import ResidentMetadata
from vllm_qfilters.attention.scoring import ScoringAttention, ScoringBackend


class QFiltersTritonAttentionImpl(ScoringAttention, TritonAttentionImpl):
    pass


class QFiltersTritonAttentionMetadataBuilder(ResidentMetadata, TritonAttentionMetadataBuilder):
    pass


class QFiltersTritonAttentionBackend(ScoringBackend, TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[QFiltersTritonAttentionImpl]:
        return QFiltersTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[QFiltersTritonAttentionMetadataBuilder]:
        return QFiltersTritonAttentionMetadataBuilder
