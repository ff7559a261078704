"""The scoring subclass of vLLM's FLASH_ATTN backend. Imported in the worker where that backend is chosen."""

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from vllm_qfilters.attention.scoring import ScoringAttention


class QFiltersFlashAttentionImpl(ScoringAttention, FlashAttentionImpl):
    pass


class QFiltersFlashAttentionBackend(FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[QFiltersFlashAttentionImpl]:
        return QFiltersFlashAttentionImpl
