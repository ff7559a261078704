"""Metadata builders whose attention is over resident tokens."""

from typing import Any, Protocol

from vllm.v1.attention.backend import CommonAttentionMetadata


class Lengths(Protocol):
    def resident(self, metadata: CommonAttentionMetadata, group: int) -> CommonAttentionMetadata:
        """The metadata of a step with lengths in resident tokens, for a group of layers."""


class ResidentMetadata:
    """Goes before an ``AttentionMetadataBuilder`` of vLLM.

    Attributes, set by the model runner once the cache exists:
        lengths: what sequences hold; None: before that.
        group: the builder's group of layers.
    """

    lengths: Lengths | None = None
    group = 0

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        if self.lengths is not None:
            common_attn_metadata = self.lengths.resident(common_attn_metadata, self.group)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
