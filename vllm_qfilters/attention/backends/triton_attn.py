"""The scoring subclass of vLLM's TRITON_ATTN backend. Imported in the worker where that backend is chosen."""

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from vllm_qfilters.attention.scoring import ScoringAttention


class QFiltersTritonAttentionImpl(ScoringAttention, TritonAttentionImpl):
    pass


class QFiltersTritonAttentionBackend(TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[QFiltersTritonAttentionImpl]:
        return QFiltersTritonAttentionImpl
