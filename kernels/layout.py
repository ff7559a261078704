"""Where the bytes of a paged KV cache lie. The only file that knows strides.

vLLM hands every layer a view ``[num_blocks, num_kv_heads, block_size, 2 * head_size]`` of one allocation. What lies inside a
page of one KV head is the business of the attention backend: the CPU kernels store keys transposed ("vec"), packed for matrix
tiles ("amx"), and so on. It is found by writing known values with the backend's own writer (:func:`probe_page_layout`). Behind
the keys and values of all heads, each page carries one float32 score per KV head and slot.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

_BASE = 8  # probe digits 1..8 are exact in every cache dtype, fp8 included

WriteCache = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Element offsets within one page of one KV head (``2 * block_size * head_size`` elements).

    Attributes:
        keys: shape ``[block_size, head_size]``, int64: where element (slot, dim) of the keys lies.
        values: the same for the values.
    """

    keys: torch.Tensor
    values: torch.Tensor


def probe_page_layout(write_cache: WriteCache, block_size: int, head_size: int, dtype: torch.dtype) -> PageLayout:
    """Finds the layout a cache writer uses, by writing the digits of each element's number and reading where they land.

    Args:
        write_cache: ``write_cache(key, value, kv_cache, slot_mapping)``, the backend's writer; key and value of shape
            ``[num_tokens, 1, head_size]``, kv_cache ``[1, 1, block_size, 2 * head_size]``, slot_mapping ``[num_tokens]`` int64.
        block_size: tokens per page.
        head_size: elements per key and value.
        dtype: of key, value and cache.

    Raises:
        RuntimeError: the writer does not place every element exactly once.
    """
    num_elements = block_size * head_size
    numbers = torch.arange(num_elements)
    slots = torch.arange(block_size, dtype=torch.int64)

    def where(which: int) -> torch.Tensor:
        found = torch.zeros(2 * num_elements, dtype=torch.int64)
        scale, is_written = 1, None
        while scale < num_elements:
            digits = (numbers // scale) % _BASE + 1
            rows = digits.to(dtype).view(block_size, 1, head_size)
            pair = [torch.zeros_like(rows), torch.zeros_like(rows)]
            pair[which] = rows
            cache = torch.zeros(1, 1, block_size, 2 * head_size, dtype=dtype)
            write_cache(pair[0], pair[1], cache, slots)
            read = cache.flatten().to(torch.int64)
            is_written = read != 0
            found += (read - 1).clamp(min=0) * scale
            scale *= _BASE
        offsets = torch.full((num_elements,), -1, dtype=torch.int64)
        is_known = is_written & (found < num_elements)
        offsets[found[is_known]] = is_known.nonzero().flatten()
        if int(is_written.sum()) != num_elements or bool((offsets < 0).any()):
            raise RuntimeError(
                f"the attention backend's cache writer does not place each of the {num_elements} elements of a page once "
                f"(block size {block_size}, head size {head_size}, {dtype}): its layout is not supported"
            )
        return offsets.view(block_size, head_size)

    return PageLayout(keys=where(0), values=where(1))


class PagedCache:
    """Keys, values and scores of all layers of one rank, addressed by (layer, page, KV head, slot).

    Args:
        kv_caches: per layer, in order, the view vLLM allocated, shape ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``;
            all of one allocation at a constant distance, each page followed by room for its scores.
        layout: of a page.

    Raises:
        ValueError: the views are not laid out like that.
    """

    def __init__(self, kv_caches: Sequence[torch.Tensor], layout: PageLayout) -> None:
        first = kv_caches[0]
        num_blocks, num_kv_heads, block_size, content = first.shape
        page_elements = block_size * content
        if first.stride()[1:] != (page_elements, content, 1):
            shape = tuple(first.shape)
            raise ValueError(f"pages must be stored head by head, got strides {first.stride()} for shape {shape}")
        layer_stride = kv_caches[1].storage_offset() - first.storage_offset() if len(kv_caches) > 1 else 0
        for index, cache in enumerate(kv_caches):
            expected = (first.shape, first.stride(), first.storage_offset() + index * layer_stride, first.data_ptr())
            found = (cache.shape, cache.stride(), cache.storage_offset(), cache.data_ptr() - index * layer_stride * cache.element_size())
            if found != expected:
                raise ValueError(f"layer {index} is not stored like the first one at a constant distance: {found} != {expected}")
        self.layout = layout
        self.num_layers, self.num_blocks, self.num_kv_heads = len(kv_caches), num_blocks, num_kv_heads
        self.block_size = block_size
        self.pages = first.as_strided(
            (self.num_layers, num_blocks, num_kv_heads, page_elements),
            (layer_stride, first.stride(0), page_elements, 1),
        )  # [num_layers, num_blocks, num_kv_heads, 2 * block_size * head_size]

        content_bytes = num_kv_heads * page_elements * first.element_size()
        score_bytes = num_kv_heads * block_size * 4
        stride_bytes = first.stride(0) * first.element_size()
        if content_bytes + score_bytes > stride_bytes:
            raise ValueError(f"pages have {stride_bytes - content_bytes} bytes left for scores, {score_bytes} are needed")
        raw = first.untyped_storage()
        start = first.storage_offset() * first.element_size() + content_bytes
        self.scores = torch.empty(0, dtype=torch.float32, device=first.device).set_(
            raw,
            start // 4,
            (self.num_layers, num_blocks, num_kv_heads, block_size),
            (layer_stride * first.element_size() // 4, stride_bytes // 4, block_size, 1),
        )  # [num_layers, num_blocks, num_kv_heads, block_size] float32

    def read(self, layer: torch.Tensor, page: torch.Tensor, head: torch.Tensor, slot: torch.Tensor):
        """Keys and values of ``n`` (layer, page, head, slot) places, each of shape ``[n, head_size]``."""
        at = (layer[:, None], page[:, None], head[:, None])
        return self.pages[*at, self.layout.keys[slot]], self.pages[*at, self.layout.values[slot]]

    def write(self, layer: torch.Tensor, page: torch.Tensor, head: torch.Tensor, slot: torch.Tensor, keys, values) -> None:
        """Writes what :meth:`read` returned to ``n`` other places."""
        at = (layer[:, None], page[:, None], head[:, None])
        self.pages[*at, self.layout.keys[slot]] = keys
        self.pages[*at, self.layout.values[slot]] = values

    def copy_pages(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copies whole pages, scores included, in every layer. source, destination: page ids, shape ``[n]``."""
        self.pages[:, destination] = self.pages[:, source]
        self.scores[:, destination] = self.scores[:, source]
