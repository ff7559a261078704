"""Where the bytes of a paged KV cache lie. The only file that knows strides.

vLLM hands every layer a view ``[num_blocks, num_kv_heads, block_size, head_size + value_size]`` of one allocation. On
GPUs the view tells where keys and values lie (:class:`StridedCache`). On CPUs what lies inside a page of one KV head is
the business of the attention backend, which stores keys transposed ("vec"), packed for matrix tiles ("amx"), and so on:
it is found by writing known values with the backend's own writer (:func:`probe_page_layout`, :class:`PagedCache`).
Behind the keys and values of all heads, each page carries planes of float32 numbers, one per KV head and slot, where a
method needs any: the first holds scores or what they are made of. A cache of latents (MLA) has one KV head of keys
without values: the value of a token is a part of its key. Its attention backends want pages that lie one behind the
other, so that its planes are memory of their own.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

import torch

_BASE = 8  # probe digits 1..8 are exact in every cache dtype, fp8 included

WriteCache = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Element offsets within one page of one KV head (``block_size * (head_size + value_size)`` elements).

    Attributes:
        keys: shape ``[block_size, head_size]``, int64: where element (slot, dim) of the keys lies.
        values: the same for the values, shape ``[block_size, value_size]``: as large as keys in most models, smaller
            in some (MiMo-V2), 0 in a cache of latents.
    """

    keys: torch.Tensor
    values: torch.Tensor


def probe_page_layout(
    write_cache: WriteCache, block_size: int, head_size: int, dtype: torch.dtype, value_size: int | None = None
) -> PageLayout:
    """Finds the layout a cache writer uses, by writing the digits of each element's number and reading where they land.

    Args:
        write_cache: ``write_cache(key, value, kv_cache, slot_mapping)``, the backend's writer, which stores the numbers
            or little more; key of shape ``[num_tokens, 1, head_size]``, value ``[num_tokens, 1, value_size]``, kv_cache
            ``[1, 1, block_size, head_size + value_size]``, slot_mapping ``[num_tokens]`` int64.
        block_size: tokens per page.
        head_size: elements per key.
        dtype: of key, value and cache.
        value_size: elements per value; None: as many as per key.

    Raises:
        RuntimeError: the writer does not place every element exactly once.
    """
    sizes = head_size, head_size if value_size is None else value_size
    slots = torch.arange(block_size, dtype=torch.int64)

    def where(which: int) -> torch.Tensor:
        num_elements = block_size * sizes[which]
        if num_elements == 0:
            return torch.empty(block_size, 0, dtype=torch.int64)
        numbers = torch.arange(num_elements)
        found = torch.zeros(block_size * sum(sizes), dtype=torch.int64)
        scale, is_written = 1, found == 1
        while scale < num_elements:
            digits = (numbers // scale) % _BASE + 1
            pair = [torch.zeros(block_size, 1, size, dtype=dtype) for size in sizes]
            pair[which] = digits.to(dtype).view(block_size, 1, sizes[which])
            cache = torch.zeros(1, 1, block_size, sum(sizes), dtype=dtype)
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
                f"the attention backend's cache writer does not place each of the {num_elements} elements of a page "
                "once "
                f"(block size {block_size}, head size {head_size}, {dtype}): its layout is not supported"
            )
        return offsets.view(block_size, sizes[which])

    return PageLayout(keys=where(0), values=where(1))


class _Planes:
    """The planes of a cache.

    Attributes:
        num_layers: of the cache, or of the part of it that this is.
        key_scales: float32, shape ``[num_layers]``, or None.
        planes: float32, shape ``[num_layers, num_blocks, num_planes, num_kv_heads, block_size]``; there may be none.
    """

    _BY_LAYER: tuple[str, ...] = ("planes", "key_scales")

    num_layers: int
    key_scales: torch.Tensor | None

    def __init__(self, planes: torch.Tensor) -> None:
        self.planes = planes

    @property
    def scores(self) -> torch.Tensor:
        """The first plane, shape ``[num_layers, num_blocks, num_kv_heads, block_size]``."""
        return self.planes[:, :, 0]

    def of_layers(self, layers: slice) -> Self:
        """Some layers of the cache, in the same memory: as if it had no others."""
        part = copy.copy(self)
        for name in self._BY_LAYER:
            tensor = getattr(self, name)
            setattr(part, name, None if tensor is None else tensor[layers])
        part.num_layers = part.planes.shape[0]
        return part


def read_plane(plane: torch.Tensor, pages: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The token stats of one sequence.

    Args:
        plane: shape ``[num_layers, num_blocks, num_kv_heads, block_size]``.
        pages: of the sequence, shape ``[num_pages]``, int64.
        num_tokens: the sequence holds.

    Returns:
        shape ``[num_layers, num_kv_heads, num_tokens]``.
    """
    return plane[:, pages].transpose(1, 2).flatten(2)[..., :num_tokens]


def write_plane(plane: torch.Tensor, pages: torch.Tensor, stats: torch.Tensor) -> None:
    """Writes what :func:`read_plane` returns, for as many tokens as ``stats`` has."""
    num_tokens, block_size = stats.shape[-1], plane.shape[-1]
    page = pages.repeat_interleave(block_size)[:num_tokens]
    slot = torch.arange(block_size, device=plane.device).repeat(pages.shape[0])[:num_tokens]
    plane[:, page, :, slot] = stats.permute(2, 0, 1)


class PagedCache(_Planes):
    """Keys, values and scores of all layers of one rank, addressed by (layer, page, KV head, slot).

    Args:
        kv_caches: per layer, in order, the view vLLM allocated, ``[num_blocks, num_kv_heads, block_size, head_size +
            value_size]``; all of one allocation at a constant distance, each page followed by room for its planes.
        layout: of a page.
        num_planes: float32 numbers per token and KV head.
        key_scales: of an fp8 cache, float32, shape ``[num_layers]``; None: keys are stored as they are.
        planes: where they are memory of their own.
        latent_size: in a cache of latents, how many of the first elements of a key are its value; None: all.

    Attributes:
        head_size, value_size: elements per key and per value; no value: keys stand alone.
        value_places: offsets of the elements of values in a page, within keys where these stand alone, shape
            ``[block_size, elements]``, int64.
        key_scales: what stored keys are to be multiplied by, float32, shape ``[num_layers]``.
        pages: keys and values, shape ``[num_layers, num_blocks, num_kv_heads, block_size * (head_size + value_size)]``.
        planes: float32, shape ``[num_layers, num_blocks, num_planes, num_kv_heads, block_size]``.

    Raises:
        ValueError: the views are not laid out like that.
    """

    _BY_LAYER = (*_Planes._BY_LAYER, "pages")

    def __init__(
        self,
        kv_caches: Sequence[torch.Tensor],
        layout: PageLayout,
        num_planes: int = 1,
        key_scales: torch.Tensor | None = None,
        planes: torch.Tensor | None = None,
        latent_size: int | None = None,
    ) -> None:
        first = kv_caches[0]
        num_blocks, num_kv_heads, block_size, content = first.shape
        page_elements = block_size * content
        if first.stride()[1:] != (page_elements, content, 1):
            shape = tuple(first.shape)
            raise ValueError(f"pages must be stored head by head, got strides {first.stride()} for shape {shape}")
        self.layout, self.head_size, self.value_size = layout, layout.keys.shape[1], layout.values.shape[1]
        self.num_layers, self.num_blocks, self.num_kv_heads = len(kv_caches), num_blocks, num_kv_heads
        self.block_size = block_size
        self.value_places = layout.values if self.value_size else layout.keys[:, :latent_size]
        self.key_scales = torch.ones(self.num_layers) if key_scales is None else key_scales
        layer_stride = _layer_stride(kv_caches)
        self.pages = first.as_strided(
            (self.num_layers, num_blocks, num_kv_heads, page_elements),
            (layer_stride, first.stride(0), page_elements, 1),
        )
        super().__init__(_planes(first, self.num_layers, layer_stride, num_planes) if planes is None else planes)

    def read(self, layer: torch.Tensor, page: torch.Tensor, head: torch.Tensor, slot: torch.Tensor):
        """Keys and values of ``n`` (layer, page, head, slot) places: ``[n, head_size]`` and ``[n, value_size]``."""
        at = (layer[:, None], page[:, None], head[:, None])
        return self.pages[*at, self.layout.keys[slot]], self.pages[*at, self.layout.values[slot]]

    def write(
        self, layer: torch.Tensor, page: torch.Tensor, head: torch.Tensor, slot: torch.Tensor, keys, values
    ) -> None:
        """Writes what :meth:`read` returned to ``n`` other places."""
        at = (layer[:, None], page[:, None], head[:, None])
        self.pages[*at, self.layout.keys[slot]] = keys
        self.pages[*at, self.layout.values[slot]] = values

    def copy_pages(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copies whole pages, planes included, in every layer. source, destination: page ids, shape ``[n]``."""
        for old, new in zip(source.tolist(), destination.tolist(), strict=True):  # no tensor of them all in between
            self.pages[:, new] = self.pages[:, old]
            self.planes[:, new] = self.planes[:, old]

    def resident_keys(self, layer: int, pages: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Keys of a sequence's tokens in one layer, float32, shape ``[num_kv_heads, num_tokens, head_size]``."""
        return self._resident(layer, pages, num_tokens, self.layout.keys) * self.key_scales[layer]

    def resident_values(self, layer: int, pages: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Values as they are stored, without the scale of an fp8 cache; otherwise like :meth:`resident_keys`."""
        return self._resident(layer, pages, num_tokens, self.value_places)

    def _resident(self, layer: int, pages: torch.Tensor, num_tokens: int, offsets: torch.Tensor) -> torch.Tensor:
        head_size = offsets.shape[1]
        offsets = offsets.flatten().expand(self.num_kv_heads, pages.shape[0], -1)
        elements = self.pages[layer, pages].to(torch.float32).transpose(0, 1)  # first: PyTorch gathers no fp8
        return elements.gather(2, offsets).view(self.num_kv_heads, -1, head_size)[:, :num_tokens]


class StridedCache(_Planes):
    """Keys, values and planes of all layers of one rank, where key and value of a token lie side by side: ``key |
    value``, or the key alone in a cache of latents.

    So they do in every layout vLLM's GPU backends choose between: tokens or heads outermost in a page, layers or pages
    outermost in the allocation.

    Args:
        kv_caches: per layer, in order, the view vLLM allocated, ``[num_blocks, num_kv_heads, block_size, head_size +
            value_size]``; all of one allocation at a constant distance, each page dense and followed by room for its
            planes.
        num_planes: float32 numbers per token and KV head.
        key_scales: of an fp8 cache, float32, shape ``[num_layers]``; None: keys are stored as they are.
        value_size: elements per value; None: as many as per key; 0: keys stand alone.
        planes: where they are memory of their own.
        latent_size: in a cache of latents, how many of the first elements of a key are its value; None: all.

    Attributes:
        head_size, value_size: elements per key and per value; no value: keys stand alone.
        value_places: of the elements of a value among those of a token: behind its key, or in it where keys stand
            alone.
        key_values: shape ``[num_layers, num_blocks, num_kv_heads, block_size, head_size + value_size]``, the dtype of
            the cache.
        planes: float32, shape ``[num_layers, num_blocks, num_planes, num_kv_heads, block_size]``.
        words: the pages with the planes in them, bit by bit: shape ``[num_layers, num_blocks, page bytes / 4]``, int32.
        words_of_planes: planes that are memory of their own, likewise; None: they lie in the pages.

    Raises:
        ValueError: the views are not laid out like that.
    """

    _BY_LAYER = (*_Planes._BY_LAYER, "key_values", "words", "words_of_planes")

    def __init__(
        self,
        kv_caches: Sequence[torch.Tensor],
        num_planes: int = 1,
        key_scales: torch.Tensor | None = None,
        value_size: int | None = None,
        planes: torch.Tensor | None = None,
        latent_size: int | None = None,
    ) -> None:
        first = kv_caches[0]
        self.num_layers = len(kv_caches)
        self.key_scales = key_scales
        self.num_blocks, self.num_kv_heads, self.block_size, content = first.shape
        self.head_size = content // 2 if value_size is None else content - value_size
        self.value_size = content - self.head_size
        self.value_places = slice(self.head_size, content) if self.value_size else slice(0, latent_size or content)
        head_major = (self.block_size * content, content, 1)
        token_major = (content, self.num_kv_heads * content, 1)
        if not _has_strides(first, head_major) and not _has_strides(first, token_major):
            raise ValueError(
                f"pages must be dense, head by head or token by token, got strides {first.stride()} for shape "
                f"{tuple(first.shape)}"
            )
        layer_stride = _layer_stride(kv_caches)
        self.key_values = first.as_strided((self.num_layers, *first.shape), (layer_stride, *first.stride()))
        super().__init__(_planes(first, self.num_layers, layer_stride, num_planes) if planes is None else planes)
        self.words_of_planes = None if planes is None else planes.view(torch.int32).flatten(2)
        num_planes = num_planes if planes is None else 0
        element_size = first.element_size()
        num_bytes = self.num_kv_heads * self.block_size * (content * element_size + 4 * num_planes)
        self.words = torch.empty(0, dtype=torch.int32, device=first.device).set_(
            first.untyped_storage(),
            first.storage_offset() * element_size // 4,
            (self.num_layers, self.num_blocks, num_bytes // 4),
            (layer_stride * element_size // 4, first.stride(0) * element_size // 4, 1),
        )

    def read(self, layer: torch.Tensor, page: torch.Tensor, head: torch.Tensor, slot: torch.Tensor):
        """Keys and values of ``n`` (layer, page, head, slot) places: ``[n, head_size]`` and ``[n, value_size]``."""
        return self.key_values[layer, page, head, slot].tensor_split([self.head_size], dim=-1)

    def write(
        self, layer: torch.Tensor, page: torch.Tensor, head: torch.Tensor, slot: torch.Tensor, keys, values
    ) -> None:
        """Writes what :meth:`read` returned to ``n`` other places."""
        self.key_values[layer, page, head, slot] = torch.cat((keys, values), dim=-1)

    def copy_pages(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copies whole pages, planes included, in every layer. source, destination: page ids, shape ``[n]``."""
        for words in (self.words, self.words_of_planes):
            if words is not None:
                words[:, destination] = words[:, source]

    def resident_keys(self, layer: int, pages: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Keys of a sequence's tokens in one layer, float32, shape ``[num_kv_heads, num_tokens, head_size]``."""
        keys = self._resident(layer, pages, num_tokens, slice(None, self.head_size))
        return keys if self.key_scales is None else keys * self.key_scales[layer]

    def resident_values(self, layer: int, pages: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Values as they are stored, without the scale of an fp8 cache; otherwise like :meth:`resident_keys`."""
        return self._resident(layer, pages, num_tokens, self.value_places)

    def _resident(self, layer: int, pages: torch.Tensor, num_tokens: int, part: slice) -> torch.Tensor:
        found = self.key_values[layer, pages][..., part]  # [num_pages, num_kv_heads, block_size, head_size]
        return found.transpose(0, 1).flatten(1, 2)[:, :num_tokens].to(torch.float32)


def _has_strides(cache: torch.Tensor, inner: tuple[int, ...]) -> bool:
    """Whether a page has these strides; the stride of a dimension of size 1 says nothing."""
    return all(
        size == 1 or found == wanted
        for size, found, wanted in zip(cache.shape[1:], cache.stride()[1:], inner, strict=True)
    )


def _layer_stride(kv_caches: Sequence[torch.Tensor]) -> int:
    """The constant distance between the layers of one allocation, in elements; 0 if there is one layer."""
    first = kv_caches[0]
    layer_stride = kv_caches[1].storage_offset() - first.storage_offset() if len(kv_caches) > 1 else 0
    for index, cache in enumerate(kv_caches):
        expected = (first.shape, first.stride(), first.storage_offset() + index * layer_stride, first.data_ptr())
        first_byte = cache.data_ptr() - index * layer_stride * cache.element_size()
        found = (cache.shape, cache.stride(), cache.storage_offset(), first_byte)
        if found != expected:
            raise ValueError(
                f"layer {index} does not lie a constant distance after the one before: {found} != {expected}"
            )
    return layer_stride


def _planes(first: torch.Tensor, num_layers: int, layer_stride: int, num_planes: int) -> torch.Tensor:
    """The room behind the pages, float32, shape ``[num_layers, num_blocks, num_planes, num_kv_heads, block_size]``."""
    num_blocks, num_kv_heads, block_size, content = first.shape
    element_size = first.element_size()
    content_bytes = num_kv_heads * block_size * content * element_size
    plane_bytes = num_planes * num_kv_heads * block_size * 4
    # Pages of one layer follow each other, or those of one block.
    page_bytes = min(first.stride(0), layer_stride or first.stride(0)) * element_size
    if content_bytes + plane_bytes > page_bytes:
        raise ValueError(f"pages have {page_bytes - content_bytes} bytes left for scores, {plane_bytes} are needed")
    return torch.empty(0, dtype=torch.float32, device=first.device).set_(
        first.untyped_storage(),
        (first.storage_offset() * element_size + content_bytes) // 4,
        (num_layers, num_blocks, num_planes, num_kv_heads, block_size),
        (
            layer_stride * element_size // 4,
            first.stride(0) * element_size // 4,
            num_kv_heads * block_size,
            block_size,
            1,
        ),
    )
