"""What sequences hold in a KV cache, and how many of them fit: integers, no engine and no tensors.

How vLLM groups layers and gives them pages is described in its ``v1/core/kv_cache_utils.py`` (0.32);
tests/test_size.py compares with what engines report.
"""

import dataclasses
from typing import NamedTuple

from vllm_qfilters.budget import RequestLimits, cdiv
from vllm_qfilters.groups import NO_GROUPS, GroupsBeside, layers_per_group


class Held(NamedTuple):
    """What one sequence holds of the cache, in pages of the pool."""

    decoding: int
    reading: int  # at most, while its prompt is read


@dataclasses.dataclass(frozen=True)
class Layers:
    """The attention layers of one device.

    Attributes:
        num_full: that attend to the whole sequence.
        num_sliding: that attend to a sliding window.
        window: tokens that those attend to, the query's own among them.
        num_kv_heads: of a layer on this device.
        head_size: elements of a key.
        value_size: elements of a value; 0 where a latent is both (MLA).
        element_bytes: of the cache's dtype.
    """

    num_full: int
    num_sliding: int
    window: int
    num_kv_heads: int
    head_size: int
    value_size: int
    element_bytes: int

    @property
    def number(self) -> int:
        return self.num_full + self.num_sliding

    def token_bytes(self, num_planes: int = 0) -> int:
        """Bytes of one token in one layer: key, value and ``num_planes`` token stats of each KV head."""
        return self.num_kv_heads * ((self.head_size + self.value_size) * self.element_bytes + 4 * num_planes)


class PlainPool:
    """The cache of plain vLLM: layers with a sliding window give up what it has passed.

    Args:
        layers: of the device.
        block_size: tokens per page.
        step_tokens: ``max_num_batched_tokens``: a layer with a sliding window holds those of a step beside it.
    """

    def __init__(self, layers: Layers, block_size: int, step_tokens: int) -> None:
        self._layers, self._block_size, self._step_tokens = layers, block_size, step_tokens
        self._group_layers = layers_per_group((layers.num_full, layers.num_sliding))
        self.page_bytes = self._group_layers * block_size * layers.token_bytes()  # of all layers of a group

    def held(self, length: int) -> Held:
        """What a sequence of ``length`` tokens holds."""
        whole = cdiv(length, self._block_size)
        full, sliding = (cdiv(count, self._group_layers) for count in (self._layers.num_full, self._layers.num_sliding))
        decoding = min(whole, cdiv(self._layers.window - 1, self._block_size) + 1)
        reading = min(whole, cdiv(self._layers.window - 1 + self._step_tokens, self._block_size) + 1)
        return Held(full * whole + sliding * decoding, full * whole + sliding * reading)


class CompressedPool:
    """The cache with compression: all layers that are compressed hold the same number of tokens.

    Args:
        layers: of the device.
        block_size: tokens per page.
        num_planes: token stats per token and KV head. In pages of layers that are not compressed their room is left
            empty.
        beside: groups of layers that are not compressed.
        step_tokens: ``max_num_batched_tokens``.
    """

    def __init__(
        self,
        layers: Layers,
        block_size: int,
        num_planes: int,
        beside: GroupsBeside = NO_GROUPS,
        step_tokens: int = 0,
    ) -> None:
        self._block_size, self._beside, self._step_tokens = block_size, beside, step_tokens
        in_page = layers_per_group((layers.num_full, layers.num_sliding)) if beside.window else layers.number
        self.page_bytes = in_page * block_size * layers.token_bytes(num_planes)

    def held(self, length: int, limits: RequestLimits) -> Held:
        """What a sequence of ``length`` tokens holds under ``limits``."""
        decoding = cdiv(min(length, limits.budget), self._block_size)
        reading = cdiv(limits.max_resident_tokens(length), self._block_size)
        decoding += self._beside.pages(length, 0, self._block_size)
        return Held(decoding, reading + self._beside.pages(length, self._step_tokens, self._block_size))


def fitting(held: Held, num_pages: int) -> int:
    """How many decoding sequences fit into a pool of ``num_pages``, one of which is vLLM's null block; 0 if not even
    one prompt can be read."""
    usable = num_pages - 1
    return usable // held.decoding if held.reading <= usable else 0
