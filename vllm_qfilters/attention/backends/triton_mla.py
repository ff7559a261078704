"""The subclass of vLLM's TRITON_MLA backend that attends to resident tokens.

Imported in the worker where that backend is chosen.
"""

from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend, TritonMLAImpl, TritonMLAMetadataBuilder

from vllm_qfilters.attention.latent import LatentAttention
from vllm_qfilters.attention.resident import ResidentMetadata


class QFiltersTritonMLAImpl(LatentAttention, TritonMLAImpl):
    pass


class QFiltersTritonMLAMetadataBuilder(ResidentMetadata, TritonMLAMetadataBuilder):
    pass


class QFiltersTritonMLABackend(TritonMLABackend):
    @staticmethod
    def get_impl_cls() -> type[QFiltersTritonMLAImpl]:
        return QFiltersTritonMLAImpl

    @staticmethod
    def get_builder_cls() -> type[QFiltersTritonMLAMetadataBuilder]:
        return QFiltersTritonMLAMetadataBuilder
