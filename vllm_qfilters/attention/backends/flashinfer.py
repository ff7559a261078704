"""The subclass of vLLM's FLASHINFER backend that writes token stats and attends to resident tokens.

Imported in the worker where that backend is chosen.
"""

from vllm.v1.attention.backends.flashinfer import FlashInferBackend, FlashInferImpl, FlashInferMetadataBuilder

from vllm_qfilters.attention.resident import ResidentMetadata
from vllm_qfilters.attention.scoring import ScoringAttention, ScoringBackend


class QFiltersFlashInferImpl(ScoringAttention, FlashInferImpl):
    pass


class QFiltersFlashInferMetadataBuilder(ResidentMetadata, FlashInferMetadataBuilder):
    pass


class QFiltersFlashInferBackend(ScoringBackend, FlashInferBackend):
    @staticmethod
    def get_impl_cls() -> type[QFiltersFlashInferImpl]:
        return QFiltersFlashInferImpl

    @staticmethod
    def get_builder_cls() -> type[QFiltersFlashInferMetadataBuilder]:
        return QFiltersFlashInferMetadataBuilder
