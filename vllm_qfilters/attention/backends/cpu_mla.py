"""Subclasses of vLLM's MLA backends on CPUs that attend to resident tokens: CPU_MLA, and AMX_MLA in bfloat16.

Imported in the worker where one of them is chosen.
"""

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder
from vllm.v1.attention.backends.mla.amx_mla import AMXMLABackend, AMXMLAImpl, AMXMLAMetadataBuilder
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from vllm_qfilters.attention.latent import LatentAttention
from vllm_qfilters.attention.resident import ResidentMetadata


class QFiltersCPUMLAImpl(LatentAttention, CPUMLAImpl):
    pass


class QFiltersCPUMLAMetadataBuilder(ResidentMetadata, MLACommonMetadataBuilder):
    pass


class QFiltersCPUMLABackend(CPUMLABackend):
    @staticmethod
    def get_impl_cls() -> type[QFiltersCPUMLAImpl]:
        return QFiltersCPUMLAImpl

    @staticmethod
    def get_builder_cls() -> type[QFiltersCPUMLAMetadataBuilder]:
        return QFiltersCPUMLAMetadataBuilder


class QFiltersAMXMLAImpl(LatentAttention, AMXMLAImpl):
    def absorb(self, layer: MLAAttention, query: torch.Tensor) -> torch.Tensor:
        # The layer has given up the projection, and this implementation has it packed for matrix tiles.
        latent = query.new_empty(*query.shape[:2], self.kv_lora_rank)
        ops.bmm_cpu(latent, query, self._w_uk_packed, True, self._w_scale)
        return latent


class QFiltersAMXMLAMetadataBuilder(ResidentMetadata, AMXMLAMetadataBuilder):
    pass


class QFiltersAMXMLABackend(AMXMLABackend):
    @staticmethod
    def get_impl_cls() -> type[QFiltersAMXMLAImpl]:
        return QFiltersAMXMLAImpl

    @staticmethod
    def get_builder_cls() -> type[QFiltersAMXMLAMetadataBuilder]:
        return QFiltersAMXMLAMetadataBuilder
