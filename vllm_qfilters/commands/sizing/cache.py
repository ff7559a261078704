"""What sequences hold in a KV cache, and how many of them fit: integers, no engine and no tensors.

How vLLM groups layers and gives them pages is described in its ``v1/core/kv_cache_utils.py`` (0.32);
tests/test_size.py compares with what engines report.
"""

import dataclasses
from typing import NamedTuple

from vllm_qfilters.budget import RequestLimits, cdiv
from vllm_qfilters.groups import NO_GROUPS, PAGES_OF_STATE, GroupsBeside, layers_per_group


class Held(NamedTuple):
    """What one sequence holds of the cache, in pages of the pool."""

    decoding: int
    reading: int  # at most, while its prompt is read


# For each group of layers that keep a state.
STATE = Held(1, 1)
STATE_WITH_PREFIX_CACHE = Held(2, PAGES_OF_STATE)  # the one that is read, and the one that is written


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of one device that have a cache.

    Attributes:
        num_full: that attend to the whole sequence.
        num_sliding: that attend to a sliding window.
        window: tokens that those attend to, the query's own among them.
        num_kv_heads: of a layer of full attention on this device; of any, unless ``sliding_kv_heads`` says otherwise.
        head_size: elements of a key, likewise.
        value_size: elements of a value; 0 where a latent is both (MLA).
        element_bytes: of the cache's dtype.
        sliding_kv_heads: of a layer with a sliding window on this device, if its KV heads are others than those of full
            attention: their number, and the elements of a key and of a value.
        num_states: that keep a state of the sequence.
        state_bytes: of the state of one of them.
    """

    num_full: int
    num_sliding: int
    window: int
    num_kv_heads: int
    head_size: int
    value_size: int
    element_bytes: int
    sliding_kv_heads: tuple[int, int, int] | None = None
    num_states: int = 0
    state_bytes: int = 0

    @property
    def number(self) -> int:
        """Of layers of attention."""
        return self.num_full + self.num_sliding

    @property
    def per_group(self) -> int:
        return layers_per_group((self.num_full, self.num_sliding, self.num_states))

    @property
    def sliding_token_bytes(self) -> int:
        """Bytes of one token in one layer with a sliding window."""
        if self.sliding_kv_heads is None:
            return self.token_bytes()
        number, head_size, value_size = self.sliding_kv_heads
        return number * (head_size + value_size) * self.element_bytes

    @property
    def all_token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.num_full * self.token_bytes() + self.num_sliding * self.sliding_token_bytes

    def token_bytes(self, num_planes: int = 0) -> int:
        """Bytes of one token in one layer of full attention: key, value and ``num_planes`` token stats of each KV
        head."""
        return self.num_kv_heads * ((self.head_size + self.value_size) * self.element_bytes + 4 * num_planes)

    def page_tokens(self, block_size: int) -> int:
        """Tokens per page where ``block_size`` are asked for: vLLM makes a page as large as a state."""
        return block_size * max(1, cdiv(self.state_bytes, block_size * self.token_bytes()))


class PlainPool:
    """The cache of plain vLLM: layers with a sliding window give up what it has passed.

    Args:
        layers: of the device.
        block_size: tokens per page. A layer whose tokens take half of the bytes of others', or a third, has pages of
            as many more.
        step_tokens: ``max_num_batched_tokens``: a layer with a sliding window holds those of a step beside it.
        state: what a sequence holds for each group of layers that keep one.
    """

    def __init__(self, layers: Layers, block_size: int, step_tokens: int, state: Held = STATE) -> None:
        self._layers, self._step_tokens = layers, step_tokens
        self._states = [cdiv(layers.num_states, layers.per_group) * pages for pages in state]
        of_kinds = layers.token_bytes(), layers.sliding_token_bytes
        most = max(size for size, count in zip(of_kinds, (layers.num_full, layers.num_sliding), strict=True) if count)
        self._full_block, self._sliding_block = (block_size * (1 if most % size else most // size) for size in of_kinds)
        self.page_bytes = layers.per_group * block_size * most  # of all layers of a group

    def held(self, length: int) -> Held:
        """What a sequence of ``length`` tokens holds."""
        layers, size = self._layers, self._sliding_block
        full, sliding = (cdiv(count, layers.per_group) for count in (layers.num_full, layers.num_sliding))
        whole = full * cdiv(length, self._full_block)
        decoding, reading = (
            sliding * min(cdiv(length, size), cdiv(layers.window - 1 + beside, size) + 1)
            for beside in (0, self._step_tokens)
        )
        return Held(whole + decoding + self._states[0], whole + reading + self._states[1])


class CompressedPool:
    """The cache with compression: all layers that are compressed hold the same number of tokens.

    Args:
        layers: of the device.
        block_size: tokens per page.
        num_planes: token stats per token and KV head. In pages of layers that are not compressed their room is left
            empty.
        beside: groups of layers that are not compressed. Their pages have as many tokens, and as many bytes.
        step_tokens: ``max_num_batched_tokens``.
        state: what a sequence holds for each group of layers that keep one.

    Attributes:
        token_bytes: room for one token in one layer.
    """

    def __init__(
        self,
        layers: Layers,
        block_size: int,
        num_planes: int,
        beside: GroupsBeside = NO_GROUPS,
        step_tokens: int = 0,
        state: Held = STATE,
    ) -> None:
        self._block_size, self._step_tokens = block_size, step_tokens
        self._windows = dataclasses.replace(beside, num_states=0)
        self._states = [beside.num_states * pages for pages in state]
        self.token_bytes = max(layers.token_bytes(num_planes), layers.sliding_token_bytes if beside.window else 0)
        self.page_bytes = (layers.per_group if beside.number else layers.number) * block_size * self.token_bytes

    def held(self, length: int, limits: RequestLimits) -> Held:
        """What a sequence of ``length`` tokens holds under ``limits``."""
        decoding = cdiv(min(length, limits.budget), self._block_size)
        reading = cdiv(limits.max_resident_tokens(length), self._block_size)
        decoding += self._windows.pages(length, 0, self._block_size) + self._states[0]
        reading += self._windows.pages(length, self._step_tokens, self._block_size) + self._states[1]
        return Held(decoding, reading)


def fitting(held: Held, num_pages: int) -> int:
    """How many decoding sequences fit into a pool of ``num_pages``, one of which is vLLM's null block; 0 if not even
    one prompt can be read."""
    usable = num_pages - 1
    return usable // held.decoding if held.reading <= usable else 0
