"""The cache specification: what a page costs, and how many pages one sequence can hold at most."""

import dataclasses
from typing import Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import FullAttentionSpec

PLANE_BYTES = 4  # one float32 per token and KV head


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFiltersSpec(FullAttentionSpec):
    """Full attention whose sequences hold a bounded number of tokens.

    Each page carries what the scores of its tokens are made of behind its keys and values (``page_size_padded``): it is counted
    in the size of the cache, and allocated, shared and freed with the page.

    Attributes:
        max_resident_tokens: most tokens one sequence holds at any time.
    """

    max_resident_tokens: int

    @classmethod
    def from_full_attention(cls, spec: FullAttentionSpec, max_resident_tokens: int, num_planes: int) -> "QFiltersSpec":
        """num_planes: float32 numbers per token and KV head."""
        values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(FullAttentionSpec)}
        plane_bytes = spec.num_kv_heads * spec.block_size * PLANE_BYTES
        values["page_size_padded"] = spec.unpadded_page_size_bytes + num_planes * plane_bytes
        return cls(**values, max_resident_tokens=max_resident_tokens)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        first = specs[0]
        if any(spec != first for spec in specs[1:]):
            raise AssertionError("All layers in the same KV cache group must have the same QFiltersSpec.")
        return first

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        tokens = min(vllm_config.model_config.max_model_len, self.max_resident_tokens)
        return cdiv(tokens, self.block_size) * self.page_size_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFiltersPageSpec(QFiltersSpec):
    """The same cache in page granularity: vLLM finds the block manager by the class of the specification."""
