"""Where bytes lie: probing a backend's cache writer, and the cache on an allocation like vLLM's."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops

from tests.marks import needs_avx512, needs_fp8_caches
from vllm_qfilters.attention import FP8_DTYPES
from vllm_qfilters.kernels import PagedCache, probe_page_layout
from vllm_qfilters.kernels.layout import PageLayout, read_plane, write_plane
from vllm_qfilters.worker.runner_v1 import cache_writer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCORE_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a small cache."""

    num_layers: int = 3
    num_blocks: int = 6
    num_kv_heads: int = 2
    block_size: int = 16
    head_size: int = 8
    dtype: torch.dtype = torch.float32
    num_planes: int = 2

    @property
    def content_bytes(self) -> int:
        return self.num_kv_heads * self.block_size * 2 * self.head_size * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.content_bytes + SCORE_BYTES * self.num_planes * self.num_kv_heads * self.block_size

    @property
    def layer_bytes(self) -> int:
        return self.num_blocks * self.page_bytes

    def element_byte(self, layer: int, page: int, head: int, element: int) -> int:
        """The byte of the allocation at which an element of a head's part of a page begins."""
        head_elements = 2 * self.block_size * self.head_size
        inside = (head * head_elements + element) * self.dtype.itemsize
        return layer * self.layer_bytes + page * self.page_bytes + inside

    def score_byte(self, layer: int, page: int, head: int, slot: int) -> int:
        inside = SCORE_BYTES * (head * self.block_size + slot)
        return layer * self.layer_bytes + page * self.page_bytes + self.content_bytes + inside


def kv_cache_views(buffer: torch.Tensor, geometry: Geometry, page_bytes: int | None = None) -> list[torch.Tensor]:
    """The views vLLM gives to attention layers: one int8 allocation, layers outermost, pages padded behind their
    content.
    """
    page_elements = (page_bytes or geometry.page_bytes) // geometry.dtype.itemsize
    layer_elements = geometry.num_blocks * page_elements
    shape = (geometry.num_blocks, geometry.num_kv_heads, geometry.block_size, 2 * geometry.head_size)
    strides = (page_elements, geometry.block_size * 2 * geometry.head_size, 2 * geometry.head_size, 1)
    elements = buffer.view(geometry.dtype)
    first = elements.storage_offset()
    return [elements.as_strided(shape, strides, first + layer * layer_elements) for layer in range(geometry.num_layers)]


def random_layout(block_size: int, head_size: int, seed: int = 0) -> PageLayout:
    """Keys and values anywhere in a page."""
    places = torch.randperm(2 * block_size * head_size, generator=torch.Generator().manual_seed(seed))
    keys, values = places.view(2, block_size, head_size)
    return PageLayout(keys=keys, values=values)


def make_cache(geometry: Geometry, seed: int = 0) -> tuple[torch.Tensor, PagedCache]:
    """A cache of random numbers in a random layout, and the bytes it lies in."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.zeros(geometry.num_layers * geometry.layer_bytes, dtype=torch.int8)
    layout = random_layout(geometry.block_size, geometry.head_size, seed)
    cache = PagedCache(kv_cache_views(buffer, geometry), layout, geometry.num_planes)
    cache.pages.copy_(torch.randn(cache.pages.shape, generator=generator))
    cache.planes.copy_(torch.randn(cache.planes.shape, generator=generator))
    return buffer, cache


def writer_of(layout: PageLayout):
    """A cache writer that uses ``layout``."""

    def write_cache(key, value, kv_cache, slot_mapping):
        block_size = kv_cache.shape[2]
        for token, slot in enumerate(slot_mapping.tolist()):
            for head in range(kv_cache.shape[1]):
                page = kv_cache[slot // block_size, head].view(-1)
                page[layout.keys[slot % block_size]] = key[token, head]
                page[layout.values[slot % block_size]] = value[token, head]

    return write_cache


def identity_layout(block_size: int, head_size: int) -> PageLayout:
    keys = torch.arange(block_size * head_size).view(block_size, head_size)
    return PageLayout(keys=keys, values=keys + block_size * head_size)


def transposed_keys_layout(block_size: int, head_size: int) -> PageLayout:
    identity = identity_layout(block_size, head_size)
    keys = torch.arange(block_size * head_size).view(head_size, block_size).T.contiguous()
    return PageLayout(keys=keys, values=identity.values)


def paired_layout(block_size: int, head_size: int) -> PageLayout:
    """As matrix tiles take them: keys in pairs of dimensions of 16 tokens in a row, values in pairs of tokens."""
    identity = identity_layout(block_size, head_size)
    keys = identity.keys.view(block_size // 16, head_size // 2, 16, 2).transpose(1, 2)
    values = identity.values.view(block_size // 2, head_size, 2).transpose(1, 2)
    return PageLayout(*(places.reshape(block_size, head_size) for places in (keys, values)))


LAYOUTS = {
    "identity": identity_layout,
    "transposed-keys": transposed_keys_layout,
    "paired": paired_layout,
    "permuted": random_layout,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block_size", "head_size"), [(16, 8), (32, 80), (128, 64)], ids=["bs16-D8", "bs32-D80", "bs128-D64"]
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_probing_finds_the_layout_a_writer_uses(name, block_size, head_size, dtype):
    layout = LAYOUTS[name](block_size, head_size)
    found = probe_page_layout(writer_of(layout), block_size, head_size, DTYPES[dtype])
    assert torch.equal(found.keys, layout.keys)
    assert torch.equal(found.values, layout.values)


def drop_key(key, value, kv_cache, layout):
    kv_cache.view(-1)[layout.keys[3, 5]] = 0


def drop_value(key, value, kv_cache, layout):
    kv_cache.view(-1)[layout.values[0, 0]] = 0


def drop_last_token(key, value, kv_cache, layout):
    kv_cache.view(-1)[layout.keys[-1]] = 0


def double_key_over_value(key, value, kv_cache, layout):
    kv_cache.view(-1)[layout.values[2, 2]] = key[3, 0, 5]


def add_key_to_value(key, value, kv_cache, layout):
    kv_cache.view(-1)[layout.values[2, 2]] += key[3, 0, 5]


def double_key_over_key(key, value, kv_cache, layout):
    kv_cache.view(-1)[layout.keys[2, 2]] = key[3, 0, 5]


def double_value_over_value(key, value, kv_cache, layout):
    kv_cache.view(-1)[layout.values[2, 2]] = value[3, 0, 5]


DAMAGES = [
    drop_key,
    drop_value,
    drop_last_token,
    double_key_over_value,
    add_key_to_value,
    double_key_over_key,
    double_value_over_value,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_writer_that_drops_or_doubles_elements_is_refused(damage):
    layout = random_layout(16, 8)
    write_cache = writer_of(layout)

    def damaged(key, value, kv_cache, slot_mapping):
        write_cache(key, value, kv_cache, slot_mapping)
        damage(key, value, kv_cache, layout)

    with pytest.raises(RuntimeError, match="each of the 128 elements.*block size 16, head size 8, torch.bfloat16"):
        probe_page_layout(damaged, 16, 8, torch.bfloat16)


def vllm_cpu_writer(isa: str):
    """What vLLM's CPU backend does in ``do_kv_cache_update``."""

    def write_cache(key, value, kv_cache, slot_mapping):
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        key_cache, value_cache = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa)

    return write_cache


CPU_WRITERS = [
    pytest.param(isa, block_size, head_size, dtype, id=f"{isa}-bs{block_size}-D{head_size}-{dtype}", marks=marks)
    for isa, block_sizes, head_sizes, dtypes, marks in (
        ("vec", (32, 64, 128), (32, 64, 80, 128), DTYPES, ()),
        ("vec16", (16,), (80,), DTYPES, ()),
        ("amx", (32, 128), (64, 128), ("bf16",), needs_avx512),
    )
    for block_size in block_sizes
    for head_size in head_sizes
    for dtype in dtypes
]


@pytest.mark.parametrize(("isa", "block_size", "head_size", "dtype"), CPU_WRITERS)
def test_keys_and_values_are_read_where_vllm_wrote_them(isa, block_size, head_size, dtype):
    """In a padded cache of several pages and heads, in any order of tokens, with padding tokens between them."""
    geometry = Geometry(num_layers=2, num_blocks=4, block_size=block_size, head_size=head_size, dtype=DTYPES[dtype])
    write_cache = vllm_cpu_writer(isa)
    views = kv_cache_views(torch.zeros(2 * geometry.layer_bytes, dtype=torch.int8), geometry)
    cache = PagedCache(views, probe_page_layout(write_cache, block_size, head_size, geometry.dtype))

    torch.manual_seed(0)
    num_tokens = 3 * block_size
    slots = torch.randperm(geometry.num_blocks * block_size)[:num_tokens]
    slots[::7] = -1
    key, value = torch.randn(2, num_tokens, geometry.num_kv_heads, head_size).to(geometry.dtype)
    write_cache(key, value, views[1], slots)

    is_token = slots >= 0
    slots, key, value = slots[is_token], key[is_token], value[is_token]
    for head in range(geometry.num_kv_heads):
        layer = torch.full_like(slots, 1)
        found = cache.read(layer, slots // block_size, torch.full_like(slots, head), slots % block_size)
        assert torch.equal(found[0], key[:, head])
        assert torch.equal(found[1], value[:, head])
    assert not cache.pages[0].any() and not cache.scores.any()


@needs_fp8_caches
@pytest.mark.parametrize(("key_scale", "value_scale"), [(1.0, 1.0), (0.3, 0.02), (7.7, 1.3)])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("isa", ["vec", pytest.param("amx", marks=needs_avx512)])
def test_an_fp8_cache_is_read_as_vllm_wrote_it(isa, dtype, kv_cache_dtype, key_scale, value_scale):
    def do_kv_cache_update(layer, key, value, kv_cache, slot_mapping):
        key_cache, value_cache = kv_cache.view(*kv_cache.shape[:2], 64, -1).chunk(2, dim=2)
        scales = dict(k_scale=layer._k_scale_float, v_scale=layer._v_scale_float, kv_cache_dtype=kv_cache_dtype)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa, **scales)

    kv_cache = torch.zeros(1, 1, 32, 128, dtype=torch.uint8)
    impl = SimpleNamespace(do_kv_cache_update=do_kv_cache_update)
    layer = SimpleNamespace(impl=impl, kv_cache=kv_cache, _k_scale_float=key_scale, _v_scale_float=value_scale)
    layout = probe_page_layout(cache_writer(layer, DTYPES[dtype]), 32, 64, FP8_DTYPES[kv_cache_dtype])

    key, value = torch.randn(2, 32, 1, 64, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    do_kv_cache_update(layer, key, value, kv_cache, torch.arange(32))
    stored = kv_cache.view(FP8_DTYPES[kv_cache_dtype]).flatten().float()
    for offsets, scale, written in ((layout.keys, key_scale, key), (layout.values, value_scale, value)):
        # At most a mantissa's last bit is cut off, or a multiple of the smallest number.
        rtol, atol = (0.13, 0.002 * scale) if kv_cache_dtype == "fp8" else (0.26, 2e-5 * scale)
        torch.testing.assert_close(stored[offsets] * scale, written[:, 0].float(), rtol=rtol, atol=atol)


GEOMETRIES = {
    "L3-H2-bs16-D8-fp32": Geometry(),
    "L1-H1-bs32-D16-bf16": Geometry(num_layers=1, num_kv_heads=1, block_size=32, head_size=16, dtype=torch.bfloat16),
    "L2-H3-bs16-D10-fp16": Geometry(num_layers=2, num_kv_heads=3, head_size=10, dtype=torch.float16),
}


@pytest.fixture(params=GEOMETRIES)
def geometry(request):
    return GEOMETRIES[request.param]


def random_places(geometry: Geometry, count: int) -> tuple[torch.Tensor, ...]:
    """``count`` different (layer, page, head, slot) places."""
    sizes = (geometry.num_layers, geometry.num_blocks, geometry.num_kv_heads, geometry.block_size)
    numbers = torch.randperm(torch.Size(sizes).numel(), generator=torch.Generator().manual_seed(1))[:count]
    return torch.unravel_index(numbers, sizes)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int8).flatten()


def test_elements_and_scores_lie_at_their_bytes_of_the_allocation(geometry):
    buffer, cache = make_cache(geometry)
    for layer, page, head, slot in zip(*(numbers.tolist() for numbers in random_places(geometry, 40)), strict=True):
        at = [torch.tensor([index]) for index in (layer, page, head, slot)]
        keys, values = cache.read(*at)
        for row, offsets in ((keys[0], cache.layout.keys[slot]), (values[0], cache.layout.values[slot])):
            for dim, element in enumerate(offsets.tolist()):
                start = geometry.element_byte(layer, page, head, element)
                assert torch.equal(buffer[start : start + geometry.dtype.itemsize], bytes_of(row[dim : dim + 1]))
        start = geometry.score_byte(layer, page, head, slot)
        assert torch.equal(
            buffer[start : start + SCORE_BYTES], bytes_of(cache.scores[layer, page, head, slot : slot + 1])
        )


def test_a_write_changes_nothing_but_its_places(geometry):
    buffer, cache = make_cache(geometry)
    layer, page, head, slot = random_places(geometry, 20)
    torch.manual_seed(2)
    keys, values = torch.randn(2, 20, geometry.head_size).to(geometry.dtype)
    expected = buffer.clone()
    for row, (at_layer, at_page, at_head, at_slot) in enumerate(zip(layer, page, head, slot, strict=True)):
        for vectors, offsets in ((keys, cache.layout.keys[at_slot]), (values, cache.layout.values[at_slot])):
            for dim, element in enumerate(offsets.tolist()):
                start = geometry.element_byte(int(at_layer), int(at_page), int(at_head), element)
                expected[start : start + geometry.dtype.itemsize] = bytes_of(vectors[row, dim : dim + 1])
    cache.write(layer, page, head, slot, keys, values)
    assert torch.equal(buffer, expected)
    found = cache.read(layer, page, head, slot)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)


def test_scores_and_contents_do_not_overlap(geometry):
    buffer, cache = make_cache(geometry)
    buffer.zero_()
    cache.planes.fill_(-1.5)
    assert not cache.pages.any()
    expected = torch.zeros_like(buffer)
    number = bytes_of(torch.tensor([-1.5]))
    for layer, page, plane, head, slot in torch.cartesian_prod(
        *(torch.arange(size) for size in cache.planes.shape)
    ).tolist():
        start = geometry.score_byte(layer, page, plane * geometry.num_kv_heads + head, slot)
        expected[start : start + SCORE_BYTES] = number
    assert torch.equal(buffer, expected)

    buffer.zero_()
    cache.pages.fill_(-1.5)
    assert not cache.planes.any()
    contents = geometry.num_layers * geometry.num_blocks * geometry.content_bytes
    assert int((buffer.view(geometry.dtype) == -1.5).sum()) == contents // geometry.dtype.itemsize


def test_copied_pages_take_their_scores_along_in_every_layer(geometry):
    buffer, cache = make_cache(geometry)
    expected = buffer.view(geometry.num_layers, geometry.num_blocks, geometry.page_bytes).clone()
    for source, destination in ((4, 1), (0, 5)):
        expected[:, destination] = expected[:, source]
    cache.copy_pages(torch.tensor([4, 0]), torch.tensor([1, 5]))
    assert torch.equal(buffer, expected.flatten())


def test_a_cache_may_begin_anywhere_in_its_allocation():
    geometry = Geometry()
    whole = torch.zeros(geometry.num_layers * geometry.layer_bytes + 512, dtype=torch.int8)
    cache = PagedCache(kv_cache_views(whole[256:-256], geometry), random_layout(16, 8), geometry.num_planes)
    cache.pages.fill_(1.0)
    cache.planes.fill_(1.0)
    assert not whole[:256].any() and not whole[-256:].any()
    assert bool((whole[256:-256].view(torch.float32) == 1).all())


def test_room_beyond_the_scores_is_left_alone():
    geometry = Geometry()
    page_bytes = geometry.page_bytes + 64
    buffer = torch.zeros(geometry.num_layers * geometry.num_blocks * page_bytes, dtype=torch.int8)
    cache = PagedCache(kv_cache_views(buffer, geometry, page_bytes), random_layout(16, 8), geometry.num_planes)
    cache.pages.fill_(1.0)
    cache.planes.fill_(1.0)
    by_page = buffer.view(-1, page_bytes)
    assert not by_page[:, geometry.page_bytes :].any()
    assert bool((by_page[:, : geometry.page_bytes].contiguous().view(torch.float32) == 1).all())


@pytest.mark.parametrize("missing_bytes", [4, 64, SCORE_BYTES * 2 * 16])
def test_pages_without_room_for_scores_are_refused_naming_both_sizes(missing_bytes):
    geometry = Geometry()
    needed = SCORE_BYTES * geometry.num_planes * geometry.num_kv_heads * geometry.block_size
    page_bytes = geometry.page_bytes - missing_bytes
    buffer = torch.zeros(geometry.num_layers * geometry.num_blocks * page_bytes, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"have {needed - missing_bytes} bytes left for scores, {needed} are needed"):
        PagedCache(kv_cache_views(buffer, geometry, page_bytes), random_layout(16, 8), geometry.num_planes)


def test_tokens_of_a_sequence_are_read_in_order_from_its_pages(geometry):
    _, cache = make_cache(geometry)
    pages, num_tokens = torch.tensor([4, 0, 2]), 2 * geometry.block_size + 3
    page = pages.repeat_interleave(geometry.block_size)[:num_tokens]
    slot = torch.arange(geometry.block_size).repeat(3)[:num_tokens]
    for layer in range(geometry.num_layers):
        keys = cache.resident_keys(layer, pages, num_tokens)
        assert keys.dtype == torch.float32
        for head in range(geometry.num_kv_heads):
            at = [torch.full((num_tokens,), index) for index in (layer, head)]
            assert torch.equal(keys[head], cache.read(at[0], page, at[1], slot)[0].to(torch.float32))
            for plane in range(geometry.num_planes):
                numbers = read_plane(cache.planes[:, :, plane], pages, num_tokens)[layer, head]
                assert torch.equal(numbers, cache.planes[layer, page, plane, head, slot])


def test_a_plane_is_written_for_the_tokens_of_a_sequence_alone(geometry):
    _buffer, cache = make_cache(geometry)
    before, pages, num_tokens = cache.planes.clone(), torch.tensor([4, 0, 2]), 2 * geometry.block_size + 3
    numbers = torch.randn(geometry.num_layers, geometry.num_kv_heads, num_tokens)
    write_plane(cache.planes[:, :, 1], pages, numbers)
    assert torch.equal(read_plane(cache.planes[:, :, 1], pages, num_tokens), numbers)
    assert torch.equal(cache.planes[:, :, 0], before[:, :, 0])
    is_changed = (cache.planes != before)[:, :, 1].any(2)  # [num_layers, num_blocks, block_size]
    assert not is_changed[:, [1, 3, 5]].any() and not is_changed[:, 2, 3:].any()


def token_major(views: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same shape with all heads of a token side by side."""
    return [
        view.as_strided(
            view.shape, (view.stride(0), view.shape[3], view.shape[1] * view.shape[3], 1), view.storage_offset()
        )
        for view in views
    ]


@pytest.mark.parametrize(
    ("rearrange", "message"),
    [
        pytest.param(token_major, "head by head", id="token-major"),
        pytest.param(lambda views: [view.transpose(2, 3) for view in views], "head by head", id="transposed"),
        pytest.param(lambda views: [view[..., ::2] for view in views], "head by head", id="every-other-element"),
        pytest.param(
            lambda views: [views[0], views[2], views[1]], "layer 2 .* constant distance", id="layers-out-of-order"
        ),
        pytest.param(
            lambda views: [views[0], views[1], views[2][1:]], "layer 2 .* constant distance", id="fewer-pages"
        ),
        pytest.param(
            lambda views: [view.clone() for view in views], "layer 1 .* constant distance", id="separate-allocations"
        ),
        pytest.param(
            lambda views: [views[0], views[1][::2], views[2]], "layer 1 .* constant distance", id="other-strides"
        ),
    ],
)
def test_views_that_are_not_laid_out_like_vllms_are_refused(rearrange, message):
    geometry = Geometry()
    views = kv_cache_views(torch.zeros(geometry.num_layers * geometry.layer_bytes, dtype=torch.int8), geometry)
    with pytest.raises(ValueError, match=message):
        PagedCache(rearrange(views), random_layout(16, 8))
