"""The subclass of vLLM's FLASH_ATTN backend that writes token stats and attends to resident tokens.

Imported in the worker where that backend is chosen.
"""

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_qfilters.attention.resident import ResidentMetadata
from vllm_qfilters.attention.scoring import ScoringAttention, ScoringBackend


class QFiltersFlashAttentionImpl(ScoringAttention, FlashAttentionImpl):
    pass


class QFiltersFlashAttentionMetadataBuilder(ResidentMetadata, FlashAttentionMetadataBuilder):
    pass


class QFiltersFlashAttentionBackend(ScoringBackend, FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[QFiltersFlashAttentionImpl]:
        return QFiltersFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[QFiltersFlashAttentionMetadataBuilder]:
        return QFiltersFlashAttentionMetadataBuilder
