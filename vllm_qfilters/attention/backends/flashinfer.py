"""The scoring subclass of vLLM's FLASHINFER backend. Imported in the worker where that backend is chosen."""

from vllm.v1.attention.backends.flashinfer import FlashInferBackend, FlashInferImpl

from vllm_qfilters.attention.scoring import ScoringAttention


class QFiltersFlashInferImpl(ScoringAttention, FlashInferImpl):
    pass


class QFiltersFlashInferBackend(FlashInferBackend):
    @staticmethod
    def get_impl_cls() -> type[QFiltersFlashInferImpl]:
        return QFiltersFlashInferImpl
