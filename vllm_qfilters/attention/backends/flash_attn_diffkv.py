"""The subclass of vLLM's FLASH_ATTN_DIFFKV backend that writes token stats and attends to resident tokens.

Its values are narrower than its keys. Imported in the worker where that backend is chosen.
"""

from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.flash_attn_diffkv import FlashAttentionDiffKVBackend, FlashAttentionDiffKVImpl

from vllm_qfilters.attention.resident import ResidentMetadata
from vllm_qfilters.attention.scoring import ScoringAttention, ScoringBackend


class QFiltersFlashAttentionDiffKVImpl(ScoringAttention, FlashAttentionDiffKVImpl):
    pass


class QFiltersFlashAttentionDiffKVMetadataBuilder(ResidentMetadata, FlashAttentionMetadataBuilder):
    pass


class QFiltersFlashAttentionDiffKVBackend(ScoringBackend, FlashAttentionDiffKVBackend):
    @classmethod
    def set_head_size_v(cls, head_size_v: int) -> None:
        # vLLM's implementation reads it from vLLM's class.
        FlashAttentionDiffKVBackend.set_head_size_v(head_size_v)

    @staticmethod
    def get_impl_cls() -> type[QFiltersFlashAttentionDiffKVImpl]:
        return QFiltersFlashAttentionDiffKVImpl

    @staticmethod
    def get_builder_cls() -> type[QFiltersFlashAttentionDiffKVMetadataBuilder]:
        return QFiltersFlashAttentionDiffKVMetadataBuilder
