"""The Triton kernels against ``kernels.reference``: on a GPU if there is one, else under Triton's interpreter.

Needs neither vLLM nor a model: ``scripts/gpu_check.sh`` runs this file, and all cases of it, where only PyTorch and
Triton are installed.
"""

import contextlib
import dataclasses
import os
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

from tests.paged import (
    CPU,
    DEVICE,
    LAYOUTS,
    Eviction,
    ForbiddenReads,
    Geometry,
    PeakMemory,
    Sequences,
    layer_views,
    make_cache,
    random_evictions,
    random_tensor,
)
from tests.specialisations import recorded
from vllm_qfilters.filters.bank import FilterBank
from vllm_qfilters.filters.format import Filters
from vllm_qfilters.filters.rotary import Rotation
from vllm_qfilters.kernels import REFERENCE_OPS, reference
from vllm_qfilters.kernels.batch import NOT_OBSERVED, CompactionBatch
from vllm_qfilters.kernels.layout import StridedCache, read_plane, write_plane
from vllm_qfilters.kernels.ops import Observation, Softmax, TokenStat
from vllm_qfilters.kernels.triton import TritonOps
from vllm_qfilters.kernels.triton.compaction import compact, copy_pages
from vllm_qfilters.kernels.triton.distinctness import distinctness
from vllm_qfilters.kernels.triton.observation import observe
from vllm_qfilters.kernels.triton.score_pages import page_scores
from vllm_qfilters.kernels.triton.score_resident import score_resident
from vllm_qfilters.kernels.triton.selection import gather_scores, mean_standardised, select_kept
from vllm_qfilters.kernels.triton.write_and_score import write_and_score
from vllm_qfilters.methods.base import Method, Model, RecentQueries
from vllm_qfilters.methods.keydiff import KeyDiff
from vllm_qfilters.methods.qfilters.expected import ExpectedAttention
from vllm_qfilters.methods.qfilters.rotary import RotaryFilter
from vllm_qfilters.plan import RequestCompaction
from vllm_qfilters.worker.compactor import Compactor, workspace_bytes

HAS_FP8 = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
TRITON_OPS = TritonOps()
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.fixture(autouse=True)
def poison_new_tensors():
    """Fills torch.empty with NaN and largest integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def forbidden_waiting():
    """Waiting for a GPU is an error; without one, what would wait for it."""
    if DEVICE.type == "cpu":
        with ForbiddenReads():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Writing


def make_step(num_tokens: int, geometry: Geometry, dtype: torch.dtype, is_strided: bool):
    """(key, value, slots) of a step: parts of one qkv tensor, three tokens more than there are slots, which are NaN."""
    heads, size = geometry.num_kv_heads, geometry.head_size
    columns = heads * size
    qkv = random_tensor(num_tokens + 3, 5 * columns, seed=num_tokens, dtype=dtype)
    qkv[num_tokens:] = float("nan")
    key, value = (qkv[:, first * columns : (first + 1) * columns].view(-1, heads, size) for first in (3, 4))
    value = value[..., : geometry.content - size]
    slots = torch.randperm(geometry.num_blocks * geometry.block_size, generator=torch.Generator().manual_seed(1))[
        :num_tokens
    ]
    slots[::5] = -1
    if not is_strided:
        key, value = key.contiguous(), value.contiguous()
    return key, value, slots.to(DEVICE)


WRITES = [
    # tokens, KV heads, head size and that of values, block size, layout, dtype of keys
    (1, 1, (64, 64), 16, "LBNHC", "bf16"),
    (63, 3, (80, 80), 16, "LBHNC", "fp16"),
    (60, 8, (128, 128), 32, "BLNHC", "bf16"),
    (61, 4, (192, 128), 32, "LBHNC", "bf16"),
    (35, 2, (96, 60), 16, "BLNHC", "fp32"),
    (97, 2, (256, 256), 16, "BLHNC", "bf16"),
    (130, 5, (100, 100), 64, "LBNHC", "fp32"),
    (257, 2, (96, 96), 128, "LBHNC", "bf16"),
    (600, 2, (64, 64), 256, "LBNHC", "fp16"),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("is_strided", "fp8"),
    [(False, None), (True, None), (True, "e4m3"), (True, "e5m2")],
    ids=["contiguous", "qkv", "e4m3", "e5m2"],
)
@pytest.mark.parametrize(("tokens", "heads", "sizes", "block", "layout", "dtype"), WRITES, ids=lambda value: str(value))
def test_write_and_score_matches_reference(tokens, heads, sizes, block, layout, dtype, is_strided, fp8):
    if fp8 and not HAS_FP8:
        pytest.skip("this GPU has no fp8")
    cache_dtype = FP8[fp8] if fp8 else DTYPES[dtype]
    num_blocks, (size, value_size) = tokens // block + 3, sizes
    geometry = Geometry(1, num_blocks, heads, block, size, cache_dtype, layout, value_size=value_size)
    key, value, slots = make_step(tokens, geometry, DTYPES[dtype], is_strided)
    if fp8:
        if DEVICE.type == "cpu":  # Triton 3.9's interpreter loses the carry of rounding: numbers that fp8 holds exactly
            key, value = (key * 2).round().clamp(-8, 8) / 2, (value * 2).round().clamp(-8, 8) * 2
        key[1 % tokens] *= 1024  # beyond what e4m3 can hold
    filters = random_tensor(heads, size, seed=2)
    scales = torch.tensor([0.5, 2.0], device=DEVICE)
    buffers = []
    for write in ("triton", "reference"):
        buffer, (view,), cache = make_cache(geometry)
        if write == "triton":
            scale = {"key_scale": scales[:1], "value_scale": scales[1:]} if fp8 else {}
            write_and_score(key, value, view, cache.planes[0], slots, TokenStat.PROJECTION, filters, **scale)
        else:
            step = key, value, view, cache.planes[0], slots
            REFERENCE_OPS.write(TokenStat.PROJECTION, *step, filters, key_scale=scales[:1], value_scale=scales[1:])
        buffers.append(cache.scores.clone())
        cache.scores.zero_()
        buffers.append(buffer)
    torch.testing.assert_close(buffers[0], buffers[2], atol=1e-3, rtol=1e-5)
    assert torch.equal(buffers[1], buffers[3])


@pytest.mark.parametrize(
    "score", [score for score in TokenStat if score != TokenStat.PROJECTION], ids=lambda score: score.name
)
def test_other_scores(score):
    geometry = Geometry(1, 8, 3, 16, 80)
    key, value, slots = make_step(60, geometry, torch.float32, is_strided=True)
    _, (view,), cache = make_cache(geometry)
    before = cache.scores.clone()
    write_and_score(key, value, view, cache.planes[0], slots, score, seed=7)
    after = cache.scores.clone()
    is_written = torch.zeros(8 * 16, dtype=torch.bool, device=DEVICE)
    is_written[slots[slots >= 0]] = True
    is_written = is_written.view(1, 8, 1, 16).expand_as(after)
    if score == TokenStat.NONE:
        assert torch.equal(after, before)
        return
    assert torch.equal(after[~is_written], before[~is_written])
    if score == TokenStat.NEGATIVE_KEY_NORM:
        expected = cache.scores.clone()
        reference.write_scores(-key.norm(dim=-1), expected[0], slots)
        torch.testing.assert_close(after, expected)
    else:
        drawn = after[is_written]
        assert bool((drawn >= 0).all()) and bool((drawn < 1).all())
        assert drawn.unique().numel() > 0.95 * drawn.numel() and 0.3 < float(drawn.mean()) < 0.7
        write_and_score(key, value, view, cache.planes[0], slots, score, seed=7)
        assert torch.equal(cache.scores, after)
        write_and_score(key, value, view, cache.planes[0], slots, score, seed=8)
        assert not torch.equal(cache.scores, after)


def test_a_step_of_padding_writes_nothing():
    geometry = Geometry(1)
    key, value, _ = make_step(6, geometry, torch.float32, is_strided=False)
    buffer, (view,), cache = make_cache(geometry)
    before = buffer.clone()
    for slots in (torch.full((6,), -1, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)):
        write_and_score(key, value, view, cache.planes[0], slots, TokenStat.NEGATIVE_KEY_NORM)
    assert torch.equal(buffer, before)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_a_cuda_graph_replays_the_write_with_the_tokens_of_the_step():
    geometry = Geometry(1, 8, 2, 16, 64, torch.bfloat16)
    key, value, slots = make_step(32, geometry, torch.bfloat16, is_strided=True)
    filters = random_tensor(2, 64, seed=2)
    buffer, (view,), cache = make_cache(geometry)
    write_and_score(key, value, view, cache.planes[0], slots, TokenStat.PROJECTION, filters)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write_and_score(key, value, view, cache.planes[0], slots, TokenStat.PROJECTION, filters)
    key.copy_(random_tensor(*key.shape, seed=5, dtype=torch.bfloat16))
    slots.copy_(slots.flip(0))
    graph.replay()
    expected, (view,), other = make_cache(geometry)
    first_key, first_value, first_slots = make_step(32, geometry, torch.bfloat16, is_strided=True)
    first = first_key, first_value, view, other.planes[0], first_slots
    REFERENCE_OPS.write(TokenStat.PROJECTION, *first, filters)
    REFERENCE_OPS.write(TokenStat.PROJECTION, key, value, view, other.planes[0], slots, filters)
    torch.testing.assert_close(cache.scores, other.scores, atol=1e-3, rtol=1e-5)
    cache.scores.zero_(), other.scores.zero_()
    assert torch.equal(buffer, expected)


# Sequences


EVICTIONS = {
    # For pages of 16 tokens; several sequences at once.
    "one": [Eviction(96, 32, 4, 16)],
    "interval": [Eviction(97, 16, 4, 33), Eviction(64, 16, 0, 0), Eviction(130, 48, 7, 20)],
    "streaming": [Eviction(100, 32, 4, 64), Eviction(81, 32, 17, 32), Eviction(80, 16, 20, 44)],
    "sinks-displace": [Eviction(100, 32, 4, 60), Eviction(90, 48, 6, 31), Eviction(60, 16, 37, 4)],
    "large": [Eviction(700, 608, 4, 40), Eviction(33, 16, 1, 3)],
}


CASES = {name: (evictions, seed) for seed, (name, evictions) in enumerate(EVICTIONS.items())}
CASES |= {f"random-{seed}": (random_evictions(seed), seed) for seed in range(6)}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def sequences(case):
    return Sequences(case[0], Geometry(head_size=8, num_kv_heads=3), seed=case[1])


def test_gather_scores_matches_reference(sequences):
    cache, batch = sequences.cache, sequences.batch
    flat = gather_scores(cache.scores, batch)
    for index, found in enumerate(batch.split(flat, cache.num_layers, cache.num_kv_heads)):
        assert torch.equal(found, sequences.scores_of(index))


def test_mean_standardised_matches_reference(sequences):
    cache, batch = sequences.cache, sequences.batch
    flat = gather_scores(cache.scores, batch) * 3 + 1e3
    shared = mean_standardised(flat, batch, cache.num_layers, cache.num_kv_heads)
    for index, found in enumerate(batch.split(shared, cache.num_layers, 1)):
        eviction = sequences.evictions[index]
        if eviction.resident - eviction.sinks - eviction.window > 1:
            expected = reference.mean_standardised(
                sequences.scores_of(index) * 3 + 1e3, eviction.sinks, eviction.window
            )
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scores", ["distinct", "tied", "equal", "signed zeros", "infinite"])
def test_the_best_scores_are_kept(sequences, scores):
    cache, batch = sequences.cache, sequences.batch
    flat = gather_scores(cache.scores, batch)
    if scores == "tied":
        flat = flat.round()
    elif scores == "equal":
        flat = torch.full_like(flat, -0.1)
    elif scores == "signed zeros":
        flat = flat.sign() * 0.0 + flat.clamp(min=1)
    elif scores == "infinite":
        flat = torch.where(flat > 1, float("inf"), torch.where(flat < -1, -float("inf"), flat))
    is_kept = select_kept(flat, batch, cache.num_layers, cache.num_kv_heads)
    rows = zip(
        sequences.evictions,
        batch.split(flat, cache.num_layers, cache.num_kv_heads),
        batch.split(is_kept, cache.num_layers, cache.num_kv_heads),
        strict=True,
    )
    for eviction, row, found in rows:
        found = found.bool()
        expected = reference.select_kept(row, eviction.kept, eviction.sinks, eviction.window, shared_by_heads=False)
        assert bool((found.sum(-1) == eviction.kept).all())
        assert bool(found[..., : eviction.sinks].all()) and bool(
            found[..., eviction.resident - eviction.window :].all()
        )
        # Which of several equal ones stay is free: their scores are not.
        best = torch.where(found, row, -float("inf")).sort(-1).values
        assert torch.equal(best, torch.where(expected, row, -float("inf")).sort(-1).values)


@pytest.mark.parametrize("is_shared", [False, True], ids=["head", "layer"])
def test_compact_matches_reference(case, is_shared):
    dtype = [torch.bfloat16, torch.float32, torch.uint8, torch.float16][case[1] % 4]
    kind = case[1] % 4
    sizes = dict(head_size=[8, 10, 16, 20][kind], value_size=[None, 6, None, 12][kind])
    geometry = Geometry(num_kv_heads=3, dtype=dtype, layout=LAYOUTS[kind], **sizes)
    fast, slow = (Sequences(case[0], geometry, seed=case[1]) for _ in range(2))
    cache, batch = fast.cache, fast.batch
    selections = 1 if is_shared else cache.num_kv_heads
    scores = gather_scores(cache.scores, batch)
    if is_shared:
        scores = mean_standardised(scores, batch, cache.num_layers, cache.num_kv_heads)
    is_kept = select_kept(scores, batch, cache.num_layers, selections)
    copy_pages(cache, batch)
    compact(cache, batch, is_kept, selections)
    for index, kept in enumerate(batch.split(is_kept, cache.num_layers, selections)):
        eviction = slow.evictions[index]
        kept = kept.bool().expand(-1, cache.num_kv_heads, -1)
        reference.compact(slow.cache, slow.old_pages[index], slow.new_pages[index], kept, eviction.window)
    assert torch.equal(fast.buffer, slow.buffer)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("bytes_at_once", [1, 1 << 26], ids=["one by one", "at once"])
@pytest.mark.parametrize("granularity", ["head", "layer", "layer, ranks"])
def test_the_compactor_goes_by_the_scores_stored_beside_the_keys(case, granularity, bytes_at_once):
    """Other ranks, where there are any, think the opposite, and are more."""
    fast, slow = (Sequences(case[0], Geometry(num_kv_heads=3), seed=case[1]) for _ in range(2))
    is_shared, mean_over_ranks = granularity != "head", torch.neg if "ranks" in granularity else torch.clone
    method, num_heads = Method(Model(fast.cache, TRITON_OPS)), fast.cache.num_kv_heads
    compactor = Compactor(method, num_heads, is_shared, mean_over_ranks, bytes_at_once=bytes_at_once)
    with forbidden_waiting():
        compactor.apply(fast.compactions, fast.table_rows, fast.batch.block_table, [None] * len(fast.compactions))
    for index, eviction in enumerate(slow.evictions):
        scores = slow.scores_of(index) if mean_over_ranks is torch.clone else -slow.scores_of(index)
        kept = reference.select_kept(scores, eviction.kept, eviction.sinks, eviction.window, is_shared)
        reference.compact(slow.cache, slow.old_pages[index], slow.new_pages[index], kept, eviction.window)
    assert torch.equal(fast.buffer, slow.buffer)


PAGES = [
    # block size, head size, dtype, layout
    (32, 100, torch.bfloat16, "LBNHC"),
    (64, 256, torch.float16, "BLHNC"),
    (128, 80, torch.float32, "BLNHC"),
    (256, 64, torch.float8_e5m2, "LBHNC"),
]


@pytest.mark.parametrize(("block", "size", "dtype", "layout"), PAGES, ids=str)
def test_pages_and_heads_of_any_size(block, size, dtype, layout):
    if dtype == torch.float8_e5m2 and not HAS_FP8:
        pytest.skip("this GPU has no fp8")
    evictions = [Eviction(4 * block + 3, 2 * block, 4, block // 2 + 5), Eviction(2 * block, block, 9, 4)]
    geometry = Geometry(2, 8, 2, block, size, dtype, layout)
    fast, slow = (Sequences(evictions, geometry, seed=block) for _ in range(2))
    cache, batch = fast.cache, fast.batch
    copy_pages(cache, batch)
    scores = gather_scores(cache.scores, batch)
    filters = random_tensor(1, 2, 4, size, seed=1)
    projections = batch.split(score_resident(cache, batch, filters), 2, 4)
    is_kept = select_kept(scores, batch, 2, 2)
    compact(cache, batch, is_kept, 2)
    for index, kept in enumerate(batch.split(is_kept, 2, 2)):
        eviction, pages = evictions[index], slow.old_pages[index]
        keys = (
            slow.cache.key_values[:, pages][..., :size].float().transpose(1, 2).flatten(2, 3)[:, :, : eviction.resident]
        )
        torch.testing.assert_close(projections[index], reference.score_resident(keys, filters[0]), atol=1e-2, rtol=1e-3)
        expected = reference.select_kept(slow.scores_of(index), eviction.kept, eviction.sinks, eviction.window, False)
        assert torch.equal(kept.bool(), expected)
        reference.compact(slow.cache, pages, slow.new_pages[index], expected, eviction.window)
    assert torch.equal(fast.buffer, slow.buffer)


def test_selection_from_128k_tokens_is_exact_among_ties():
    rows = [Eviction(131072, 128000, 4, 1024), Eviction(300, 16, 0, 0), Eviction(131071, 64, 40, 3)]
    compactions = [RequestCompaction("", 0, row.resident, row.evicted, row.sinks, row.window, ()) for row in rows]
    batch = CompactionBatch.make(compactions, [0] * 3, torch.zeros(1, 1, dtype=torch.int32, device=DEVICE))
    scores = random_tensor(batch.num_tokens, seed=1).mul(8).round()  # some fifty different ones
    found = batch.split(select_kept(scores, batch, 1, 1), 1, 1)
    for row, is_kept, of_row in zip(rows, found, batch.split(scores, 1, 1), strict=True):
        between = of_row[0, 0, row.sinks : row.resident - row.window]
        best = between.sort(descending=True, stable=True).indices[: row.kept - row.sinks - row.window]
        expected = torch.ones(row.resident, dtype=torch.bool, device=DEVICE)
        expected[row.sinks : row.resident - row.window] = False
        expected[row.sinks + best] = True
        assert torch.equal(is_kept[0, 0].bool(), expected)


def room(num_bytes: int, path) -> torch.Tensor:
    """Memory; without a GPU a file with holes, which takes up only what is written."""
    if DEVICE.type == "cuda":
        if torch.cuda.mem_get_info()[0] < num_bytes:
            pytest.skip(f"this GPU has no {num_bytes >> 30} GiB free")
        return torch.zeros(num_bytes, dtype=torch.uint8, device=DEVICE)
    return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8)


@pytest.mark.parametrize("layout", ["LBNHC", "BLHNC"])
def test_caches_may_be_larger_than_32_bits_can_address(layout, tmp_path):
    """With offsets of layers and pages beyond 2^31, of keys, planes and words alike, everything is as in a small
    cache.
    """
    num_pages = 1 << 20
    evictions = [Eviction(130, 32, 4, 9), Eviction(48, 16, 0, 5)]
    geometry = Geometry(2, 8, 4, 16, 64, torch.bfloat16, layout)
    near = Sequences(evictions, geometry, seed=3)
    assert any(compaction.copied_pages for compaction in near.compactions)
    small = near.cache.num_blocks
    geometry = dataclasses.replace(geometry, num_blocks=num_pages + small)
    far_views = layer_views(room(geometry.cache_bytes, tmp_path / "cache"), geometry)
    far = StridedCache(far_views, geometry.num_planes)
    assert (geometry.cache_bytes if layout[0] == "B" else geometry.cache_bytes // 2) > 4 << 31
    far.words[:, num_pages:] = near.cache.words
    compactions = [
        dataclasses.replace(
            compaction,
            block_ids=tuple(page + num_pages for page in compaction.block_ids),
            copied_pages=tuple((place, page + num_pages) for place, page in compaction.copied_pages),
        )
        for compaction in near.compactions
    ]
    block_table = near.batch.block_table
    far_table = torch.where(block_table < 0, 0, block_table + num_pages)
    far_batch = CompactionBatch.make(compactions, near.table_rows, far_table)
    key, value, slots = make_step(9, Geometry(1, small, 4, 16, 64), torch.bfloat16, is_strided=True)
    filters, queries = random_tensor(1, 2, 8, 64, seed=1), random_tensor(2, 8, 5, 64, seed=2, dtype=torch.bfloat16)
    mean, deviation = random_tensor(2, 4, seed=4), random_tensor(2, 4, seed=5).abs()
    results = []
    for cache, views, batch, first in ((near.cache, near.views, near.batch, 0), (far, far_views, far_batch, num_pages)):
        for layer in range(2):
            far_slots = torch.where(slots < 0, -1, slots + 16 * first)
            write_and_score(
                key, value, views[layer], cache.planes[layer], far_slots, TokenStat.PROJECTION, filters[0, 0, :4]
            )
        copy_pages(cache, batch)
        scores, plane = gather_scores(cache.scores, batch), cache.planes[:, :, 1]
        observation = Observation(0, queries, 0, is_question=True)
        observed = observe(cache, batch, [observation], plane, Softmax(0.1), 7, (6, 12), shared_by_heads=True)
        projections = score_resident(cache, batch, filters)
        of_pages = page_scores(cache.scores, first + torch.arange(3, device=DEVICE), mean, deviation)
        is_kept = select_kept(scores, batch, 2, 4)
        compact(cache, batch, is_kept, 4)
        results.append((scores, observed, projections, of_pages, is_kept, cache.words[:, first : first + small]))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_sequences_that_take_out_the_same_page_move_what_their_own_queries_observed():
    geometry = Geometry(num_kv_heads=2, head_size=12)
    evictions = [Eviction(96, 32, 4, 32), Eviction(90, 32, 4, 26)]
    fast, slow = Sequences(evictions, geometry, seed=3), Sequences(evictions, geometry, seed=3, device=CPU)
    slow.cache.key_values.copy_(random_tensor(*slow.cache.key_values.shape, seed=3))
    fast.cache.key_values.copy_(slow.cache.key_values)
    for sequences in (fast, slow):
        out = sequences.old_pages[0][2:4]
        assert not {*out.tolist()} & {*sequences.new_pages[0].tolist(), *sequences.new_pages[1].tolist()}
        sequences.old_pages[1][2:4] = out
        sequences.batch.block_table[2, 2:4] = out.int()
    compactions = [dataclasses.replace(compaction, shared_pages_out=out.tolist()) for compaction in fast.compactions]
    recent = [
        RecentQueries(random_tensor(2, 6, 5, 12, seed=index).cpu(), compaction.position, compaction.position)
        for index, compaction in enumerate(compactions)
    ]
    method = ExpectedAttention(model_of(fast.cache, TRITON_OPS, 3, 0))
    slow_method = ExpectedAttention(model_of(slow.cache, REFERENCE_OPS, 3, 0))
    on_device = [dataclasses.replace(queries, queries=queries.queries.to(DEVICE)) for queries in recent]
    Compactor(method, 6, shared_by_heads=False).apply(compactions, fast.table_rows, fast.batch.block_table, on_device)
    for index, eviction in enumerate(evictions):
        pages, new_pages = slow.old_pages[index], slow.new_pages[index]
        alone = CompactionBatch.make([compactions[index]], [slow.table_rows[index]], slow.batch.block_table)
        (scores,) = alone.split(slow_method.scores(alone, [recent[index]]), 2, 2)
        kept = reference.select_kept(scores, eviction.kept, eviction.sinks, eviction.window, shared_by_heads=False)
        reference.compact(slow.cache, pages, new_pages, kept, eviction.window)
        for plane in range(2):
            found = read_plane(fast.cache.planes[:, :, plane], new_pages.to(DEVICE), eviction.kept).cpu()
            torch.testing.assert_close(
                found, read_plane(slow.cache.planes[:, :, plane], new_pages, eviction.kept), atol=1e-5, rtol=1e-4
            )
        assert torch.equal(fast.cache.key_values[:, new_pages.to(DEVICE)].cpu(), slow.cache.key_values[:, new_pages])


POSITIONS = 2048


def make_bank(cache: StridedCache, group: int, rank: int, num_rotations: int) -> FilterBank:
    """Of random statistics, with rotary embeddings on a part of each head."""
    head_size, num_heads = cache.head_size, cache.num_kv_heads * group
    rotary_dim = head_size // 4 * 2
    rotations = []
    for seed in range(num_rotations):
        angles = torch.arange(POSITIONS)[:, None] * torch.rand(
            rotary_dim // 2, generator=torch.Generator().manual_seed(seed)
        )
        table = 1.2 * torch.cat((angles.cos(), angles.sin()), dim=-1)
        rotary_emb = SimpleNamespace(
            rotary_dim=rotary_dim, is_neox_style=True, cos_sin_cache=table.to(cache.planes.device)
        )
        rotations.append(Rotation(rotary_emb, head_size))
    shape = (cache.num_layers, num_heads, head_size)
    mean, spread = random_tensor(*shape, seed=1).cpu(), random_tensor(*shape, head_size, seed=2).cpu()
    second = spread @ spread.mT + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    filters = Filters(torch.zeros(1), query_mean_before_rope=mean, query_second_before_rope=second)
    rotation_of_layer = [rotations[layer % num_rotations] for layer in range(cache.num_layers)]
    heads = [slice(0, num_heads)] * cache.num_layers
    return FilterBank(filters, rotation_of_layer, heads, cache.num_kv_heads, rank, scale=0.1)


def model_of(cache: StridedCache, ops, group: int, rank: int, num_rotations: int = 1, **options) -> Model:
    return Model(cache, ops, filter_bank=lambda: make_bank(cache, group, rank, num_rotations), **options)


SCORERS = [
    "rotary", "rotary, two rotations", "expected", "expected, rank 0", "expected, observed",
    "expected, observed after the prompt", "expected, observed after the prompt, shared",
    "expected, all but one observed",
    "expected, observed, fp8", "keydiff", "rotary, heads differ", "expected, heads differ, sinks", "expected, capped",
    "expected, observed, heads differ, sinks, capped",
]  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize(
    "case", [CASES[name] for name in ("one", "interval", "random-0")], ids=["one", "interval", "random"]
)
def test_methods_score_with_triton_as_with_the_reference(case, name):
    geometry = Geometry(
        num_kv_heads=2, head_size=12, num_planes=1 if "observed" in name else 0, layout=LAYOUTS[case[1] % 4]
    )
    fast, slow = Sequences(case[0], geometry, seed=case[1]), Sequences(case[0], geometry, seed=case[1], device=CPU)
    slow.cache.key_values.copy_(random_tensor(*slow.cache.key_values.shape, seed=3))
    key_scales = None
    if "fp8" in name:
        if not HAS_FP8:
            pytest.skip("this GPU has no fp8")
        fast = Sequences(case[0], dataclasses.replace(geometry, dtype=torch.float8_e4m3fn), seed=case[1])
        fast.cache.planes.copy_(slow.cache.planes)
        key_scales = torch.tensor([0.5, 4.0], device=DEVICE)
        stored = slow.cache.key_values.to(torch.float8_e4m3fn)
        fast.cache.key_values.copy_(stored)
        slow.cache.key_values.copy_(stored.float())
        slow.cache.key_values[..., : slow.cache.head_size] *= key_scales.cpu().view(-1, 1, 1, 1, 1)
    else:
        fast.cache.key_values.copy_(slow.cache.key_values)
    rank, group = 0 if "rank 0" in name else 3, 3
    recent = [None] * len(slow.evictions)
    made = KeyDiff if name == "keydiff" else RotaryFilter if "rotary" in name else ExpectedAttention
    softmax = Softmax(
        0.1,
        soft_cap=1.5 if "capped" in name else 0.0,
        sinks=random_tensor(2, 2 * group, seed=5) if "sinks" in name else None,
        group_sizes=torch.tensor([2, 3], device=DEVICE) if "heads differ" in name else None,
    )
    # Other ranks saw more of what this one saw.
    options = dict(
        shared_by_heads="shared" in name,
        max_over_ranks=lambda peak: 3 * peak,
        num_rotations=2 if "two" in name else 1,
    )
    fast.cache.key_scales = key_scales
    method = made(model_of(fast.cache, TRITON_OPS, group, rank, softmax=softmax, **options))
    slow_softmax = Softmax(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in vars(softmax).values()))
    slow_method = made(model_of(slow.cache, REFERENCE_OPS, group, rank, softmax=slow_softmax, **options))
    if "observed" in name and len(recent) > ("but one" in name):
        queries = random_tensor(2, 2 * group, 5, 12, seed=4).cpu()
        end = slow.compactions[0].position - 3
        recent[0] = RecentQueries(queries, end, num_prompt_tokens=end if "after" in name else 1 << 20)
    on_device = [r and dataclasses.replace(r, queries=r.queries.to(DEVICE)) for r in recent]
    batch, slow_batch = fast.batch, slow.batch
    if "but one" in name:  # beside its tokens stands what other sequences observed
        last = dataclasses.replace(slow.compactions[-1], unobserved_tokens=slow.compactions[-1].resident_tokens)
        batch, slow_batch = (
            CompactionBatch.make(
                [*sequences.compactions[:-1], last],
                sequences.table_rows,
                sequences.batch.block_table,
            )
            for sequences in (fast, slow)
        )
    with forbidden_waiting():
        flat = method.scores(batch, on_device)
    expected = slow_batch.split(slow_method.scores(slow_batch, recent), 2, 2)
    for found, of_sequence in zip(batch.split(flat, 2, 2), expected, strict=True):
        # Attention times norms of values, which are larger than 1.
        torch.testing.assert_close(found.cpu(), of_sequence, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(fast.cache.planes.cpu(), slow.cache.planes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bytes_at_once", [1, 20_000, 1 << 20], ids=["one by one", "layer by layer", "at once"])
@pytest.mark.parametrize("group, is_shared", [(1, False), (4, True)], ids=["head", "layer"])
def test_compaction_takes_no_more_memory_than_is_set_aside(group, is_shared, bytes_at_once, monkeypatch):
    """All prompts have been read."""
    monkeypatch.setattr("vllm_qfilters.worker.compactor.BYTES_AT_ONCE", bytes_at_once)
    evictions = [*3 * [Eviction(66, 16, 4, 20)], Eviction(300, 208, 4, 40), Eviction(48, 16, 4, 16)]
    sequences = Sequences(evictions, Geometry(num_kv_heads=2, head_size=12), seed=1)
    cache, residents = sequences.cache, [eviction.resident for eviction in evictions]
    method = ExpectedAttention(model_of(cache, TRITON_OPS, group, 3, softmax=Softmax(0.1), shared_by_heads=is_shared))
    queries = random_tensor(2, 2 * group, 2, 12, seed=4)
    recent = [RecentQueries(queries, compaction.position, compaction.position) for compaction in sequences.compactions]
    compactions = [dataclasses.replace(compaction, distinct_tokens=10) for compaction in sequences.compactions]
    with PeakMemory() as taken:
        Compactor(method, 2 * group, is_shared, bytes_at_once=bytes_at_once).apply(
            compactions, sequences.table_rows, sequences.batch.block_table, recent
        )
    set_aside = workspace_bytes(
        num_layers=2,
        num_heads=2 * group,
        num_kv_heads=2,
        head_size=12,
        num_sequences=len(residents),
        longest_sequence=max(residents),
        cached_tokens=sum(residents),
        query_bytes=queries.nbytes // 2,
    )
    assert 0.4 * set_aside < taken.bytes <= set_aside


@pytest.mark.parametrize(
    "shape",
    [
        # layers, query heads, KV heads, head size, longest sequence
        pytest.param((32, 32, 8, 128, 4096), id="Llama-3.1-8B, 4k"),
        pytest.param((32, 32, 8, 128, 131_072), id="Llama-3.1-8B, 128k"),
        pytest.param((32, 32, 8, 128, 524_288), id="Llama-3-8B-Gradient, 512k"),
        pytest.param((64, 64, 8, 128, 131_072), id="Qwen3-32B, 128k"),
        pytest.param((126, 16, 1, 128, 131_072), id="Llama-3.1-405B on 8 GPUs, 128k"),
    ],
)
def test_compaction_takes_at_most_128_mib_at_any_context(shape):
    num_layers, num_heads, num_kv_heads, head_size, context = shape
    taken = workspace_bytes(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        num_sequences=1024,
        longest_sequence=context,
        cached_tokens=max(1 << 20, context),
        query_bytes=32 * num_heads * head_size * torch.bfloat16.itemsize,
    )
    assert taken <= 128 << 20


@pytest.mark.sampled(7)
@pytest.mark.parametrize("dtype", [*DTYPES, *FP8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_values", [False, True], ids=["keys", "values"])
@pytest.mark.parametrize(("head_size", "value_size", "pool"), [(16, 16, 1), (40, 24, 3), (80, 80, 7)])
def test_distinctness_matches_reference(head_size, value_size, pool, of_values, layout, dtype):
    if dtype in FP8 and not HAS_FP8:
        pytest.skip("this GPU has no fp8")
    dtype = {**DTYPES, **FP8}[dtype]
    geometry = Geometry(num_kv_heads=3, head_size=head_size, dtype=dtype, layout=layout, value_size=value_size)
    sequences = Sequences([Eviction(300, 16, 4, 20), Eviction(1, 0, 0, 0), Eviction(65, 32, 0, 5)], geometry, seed=1)
    cache = sequences.cache
    cache.key_values.copy_(random_tensor(*cache.key_values.shape, seed=3).to(cache.key_values.dtype))
    cache.key_values[1, sequences.old_pages[0][0]] = 0  # keys and values of no direction
    with forbidden_waiting():
        flat = distinctness(cache, sequences.batch, of_values, pool)
    for index, found in enumerate(sequences.batch.split(flat, cache.num_layers, 3)):
        expected = reference.distinctness(
            cache, sequences.old_pages[index], sequences.evictions[index].resident, of_values, pool
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_shared", [False, True], ids=["head", "layer"])
def test_a_batch_keeps_what_scores_high_and_then_what_is_distinct(is_shared):
    """Sequences with distinct tokens beside others; other ranks make other means of what this one has."""
    evictions = [Eviction(300, 48, 4, 60), Eviction(130, 32, 4, 30), Eviction(97, 16, 0, 0)]
    sequences = Sequences(evictions, Geometry(num_kv_heads=2, head_size=12), seed=2)
    cache = sequences.cache
    cache.key_values.copy_(random_tensor(*cache.key_values.shape, seed=3))
    distinct = [100, 0, 81]  # of the last one all that stay
    compactions = [
        dataclasses.replace(compaction, copied_pages=(), distinct_tokens=count)
        for compaction, count in zip(sequences.compactions, distinct, strict=True)
    ]
    expected = []
    for index, eviction in enumerate(evictions):
        pages, bounds = sequences.old_pages[index], (eviction.sinks, eviction.window)
        values = sequences.scores_of(index), reference.distinctness(cache, pages, eviction.resident, True, 7)
        scores, turned_away = (3 * reference.mean_standardised(part, *bounds) if is_shared else part for part in values)
        best = reference.select_kept(scores, eviction.kept - distinct[index], *bounds, False)
        expected.append(reference.select_kept(turned_away.masked_fill(best, 1e9), eviction.kept, *bounds, False))
    compactor = Compactor(Method(Model(cache, TRITON_OPS)), 2, is_shared, lambda values: 3 * values)
    with forbidden_waiting():
        found = compactor.apply(compactions, sequences.table_rows, sequences.batch.block_table, [None] * 3, True)
    assert all(torch.equal(kept.bool(), wanted) for kept, wanted in zip(found, expected, strict=True))


def test_warming_up_touches_the_null_page_alone():
    _buffer, _, cache = make_cache(Geometry())
    before = cache.words.clone()
    method = ExpectedAttention(model_of(cache, TRITON_OPS, 2, 3))
    Compactor(method, 4, shared_by_heads=True).warm_up(RecentQueries(torch.zeros(2, 4, 40, 8, device=DEVICE), 0, 0))
    assert torch.equal(cache.words[:, 1:], before[:, 1:])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="launches are seen under Triton's interpreter")
@pytest.mark.parametrize(
    ("num_rotations", "dtype", "is_shared"),
    [(1, torch.bfloat16, True), (2, torch.float8_e4m3fn, False)],
    ids=["layer", "two rotations, fp8, head, layers that differ"],
)
def test_cuts_launch_nothing_that_was_not_warmed_up(num_rotations, dtype, is_shared):
    """Few and many sequences, layers, queries and pages."""
    geometry = Geometry(num_layers=3, num_kv_heads=2, head_size=24, dtype=dtype)
    sequences = Sequences([Eviction(66, 16, 4, 20), Eviction(130, 64, 4, 40), Eviction(48, 16, 4, 16)], geometry, 1)
    cache = sequences.cache
    cache.key_scales = torch.ones(3) if dtype.itemsize == 1 else None
    softmax = Softmax(0.1) if is_shared else Softmax(0.1, 30.0, torch.zeros(3, 8), torch.tensor([4, 2, 4]))
    method = ExpectedAttention(
        model_of(cache, TRITON_OPS, 4, 3, num_rotations, softmax=softmax, shared_by_heads=is_shared)
    )
    queries = torch.zeros(3, 8, 32, 24, dtype=torch.bfloat16)
    with recorded() as warmed_up:
        Compactor(method, 8, is_shared).warm_up(RecentQueries(queries, 0, 0))
    assert len({name for name, *_ in warmed_up}) > 10
    with recorded() as launched:
        for count, num_queries, bytes_at_once in ((3, 1, 1 << 30), (2, 1, 1 << 30), (2, 17, 1)):
            compactions = [
                dataclasses.replace(compaction, distinct_tokens=index, copied_pages=compaction.copied_pages[:index])
                for index, compaction in enumerate(sequences.compactions[:count])
            ]
            recent = [
                None if compaction.distinct_tokens else RecentQueries(queries[:, :, :num_queries], position, position)
                for compaction in compactions
                for position in (compaction.position,)
            ]
            Compactor(method, 8, is_shared, bytes_at_once=bytes_at_once).apply(
                compactions, sequences.table_rows, sequences.batch.block_table, recent
            )
    assert launched <= warmed_up


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("group", [1, 3])
def test_score_resident_matches_reference(case, group, rank):
    dtype, layout = [(torch.bfloat16, "LBNHC"), (torch.float32, "BLHNC")][case[1] % 2]
    geometry = Geometry(num_kv_heads=2, head_size=[8, 20][case[1] % 2], dtype=dtype, layout=layout)
    sequences = Sequences(case[0], geometry, seed=case[1])
    cache, batch = sequences.cache, sequences.batch
    shape = (cache.num_layers, cache.num_kv_heads * group)
    num_rows = batch.num_sequences if case[1] % 3 else 1
    cache.key_values.copy_(random_tensor(*cache.key_values.shape, seed=3))
    filters = random_tensor(num_rows, *shape, cache.head_size, seed=1)
    factors = random_tensor(num_rows, *shape, rank, cache.head_size, seed=2) if rank else None
    flat = score_resident(cache, batch, filters, factors)
    for index, found in enumerate(batch.split(flat, *shape)):
        keys = cache.key_values[:, sequences.old_pages[index], ..., : cache.head_size].transpose(1, 2).flatten(2, 3)
        row = index % num_rows
        expected = reference.score_resident(
            keys[:, :, : sequences.evictions[index].resident], filters[row], factors[row] if rank else None
        )
        # For keys in bfloat16, vectors are the sum of two numbers of 8 bits.
        torch.testing.assert_close(found, expected, atol=2e-3 if dtype == torch.bfloat16 else 1e-4, rtol=1e-4)


@pytest.mark.parametrize(("group", "rank"), [(20, 15), (2, 130)])
def test_score_resident_takes_any_group_and_rank(group, rank):
    sequences = Sequences([Eviction(300, 16, 0, 0)], Geometry(num_layers=1, num_kv_heads=1, head_size=40), seed=0)
    cache = sequences.cache
    cache.key_values.copy_(random_tensor(*cache.key_values.shape, seed=3))
    filters, factors = random_tensor(1, 1, group, 40, seed=1), random_tensor(1, 1, group, rank, 40, seed=2)
    (found,) = sequences.batch.split(score_resident(cache, sequences.batch, filters, factors), 1, group)
    keys = cache.key_values[:, sequences.old_pages[0], ..., :40].transpose(1, 2).flatten(2, 3)[:, :, :300]
    torch.testing.assert_close(found, reference.score_resident(keys, filters[0], factors[0]), atol=1e-3, rtol=1e-4)


@pytest.mark.skipif(not HAS_FP8, reason="this GPU has no fp8")
def test_score_resident_reads_fp8_keys_with_the_scale_of_their_layer():
    sequences = Sequences([Eviction(40, 16, 0, 0)], Geometry(dtype=torch.float8_e4m3fn), seed=0)
    cache, scales = sequences.cache, torch.tensor([0.5, 4.0], device=DEVICE)
    filters = random_tensor(1, cache.num_layers, cache.num_kv_heads, cache.head_size, seed=1)
    (found,) = sequences.batch.split(
        score_resident(cache, sequences.batch, filters, key_scales=scales), cache.num_layers, cache.num_kv_heads
    )
    keys = cache.key_values.float()[:, sequences.old_pages[0], ..., : cache.head_size].transpose(1, 2).flatten(2, 3)
    expected = reference.score_resident(keys[:, :, :40] * scales[:, None, None, None], filters[0])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


OBSERVATIONS = {
    # Of two of three sequences: queries kept and tokens that came after them, per sequence.
    "bf16": (Geometry(head_size=20, dtype=torch.bfloat16, layout="LBNHC"), 4, {0: (32, 0), 2: (7, 40)}),
    "fp16": (Geometry(head_size=16, dtype=torch.float16, layout="BLHNC"), 3, {1: (32, 1), 2: (32, 3)}),
    "fp32": (Geometry(head_size=8, num_kv_heads=1, layout="LBHNC"), 1, {0: (1, 0), 1: (5, 2)}),
    "e4m3": (Geometry(head_size=20, dtype=torch.float8_e4m3fn), 3, {0: (32, 0), 2: (7, 40)}),
    "e5m2": (Geometry(head_size=16, dtype=torch.float8_e5m2, layout="LBNHC"), 1, {1: (9, 4)}),
}


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observed_attention_matches_reference(name, monkeypatch):
    if name in FP8 and not HAS_FP8:
        pytest.skip("this GPU has no fp8")
    geometry, group, observed = OBSERVATIONS[name]
    dtype, key_scales = (
        (torch.bfloat16, torch.tensor([0.5, 4.0], device=DEVICE)) if name in FP8 else (geometry.dtype, None)
    )
    monkeypatch.setattr("vllm_qfilters.kernels.triton.observation.OBSERVATIONS_AT_ONCE", 1 if name == "fp16" else 8)
    sequences = Sequences([Eviction(70, 16, 4, 20), Eviction(137, 32, 4, 33), Eviction(96, 16, 0, 0)], geometry, seed=1)
    cache, batch = sequences.cache, sequences.batch
    cache.key_values.copy_(random_tensor(*cache.key_values.shape, seed=3).to(geometry.dtype))
    before = cache.planes.clone()
    shape = (cache.num_layers, cache.num_kv_heads * group)
    observations, judged_by = [], {}
    for index, (num_queries, num_newer) in observed.items():
        queries = random_tensor(*shape, num_queries, cache.head_size, seed=index, dtype=dtype)
        observations.append(Observation(index, queries, num_newer, is_question=len(observations) == 0))
        pages, resident = sequences.old_pages[index], sequences.evictions[index].resident
        scaled = 0.2 * queries.float() * (1 if key_scales is None else key_scales[:, None, None, None])
        mean, peak = reference.observed_attention(cache, pages, resident, scaled, num_newer, 7, (6, 12))
        write_plane(cache.planes[:, :, 1], pages, mean)
        judged_by[index] = peak if observations[-1].is_question else mean
    for index, (compaction, pages) in enumerate(zip(sequences.compactions, sequences.old_pages, strict=True)):
        if index not in observed:
            of_row = read_plane(cache.planes[:, :, 1], pages, compaction.resident_tokens)
            of_row[..., compaction.resident_tokens - compaction.unobserved_tokens :] = NOT_OBSERVED
            write_plane(cache.planes[:, :, 1], pages, of_row)
    expected = cache.planes.clone()
    cache.planes.copy_(before)
    with forbidden_waiting():
        plane = cache.planes[:, :, 1]
        found = observe(
            cache, batch, observations, plane, Softmax(0.2), 7, (6, 12), shared_by_heads=False, key_scales=key_scales
        )
    torch.testing.assert_close(cache.planes, expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(cache.planes[:, :, 0], before[:, :, 0])
    for index, row in enumerate(batch.split(found, cache.num_layers, cache.num_kv_heads)):
        pages, resident = sequences.old_pages[index], sequences.evictions[index].resident
        of_row = judged_by[index] if index in judged_by else read_plane(cache.planes[:, :, 1], pages, resident)
        torch.testing.assert_close(row, of_row, atol=1e-6, rtol=1e-4)


def test_what_waits_for_a_gpu_is_told_from_what_does_not():
    numbers, mask = torch.arange(4, device=DEVICE), torch.ones(4, dtype=torch.bool, device=DEVICE)
    by_function = [lambda: int(numbers[0]), lambda: bool(mask.any()), lambda: numbers[mask]]
    for read in [numbers.tolist, numbers.cpu, mask.nonzero, *by_function]:
        with pytest.raises((AssertionError, RuntimeError)), forbidden_waiting():
            read()
    with forbidden_waiting():
        numbers[numbers.flip(0)] = numbers * 2


@pytest.mark.parametrize(("heads", "block", "layout"), [(1, 16, "LBNHC"), (3, 32, "BLHNC"), (8, 128, "LBHNC")], ids=str)
def test_page_scores_match_reference(heads, block, layout):
    _, _, cache = make_cache(Geometry(num_layers=3, num_blocks=9, num_kv_heads=heads, block_size=block, layout=layout))
    pages = torch.tensor([7, 0, 3, 3], device=DEVICE)
    mean, deviation = random_tensor(3, heads, seed=1), random_tensor(3, heads, seed=2).abs() + 0.1
    found = page_scores(cache.scores, pages, mean, deviation)
    torch.testing.assert_close(found, reference.page_scores(cache.scores, pages, mean, deviation), atol=1e-5, rtol=1e-4)


# Layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_lie_behind_the_pages_and_nothing_overlaps(layout):
    buffer, views, cache = make_cache(
        Geometry(num_layers=3, num_blocks=5, num_kv_heads=3, layout=layout, dtype=torch.float16)
    )
    buffer.zero_()
    for layer, view in enumerate(views):
        assert (
            cache.key_values[layer].data_ptr() == view.data_ptr() and cache.key_values[layer].stride() == view.stride()
        )
        view.view(torch.int16).fill_(0x0101)
    assert not bool(cache.planes.any())
    cache.planes.view(torch.int32).fill_(0x02020202)
    assert bool((cache.key_values.view(torch.int16) == 0x0101).all())
    assert bool((buffer != 0).all())
    assert cache.words.numel() * 4 == buffer.numel() and cache.planes.shape[2] == 2
    cache.words.fill_(0x03030303)
    assert bool((buffer == 3).all())


def test_other_views_are_refused():
    _, views, _ = make_cache(Geometry(num_layers=3))
    with pytest.raises(ValueError, match="constant distance"):
        StridedCache([views[0], views[2], views[1]])
    with pytest.raises(ValueError, match="dense"):
        StridedCache([view[:, :, ::2] for view in views])
    tight = [torch.zeros(8, 2, 16, 16) for _ in range(1)]
    with pytest.raises(ValueError, match="0 bytes left for scores, 128 are needed"):
        StridedCache(tight)
