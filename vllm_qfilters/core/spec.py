"""The cache specification: what a page costs, and how many pages one sequence can hold at most."""

import dataclasses
from typing import Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, MambaSpec, SlidingWindowSpec

PLANE_BYTES = 4  # one float32 per token and KV head


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFiltersSpec(FullAttentionSpec):
    """Attention whose sequences hold a bounded number of tokens: full attention, or, where layers of both kinds are in
    one group as with ``--disable-hybrid-kv-cache-manager``, with a sliding window among the last of them.

    Each page carries what the scores of its tokens are made of, if anything, behind its keys and values
    (``page_size_padded``): it is counted in the size of the cache, and allocated, shared and freed with the page.

    Attributes:
        max_resident_tokens: most tokens one sequence holds at any time.
    """

    max_resident_tokens: int

    @classmethod
    def from_attention(
        cls, spec: AttentionSpec, block_size: int, max_resident_tokens: int, num_planes: int
    ) -> "QFiltersSpec":
        """What becomes of a layer's own specification.

        Args:
            block_size: tokens per page. For layers with a sliding window vLLM may have chosen another one.
            num_planes: float32 numbers per token and KV head.
        """
        values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(AttentionSpec)}
        made = cls(**{**values, "block_size": block_size}, max_resident_tokens=max_resident_tokens)
        if num_planes == 0:
            return made
        plane_bytes = made.num_kv_heads * block_size * PLANE_BYTES
        return dataclasses.replace(made, page_size_padded=made.unpadded_page_size_bytes + num_planes * plane_bytes)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        first = specs[0]
        if any(spec != first for spec in specs[1:]):
            raise AssertionError("All layers in the same KV cache group must have the same QFiltersSpec.")
        return first

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        tokens = min(vllm_config.model_config.max_model_len, self.max_resident_tokens)
        return cdiv(tokens, self.block_size) * self.page_size_bytes


def beside_compressed(spec: KVCacheSpec, block_size: int) -> KVCacheSpec:
    """What becomes of the specification of a layer that is not compressed: its pages, if of tokens, are of as many."""
    return dataclasses.replace(spec, block_size=block_size) if isinstance(spec, SlidingWindowSpec) else spec


def in_equal_pages(specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """The specifications with pages of as many bytes: those of all groups come from one pool. Else vLLM would make them
    equal, in ways that pages with token stats cannot follow."""
    page_bytes = max(spec.page_size_bytes for spec in specs.values())
    found = dict(specs)
    for name, spec in specs.items():
        if spec.page_size_bytes < page_bytes:
            assert isinstance(spec, AttentionSpec | MambaSpec)
            found[name] = dataclasses.replace(spec, page_size_padded=page_bytes)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFiltersPageSpec(QFiltersSpec):
    """The same cache in page granularity: vLLM finds the block manager by the class of the specification."""
