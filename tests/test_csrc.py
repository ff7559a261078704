"""The C++ operators against ``kernels.reference``, and the package without them."""

import pathlib
import random
import shutil
import subprocess
import sys

import pytest
import torch

import vllm_qfilters
from tests.test_compact import SEQUENCES, Eviction, make_scores
from tests.test_layout import DTYPES, LAYOUTS, Geometry, make_cache
from vllm_qfilters import kernels
from vllm_qfilters.kernels import cpp, reference
from vllm_qfilters.methods.base import Model
from vllm_qfilters.methods.qfilters.static import StaticFilter

PACKAGE = pathlib.Path(vllm_qfilters.__file__).parent

OPERATORS = (
    "score_and_store",
    "mean_standardised",
    "select_kept",
    "expected_attention",
    "observed_attention",
    "distinctness",
    "value_norms",
    "close_gaps",
    "page_scores",
)
needs_library = pytest.mark.skipif(kernels.IMPLEMENTATION != "C++", reason=f"{cpp.LIBRARY} is not built")


NO_PAGED_KEYS = [  # argument of an operator that reads keys, what it must not be, and the refusal
    pytest.param(1, torch.zeros(8, 8, dtype=torch.int64), "offsets must be", id="other-layout"),
    pytest.param(1, torch.zeros(16, 16, dtype=torch.int64)[:, ::2], "offsets must be", id="offsets-apart"),
    pytest.param(2, torch.tensor([4, 6]), "beyond the 6 there are", id="page-beyond"),
    pytest.param(3, 33, "for 33 tokens", id="too-few-pages"),
]


def make_filters(num_heads: int, head_size: int) -> torch.Tensor:
    return torch.randn(num_heads, head_size, generator=torch.Generator().manual_seed(1))


def make_step(num_tokens: int, num_heads: int, head_size: int, block_size: int, dtype: torch.dtype, is_strided: bool):
    """(key, score_plane, slot_mapping) of one step: keys in a qkv tensor, scores in a padded cache full of NaN."""
    generator = torch.Generator().manual_seed(num_tokens * head_size + num_heads)
    columns = num_heads * head_size
    qkv = torch.randn(num_tokens, 5 * columns, generator=generator).to(dtype)
    key = qkv[:, 3 * columns : 4 * columns].view(num_tokens, num_heads, head_size)
    num_blocks = num_tokens // block_size + 2
    padded = torch.full((num_blocks, num_heads * block_size + 24), float("nan"))
    score_plane = padded[:, 24:].view(num_blocks, num_heads, block_size)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens].clone()
    slots[::7] = -1
    return key if is_strided else key.contiguous(), score_plane, slots


@pytest.mark.sampled(7)
@needs_library
@pytest.mark.parametrize("is_strided", [False, True], ids=["contiguous", "qkv"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 128], ids="bs{}".format)
@pytest.mark.parametrize("head_size", [32, 64, 80, 100, 128], ids="D{}".format)
@pytest.mark.parametrize("num_heads", [1, 3, 8], ids="H{}".format)
@pytest.mark.parametrize("num_tokens", [1, 63, 100, 1000], ids="T{}".format)
def test_score_and_store_matches_reference(num_tokens, num_heads, head_size, block_size, dtype, is_strided):
    key, score_plane, slots = make_step(num_tokens, num_heads, head_size, block_size, DTYPES[dtype], is_strided)
    filters = make_filters(num_heads, head_size)
    untouched = score_plane._base.clone()
    cpp.score_and_store(key, filters, score_plane, slots)
    found = score_plane.clone()
    score_plane._base.copy_(untouched)
    reference.score_and_store(key, filters, score_plane, slots)
    torch.testing.assert_close(found, score_plane, atol=1e-4, rtol=1e-5, equal_nan=True)
    assert int(found.isnan().sum()) == found.numel() - num_heads * int((slots >= 0).sum())
    assert bool(score_plane._base[:, :24].isnan().all())


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float_is_read_as_what_it_is(dtype):
    """All 65536 patterns of 16 bits, denormal, infinite and NaN included."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    key = bits.view(DTYPES[dtype]) if dtype != "fp32" else bits.view(torch.bfloat16).float()
    key = key.view(-1, 1, 1).expand(-1, 1, 16).contiguous()
    filters = torch.zeros(1, 16)
    filters[0, 5] = 1.0
    key[..., :5], key[..., 6:] = 0, 0
    score_plane = torch.zeros(512, 1, 128)
    cpp.score_and_store(key, filters, score_plane, torch.arange(2**16))
    torch.testing.assert_close(score_plane.flatten(), key[:, 0, 5].float(), atol=0, rtol=0, equal_nan=True)


@needs_library
def test_tokens_beyond_the_slots_are_not_read():
    key, score_plane, slots = make_step(10, 3, 64, 16, torch.float32, is_strided=True)
    key[7:] = float("nan")
    filters = make_filters(3, 64)
    cpp.score_and_store(key, filters, score_plane, slots[:7])
    expected = torch.full_like(score_plane, float("nan"))
    reference.score_and_store(key, filters, expected, slots[:7])
    torch.testing.assert_close(score_plane, expected, equal_nan=True)


@needs_library
def test_the_static_filter_is_scored_with_the_operator(monkeypatch):
    calls = []
    monkeypatch.setattr(cpp, "score_and_store", lambda *arguments: calls.append(arguments))
    _, cache = make_cache(Geometry())
    key, slots = torch.randn(3, 2, 8), torch.arange(3)
    filters = torch.stack([make_filters(2, 8).to(torch.float64)] * 3)
    method = StaticFilter(Model(cache, kernels.CPU_OPS, static_filters=lambda: filters))
    kernels.CPU_OPS.write(method.stat, key, key, None, cache.planes[1], slots, method.filters[1])
    ((_, filters, score_plane, _),) = calls
    assert filters.dtype == torch.float32 and kernels.CPU_OPS.functions is cpp
    assert score_plane.data_ptr() == cache.scores[1].data_ptr()


BAD_STEPS = {
    "filters of other heads": (dict(filters=torch.zeros(2, 64)), "filters must be"),
    "filters of other type": (dict(filters=torch.zeros(3, 64, dtype=torch.float64)), "filters must be"),
    "scores of other heads": (dict(score_plane=torch.zeros(4, 2, 16)), "scores must be float32 for 3 heads"),
    "more slots than keys": (dict(slot_mapping=torch.zeros(11, dtype=torch.int64)), "at most 10"),
    "slots of other type": (dict(slot_mapping=torch.zeros(10, dtype=torch.int32)), "slots must be"),
    "slot beyond the blocks": (dict(slot_mapping=torch.full((10,), 64)), "slot 64 lies beyond the 4 blocks of 16"),
    "scattered keys": (dict(key=torch.zeros(10, 3, 128)[..., ::2]), "side by side"),
    "keys of other type": (dict(key=torch.zeros(10, 3, 64, dtype=torch.int8)), "keys must be"),
}


@needs_library
@pytest.mark.parametrize("case", BAD_STEPS)
def test_score_and_store_refuses(case):
    changes, message = BAD_STEPS[case]
    step = dict(
        key=torch.zeros(10, 3, 64),
        filters=torch.zeros(3, 64),
        score_plane=torch.zeros(4, 3, 16),
        slot_mapping=torch.zeros(10, dtype=torch.int64),
    )
    with pytest.raises((RuntimeError, IndexError), match=message):
        cpp.score_and_store(**(step | changes))


@pytest.mark.sampled(4)
@needs_library
@pytest.mark.parametrize("shared_by_heads", [False, True], ids=["head", "layer"])
@pytest.mark.parametrize("num_heads", [1, 3, 8], ids="H{}".format)
@pytest.mark.parametrize("seed", range(40))
def test_select_kept_matches_reference(seed, num_heads, shared_by_heads):
    numbers = random.Random(seed)
    resident = numbers.choice((1, 63, 100, 1000, 2049))
    sinks = numbers.randint(0, resident // 4)
    window = numbers.randint(0, resident // 2)
    kept = numbers.randint(sinks + window, resident)
    scores = make_scores((3, num_heads, resident + 5), seed, is_tied=False)[..., :resident]
    before = scores.clone()
    found = cpp.select_kept(scores, kept, sinks, window, shared_by_heads)
    assert torch.equal(scores, before)
    assert torch.equal(found, reference.select_kept(scores, kept, sinks, window, shared_by_heads))


@needs_library
@pytest.mark.parametrize("shared_by_heads", [False, True], ids=["head", "layer"])
@pytest.mark.parametrize("seed", range(20))
def test_among_ties_as_many_of_each_score_are_kept_as_by_the_reference(seed, shared_by_heads):
    numbers = random.Random(seed)
    scores = make_scores((2, 3, 300), seed, is_tied=True)
    if shared_by_heads:
        scores = scores[:, :1].expand(-1, 3, -1)  # equal heads: their mean has the same ties
    kept = numbers.randint(50, 299)
    found = cpp.select_kept(scores, kept, 4, 32, shared_by_heads)
    expected = reference.select_kept(scores, kept, 4, 32, shared_by_heads)
    for layer in range(2):
        for head in range(3):
            found_scores, expected_scores = (scores[layer, head][mask[layer, head]] for mask in (found, expected))
            assert torch.equal(found_scores.sort().values, expected_scores.sort().values)


@needs_library
@pytest.mark.parametrize("sinks, window", [(4, 20), (0, 0), (50, 49), (99, 0)])
def test_mean_standardised_matches_reference(sinks, window):
    scores = make_scores((2, 3, 100), 0, is_tied=False)
    expected = reference.mean_standardised(scores, sinks, window)
    torch.testing.assert_close(cpp.mean_standardised(scores, sinks, window), expected, atol=1e-3, rtol=1e-4)
    with pytest.raises(RuntimeError, match="do not fit into 100 tokens"):
        cpp.mean_standardised(scores, 60, 41)


@needs_library
def test_special_scores_are_ordered_as_topk_does():
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([-inf, 1.0, nan, -1.0, inf, 0.5, -nan, -2.0, -0.25]).expand(1, 1, -1)
    for kept in range(10):
        found = cpp.select_kept(scores, kept, 0, 0, False)
        best = reference.select_kept(scores, kept, 0, 0, False)
        assert int(found.sum()) == kept
        if kept != 1:  # either NaN
            assert torch.equal(found, best)


@needs_library
@pytest.mark.parametrize("arguments", [(11, 0, 0), (5, -1, 0), (5, 0, -1), (8, 6, 6)])
def test_select_kept_refuses_counts_that_cannot_be(arguments):
    with pytest.raises(RuntimeError, match="cannot keep"):
        cpp.select_kept(torch.zeros(1, 1, 10), *arguments, False)


def compacted(compact, eviction: Eviction, seed: int, geometry: Geometry, num_pages: int, layout: str) -> torch.Tensor:
    """Every byte of a cache after an eviction from a sequence in it, some of whose pages are replaced by copies."""
    numbers = random.Random(seed)
    buffer, cache = make_cache(geometry, seed)
    cache.layout = LAYOUTS[layout](geometry.block_size, geometry.head_size)
    buffer.copy_(
        torch.randint(-128, 128, buffer.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    )
    pages = numbers.sample(range(geometry.num_blocks), geometry.num_blocks)
    old_pages, free = pages[:num_pages], pages[num_pages:]
    new_pages = [
        free.pop() if i in eviction.pages_written and numbers.random() < 0.5 else page
        for i, page in enumerate(old_pages)
        if i not in eviction.pages_taken_out
    ]
    scores = make_scores((geometry.num_layers, geometry.num_kv_heads, eviction.resident), seed, is_tied=seed % 2 == 0)
    is_kept = reference.select_kept(scores, eviction.kept, eviction.sinks, eviction.window, False)
    compact(cache, torch.tensor(old_pages), torch.tensor(new_pages), is_kept, eviction.window)
    return buffer


CACHE_DTYPES = {**DTYPES, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
WIDE_EVICTIONS = {
    "bs128": (Eviction(128, resident=1024, evicted=128, sinks=4, window=128), 0),
    "bs128-three-pages": (Eviction(128, resident=1000, evicted=384, sinks=4, window=300), 1),
    "bs128-sinks-above-a-page": (Eviction(128, resident=900, evicted=256, sinks=200, window=100), 2),
    "bs16-sinks-behind-the-pages-taken-out": (Eviction(16, resident=160, evicted=32, sinks=100, window=20), 3),
    "bs16-nothing-evicted": (Eviction(16, resident=100, evicted=0, sinks=4, window=20), 4),
}


@pytest.mark.sampled(13)
@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("case", SEQUENCES | WIDE_EVICTIONS)
def test_compact_moves_the_same_bytes_as_the_reference(case, dtype, layout):
    """Every byte: also those of other sequences, which may be any bit pattern, NaN included."""
    eviction, seed = (SEQUENCES | WIDE_EVICTIONS)[case]
    num_pages = -(-eviction.resident // eviction.block_size) + seed % 2
    geometry = Geometry(
        num_layers=2,
        num_blocks=2 * num_pages + 3,
        num_kv_heads=(1, 3, 8)[seed % 3],
        block_size=eviction.block_size,
        head_size=(16, 32, 40)[seed % 3],
        dtype=CACHE_DTYPES[dtype],
    )
    found, expected = (
        compacted(compact, eviction, seed, geometry, num_pages, layout) for compact in (cpp.compact, reference.compact)
    )
    assert torch.equal(found, expected)


def gap_arguments(cache) -> list:
    is_kept = torch.ones(cache.num_layers, cache.num_kv_heads, 48, dtype=torch.bool)
    is_kept[..., 3:19] = False
    return [
        cache.pages.clone(),
        cache.planes.clone(),
        cache.layout.keys,
        cache.layout.values,
        torch.tensor([4, 1, 2]),
        is_kept,
        16,
        32,
    ]


@needs_library
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        pytest.param(4, torch.tensor([4, 1, 6]), "beyond the 6 there are", id="page-beyond"),
        pytest.param(4, torch.tensor([4, -1, 2]), "beyond the 6 there are", id="page-before"),
        pytest.param(4, torch.tensor([4, 1]), "for 48 tokens", id="too-few-pages"),
        pytest.param(7, 64, "must be resident", id="takes-out-what-is-not-there"),
        pytest.param(5, torch.ones(3, 2, 48, dtype=torch.bool), "more tokens stay", id="too-many-kept"),
        pytest.param(5, torch.zeros(3, 2, 48, dtype=torch.bool), "fewer tokens stay", id="too-few-kept"),
        pytest.param(5, torch.ones(2, 2, 48, dtype=torch.bool), "for the layers and heads", id="flags-of-other-layers"),
        pytest.param(2, torch.zeros(8, 8, dtype=torch.int64), "for 16 slots", id="other-layout"),
        pytest.param(3, torch.zeros(16, 0, dtype=torch.int64), "must cover the pages", id="values-left-out"),
        pytest.param(0, torch.zeros(3, 6, 2, 256, dtype=torch.float64), "1, 2 or 4 bytes", id="eight-bytes"),
    ],
)
def test_close_gaps_refuses(position, value, message):
    arguments = gap_arguments(make_cache(Geometry())[1])
    arguments[position] = value
    with pytest.raises((RuntimeError, IndexError), match=message):
        cpp.OPERATORS.close_gaps(*arguments)


def page_arguments() -> list:
    _, cache = make_cache(Geometry(num_kv_heads=3))
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.randn(3, 3, generator=generator), torch.rand(3, 3, generator=generator) + 0.1
    return [cache.scores, torch.tensor([4, 0, 4]), mean, deviation]


@needs_library
@pytest.mark.parametrize("num_pages", [0, 1, 5])
@pytest.mark.parametrize(("num_heads", "block_size"), [(1, 16), (3, 24), (8, 128)])
def test_page_scores_match_reference(num_heads, block_size, num_pages):
    _, cache = make_cache(Geometry(num_kv_heads=num_heads, block_size=block_size))
    scores = cache.scores.mul_(3).add_(100)  # far from zero, as the means
    generator = torch.Generator().manual_seed(0)
    mean = 100 + torch.randn(3, num_heads, generator=generator)
    deviation = 0.1 + torch.rand(3, num_heads, generator=generator)
    deviation[1, 0] = torch.inf  # has no say
    pages = torch.randint(6, (num_pages,), generator=generator)
    found = cpp.page_scores(scores, pages, mean, deviation)
    torch.testing.assert_close(found, reference.page_scores(scores, pages, mean, deviation), atol=1e-4, rtol=1e-5)


@needs_library
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        pytest.param(0, torch.zeros(3, 6, 3, 16, dtype=torch.float64), "scores must be float32", id="double"),
        pytest.param(1, torch.tensor([6]), "beyond the 6 there are", id="page-beyond"),
        pytest.param(1, torch.tensor([4], dtype=torch.int32), "pages must be contiguous int64", id="int32"),
        pytest.param(2, torch.zeros(3, 2), "for 3 layers of 3 heads", id="means-of-other-heads"),
        pytest.param(3, torch.zeros(2, 3), "for 3 layers of 3 heads", id="deviations-of-other-layers"),
    ],
)
def test_page_scores_refuses(position, value, message):
    arguments = page_arguments()
    arguments[position] = value
    with pytest.raises((RuntimeError, IndexError), match=message):
        cpp.OPERATORS.page_scores(*arguments)


def make_statistics(num_layers: int, num_heads: int, rank: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and factors of logits a few units wide."""
    generator = torch.Generator().manual_seed(rank)
    scale = 2 * head_size**-0.5
    means = scale * torch.randn(num_layers, num_heads, head_size, generator=generator)
    return means, scale * torch.randn(num_layers, num_heads, rank, head_size, generator=generator)


@pytest.mark.sampled(8)
@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("group", "rank", "head_size"), [(1, 0, 16), (3, 1, 40), (4, 8, 32)])
def test_expected_attention_matches_reference(group, rank, head_size, num_tokens, dtype, layout):
    _, cache = make_cache(
        Geometry(num_layers=2, num_blocks=16, block_size=16, head_size=head_size, dtype=CACHE_DTYPES[dtype])
    )
    cache.layout = LAYOUTS[layout](16, head_size)
    pages = torch.randperm(16)[: -(-num_tokens // 16)]
    statistics = make_statistics(2, 2 * group, rank, head_size)
    found = cpp.expected_attention(cache, pages, num_tokens, *statistics)
    expected = reference.expected_attention(cache, pages, num_tokens, *statistics)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2), atol=1e-5, rtol=0)


@needs_library
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        *NO_PAGED_KEYS,
        pytest.param(3, 0, "no attention to 0 tokens", id="no-tokens"),
        pytest.param(4, torch.zeros(3, 5, 8), "factors of as many heads", id="other-heads"),
        pytest.param(5, torch.zeros(3, 4, 2, 8, dtype=torch.float64), "float32", id="double"),
    ],
)
def test_expected_attention_refuses(position, value, message):
    arguments = attention_arguments()
    arguments[position] = value
    with pytest.raises((RuntimeError, IndexError), match=message):
        cpp.OPERATORS.expected_attention(*arguments)


@needs_library
@pytest.mark.parametrize("layout", ["transposed-keys", "paired", "permuted"])
@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_every_byte_of_an_fp8_cache_is_read_as_what_it_is(dtype, layout):
    """One element per key, among those within a factor of 2 of it: logits that tell any two of them apart."""
    numbers = torch.arange(256, dtype=torch.uint8).view(CACHE_DTYPES[dtype]).float()
    numbers = numbers[numbers.isfinite()]
    exponents = torch.frexp(numbers).exponent
    for exponent in exponents.unique().tolist():
        own = numbers[exponents == exponent].to(CACHE_DTYPES[dtype])
        _, cache = make_cache(
            Geometry(num_layers=1, num_blocks=2, num_kv_heads=1, block_size=256, dtype=CACHE_DTYPES[dtype])
        )
        cache.layout = LAYOUTS[layout](256, 8)
        cache.pages.zero_()
        cache.pages[0, 1, 0, cache.layout.keys[: len(own), 3]] = own
        means = torch.zeros(1, 1, 8)
        means[0, 0, 3] = 2.0**-exponent
        arguments = (cache, torch.tensor([1]), len(own), means, torch.zeros(1, 1, 0, 8))
        torch.testing.assert_close(cpp.expected_attention(*arguments), reference.expected_attention(*arguments))


@needs_library
def test_keys_of_an_fp8_cache_are_what_is_stored_times_the_scale_of_their_layer():
    _, cache = make_cache(Geometry(num_layers=2, num_blocks=16, head_size=16, dtype=torch.float8_e4m3fn))
    pages, queries = torch.arange(5), torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    statistics = make_statistics(2, 4, 3, 16)
    scales = torch.tensor([0.25, 3.0])
    expected = cpp.expected_attention(
        cache, pages, 75, *(vectors * scales[:, *[None] * (vectors.dim() - 1)] for vectors in statistics)
    )
    observed = cpp.observed_attention(cache, pages, 75, queries * scales[:, None, None, None], 3, 7, (6, 12))
    cache.key_scales = scales
    for functions in (cpp, reference):
        torch.testing.assert_close(
            functions.expected_attention(cache, pages, 75, *statistics), expected, atol=1e-6, rtol=1e-4
        )
        for found, wanted in zip(
            functions.observed_attention(cache, pages, 75, queries, 3, 7, (6, 12)), observed, strict=True
        ):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.sampled(5)
@needs_library
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("num_newer", [0, 1, 40])
@pytest.mark.parametrize(("num_seen", "num_queries"), [(1, 1), (32, 32), (63, 5), (64, 32), (200, 32)])
@pytest.mark.parametrize(("group", "head_size"), [(1, 16), (3, 40), (4, 32)])
def test_observed_attention_matches_reference(group, head_size, num_seen, num_queries, num_newer, dtype):
    num_tokens = num_seen + num_newer
    _, cache = make_cache(
        Geometry(num_layers=2, num_blocks=16, block_size=16, head_size=head_size, dtype=CACHE_DTYPES[dtype])
    )
    pages = torch.randperm(16)[: -(-num_tokens // 16)]
    queries = torch.randn(2, 2 * group, num_queries, head_size, generator=torch.Generator().manual_seed(num_seen))
    arguments = (cache, pages, num_tokens, queries, num_newer, 7, (6, 12))
    for found, expected in zip(
        cpp.observed_attention(*arguments), reference.observed_attention(*arguments), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@needs_library
def test_observed_attention_takes_little_memory_however_long_the_sequence():
    """96 queries of a KV head, whose logits would take 48 MiB."""
    num_tokens, num_pages = 131_072, 1024
    geometry = Geometry(num_layers=1, num_blocks=num_pages, block_size=128, head_size=16, dtype=torch.float32)
    _, cache = make_cache(geometry)
    queries = torch.randn(1, geometry.num_kv_heads * 3, 32, 16, generator=torch.Generator().manual_seed(1))
    arguments = (cache, torch.arange(num_pages), num_tokens, queries, 0, 7, (6, 12))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the most that was resident so far
    before = most_resident_bytes()
    found = cpp.observed_attention(*arguments)
    # Of each thread its logits; beside them the result, and as much again twice while it is pooled.
    taken = 2 * geometry.num_kv_heads * num_tokens * 4 * 3 + 9 * torch.get_num_threads() * 2**20
    assert most_resident_bytes() - before < taken
    for part, expected in zip(found, reference.observed_attention(*arguments), strict=True):
        torch.testing.assert_close(part, expected, atol=1e-6, rtol=1e-3)


def most_resident_bytes() -> int:
    (line,) = (line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) << 10


@needs_library
@pytest.mark.parametrize("lowest", [0.0, -1e-3, -10.0, -86.0, -1e4])
def test_attention_holds_over_the_range_of_logits(lowest):
    """One query, whose products with the keys run from 0 down to ``lowest``."""
    _, cache = make_cache(Geometry(num_layers=1, num_blocks=8, block_size=16, head_size=8, dtype=torch.float32))
    pages, num_tokens = torch.arange(8), 123
    logits = torch.linspace(0, lowest, num_tokens)
    keys = torch.zeros(8 * 16, 8)
    keys[:num_tokens, 3] = logits
    for page in range(8):
        cache.pages[0, page][:, cache.layout.keys] = keys[16 * page : 16 * page + 16]
    query = torch.zeros(1, 2, 1, 8)
    query[..., 3] = 1
    mean, peak = cpp.observed_attention(cache, pages, num_tokens, query, 0, 1, (0, 0))
    expected = logits.double().softmax(0).expand(1, 2, -1)
    for found in (mean, peak):
        torch.testing.assert_close(found.double(), expected, atol=1e-36, rtol=2e-6)


@needs_library
@pytest.mark.parametrize(
    ("queries", "message"),
    [
        pytest.param(torch.zeros(3, 5, 2, 8), "in groups of the 2 KV heads", id="odd-heads"),
        pytest.param(torch.zeros(3, 4, 21, 8), "not more than the 20 tokens", id="more-queries-than-tokens"),
        pytest.param(torch.zeros(3, 4, 2, 8, dtype=torch.bfloat16), "float32", id="bfloat16"),
        pytest.param(torch.zeros(3, 4, 2, 16), "heads of size 8", id="other-size"),
    ],
)
def test_observed_attention_refuses(queries, message):
    with pytest.raises(RuntimeError, match=message):
        cpp.OPERATORS.observed_attention(*attention_arguments()[:4], queries, *PLAIN)


@pytest.mark.sampled(4)
@needs_library
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_tokens", "pool"), [(1, 1), (1, 7), (63, 7), (64, 1), (65, 3), (200, 7)])
@pytest.mark.parametrize("of_values", [False, True], ids=["keys", "values"])
@pytest.mark.parametrize("head_size", [16, 40])
def test_distinctness_matches_reference(head_size, of_values, num_tokens, pool, layout, dtype):
    _, cache = make_cache(
        Geometry(num_layers=2, num_blocks=16, block_size=16, head_size=head_size, dtype=CACHE_DTYPES[dtype])
    )
    cache.layout = LAYOUTS[layout](16, head_size)
    cache.value_places = cache.layout.values
    cache.key_scales = torch.tensor([0.25, 3.0])  # angles do not depend on it
    pages = torch.randperm(16)[: -(-num_tokens // 16)]
    cache.pages[1, pages[0], 1] = 0  # keys and values of no direction
    found = cpp.distinctness(cache, pages, num_tokens, of_values, pool)
    assert found.shape == (2, 2, num_tokens) and found.isfinite().all()
    expected = reference.distinctness(cache, pages, num_tokens, of_values, pool)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.sampled(5)
@needs_library
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 200])
@pytest.mark.parametrize("head_size", [16, 40])
def test_value_norms_match_reference(head_size, num_tokens, layout, dtype):
    _, cache = make_cache(
        Geometry(num_layers=2, num_blocks=16, block_size=16, head_size=head_size, dtype=CACHE_DTYPES[dtype])
    )
    cache.layout = LAYOUTS[layout](16, head_size)
    cache.value_places = cache.layout.values
    cache.key_scales = torch.tensor([0.25, 3.0])  # values have another
    pages = torch.randperm(16)[: -(-num_tokens // 16)]
    cache.pages[1, pages[0], 1] = 0
    found, expected = (module.value_norms(cache, pages, num_tokens) for module in (cpp, reference))
    assert found.shape == (2, 2, num_tokens) and not found[1, 1, :16].any() and bool((found[0] > 0).all())
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-5)


@needs_library
@pytest.mark.parametrize(("position", "value", "message"), NO_PAGED_KEYS)
def test_value_norms_refuse(position, value, message):
    arguments = attention_arguments()[:4]
    arguments[position] = value
    with pytest.raises((RuntimeError, IndexError), match=message):
        cpp.OPERATORS.value_norms(*arguments)


@needs_library
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [*NO_PAGED_KEYS, pytest.param(4, 6, "an odd number of neighbours", id="even-pool")],
)
def test_distinctness_refuses(position, value, message):
    arguments = [*attention_arguments()[:4], 7]
    arguments[position] = value
    with pytest.raises((RuntimeError, IndexError), match=message):
        cpp.OPERATORS.distinctness(*arguments)


PLAIN = (None, None, 0.0)  # a softmax: group sizes, sinks and soft cap


def attention_arguments() -> list:
    _, cache = make_cache(Geometry())
    return [cache.pages, cache.layout.keys, torch.tensor([4, 1]), 20, *make_statistics(3, 4, 2, 8), *PLAIN]


@needs_library
@pytest.mark.parametrize("operator", OPERATORS)
def test_schemas_say_what_operators_do(operator):
    key, score_plane, slots = make_step(10, 3, 64, 16, torch.bfloat16, is_strided=True)
    arguments = {
        "page_scores": page_arguments(),
        "score_and_store": [key.clone(), make_filters(3, 64), torch.zeros(score_plane.shape), slots],
        "mean_standardised": [make_scores((2, 3, 100), 0, is_tied=False), 4, 20],
        "select_kept": [make_scores((2, 3, 100), 0, is_tied=False), 60, 4, 20],
        "expected_attention": attention_arguments(),
        "observed_attention": [*attention_arguments()[:4], torch.zeros(3, 4, 2, 8), *PLAIN],
        "distinctness": [*attention_arguments()[:4], 7],
        "value_norms": attention_arguments()[:4],
        "close_gaps": gap_arguments(make_cache(Geometry())[1]),
    }
    torch.library.opcheck(getattr(cpp.OPERATORS, operator).default, tuple(arguments[operator]))


def test_the_package_works_without_the_library(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "vllm_qfilters", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    kernels_folder = pathlib.Path(kernels.__file__).parent
    shutil.copytree(kernels_folder, tmp_path / "vllm_qfilters" / "kernels", dirs_exist_ok=True)
    tests = pathlib.Path(__file__).parent
    shutil.copytree(tests, tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    check = (
        "from vllm_qfilters import kernels; "
        f"assert kernels.__file__.startswith({str(tmp_path)!r}), kernels.__file__; "
        "assert kernels.IMPLEMENTATION == 'PyTorch'; "
        "import pytest, sys; "
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '--noconftest', 'tests/test_compact.py']))"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@needs_library
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    cpp._check_arguments()
    monkeypatch.setitem(cpp.NUM_ARGUMENTS, "distinctness", 4)
    with pytest.raises(RuntimeError, match="distinctness takes 5 arguments, not 4"):
        cpp._check_arguments()
    monkeypatch.setattr(cpp, "_register_fakes", lambda: None)  # which are there
    with pytest.warns(UserWarning, match="distinctness takes 5 arguments, not 4"):
        assert not cpp.load()
