"""Every method of the catalogue, by the same properties: on CPUs and, through the reference of the same operators, as
on GPUs. A new method is covered by its entry alone.
"""

import dataclasses
import importlib
import inspect
import math

import pytest
import torch

from tests.models import random_prompt
from tests.paged import Eviction, Geometry, Sequences, make_cache, random_tensor
from tests.test_layout import Geometry as CpuGeometry
from tests.test_layout import make_cache as make_cpu_cache
from tests.test_triton import make_bank
from vllm_qfilters.kernels import CPU_OPS, REFERENCE_OPS
from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.ops import Softmax, TokenStat
from vllm_qfilters.methods.base import Model, PerSequence, RecentQueries, make
from vllm_qfilters.methods.catalog import METHODS, QFILTERS, Entry
from vllm_qfilters.methods.lagkv import LagKV
from vllm_qfilters.methods.random import draw
from vllm_qfilters.plan import RequestCompaction
from vllm_qfilters.worker.compactor import Compactor

ENTRIES = {name: entry for name, entry in METHODS.items() if name != "qfilters"}
ENTRIES |= {f"qfilters-{filter}": entry for filter, entry in QFILTERS.items()}
CPU = torch.device("cpu")
EVICTIONS = [Eviction(300, 48, 4, 60), Eviction(330, 32, 0, 37), Eviction(97, 16, 7, 0)]


def model_of(cache, ops=REFERENCE_OPS, num_rotations=1, **options) -> Model:
    filters = random_tensor(cache.num_layers, cache.num_kv_heads, cache.head_size, seed=9).cpu()
    return Model(
        cache,
        ops,
        softmax=Softmax(0.3),
        static_filters=lambda: filters,
        filter_bank=lambda: make_bank(cache, 3, 2, num_rotations),
        **options,
    )


class Scattered(Sequences):
    """Sequences whose keys and values are random, with token stats of a method and the queries it asks for.

    Attributes:
        model, method: of the cache.
        recent: the last queries of each sequence, or None.
    """

    def __init__(self, entry: Entry, evictions=EVICTIONS, seed: int = 1, **options) -> None:
        geometry = Geometry(num_kv_heads=2, head_size=12, num_planes=entry.stats(32))
        super().__init__(evictions, geometry, seed, CPU)
        self.cache.key_values.copy_(random_tensor(*self.cache.key_values.shape, seed=seed + 3).cpu())
        self.model = model_of(self.cache, **options)
        self.method = make(entry, self.model)
        for layer in range(self.cache.num_layers if self.method.stat != TokenStat.NONE else 0):
            slots = torch.arange(self.cache.num_blocks * 16)
            key, value = self.cache.key_values[layer].transpose(1, 2).flatten(0, 1).split(12, dim=-1)
            filters = None if self.method.filters is None else self.method.filters[layer]
            REFERENCE_OPS.write(self.method.stat, key, value, None, self.cache.planes[layer], slots, filters, layer)
        count = entry.observed_queries(32)
        self.recent = [
            RecentQueries(random_tensor(2, 6, count, 12, seed=index).cpu(), c.position, c.position) if count else None
            for index, c in enumerate(self.compactions)
        ]

    def scores(self) -> list[torch.Tensor]:
        return self.batch.split(self.method.scores(self.batch, self.recent), 2, 2)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_method_gives_every_token_a_number_and_the_same_one_again(name):
    sequences = Scattered(ENTRIES[name])
    for scores, eviction in zip(sequences.scores(), EVICTIONS, strict=True):
        assert scores.shape == (2, 2, eviction.resident) and scores.dtype == torch.float32
        assert not scores.isnan().any()
    again = Scattered(ENTRIES[name])
    assert all(torch.equal(*pair) for pair in zip(sequences.scores(), again.scores(), strict=True))


@pytest.mark.parametrize("shared_by_heads", [False, True], ids=["head", "layer"])
@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if not entry.recent_only])
def test_the_highest_scores_stay_beside_sinks_and_window_exactly_as_many(name, shared_by_heads):
    sequences = Scattered(ENTRIES[name], shared_by_heads=shared_by_heads)
    scores = [part.clone() for part in sequences.scores()]
    compactor = Compactor(sequences.method, 6, shared_by_heads)
    kept = compactor.apply(
        sequences.compactions, sequences.table_rows, sequences.batch.block_table, sequences.recent, returns_kept=True
    )
    for index, (is_kept, eviction) in enumerate(zip(kept, EVICTIONS, strict=True)):
        is_kept = is_kept.bool()
        assert bool((is_kept.sum(-1) == eviction.kept).all())
        assert bool(is_kept[..., : eviction.sinks].all())
        assert bool(is_kept[..., eviction.resident - eviction.window :].all())
        middle = slice(eviction.sinks, eviction.resident - eviction.window)
        ranked_by = scores[index]
        if shared_by_heads:
            ranked_by = REFERENCE_OPS.functions.mean_standardised(ranked_by, eviction.sinks, eviction.window)
        ranked_by, is_kept = ranked_by[..., middle], is_kept[..., middle]
        least_kept = ranked_by.masked_fill(~is_kept, math.inf).amin(-1)
        most_evicted = ranked_by.masked_fill(is_kept, -math.inf).amax(-1)
        assert bool((least_kept >= most_evicted - 1e-4).all())


@pytest.mark.parametrize("name", ENTRIES)
def test_equal_scores_do_not_change_how_many_stay(name):
    """Where all keys and values are the same, most methods cannot tell tokens apart."""
    sequences = Scattered(ENTRIES[name])
    sequences.cache.key_values.fill_(0.5)
    sequences.cache.planes.fill_(0.25)
    compactor = Compactor(sequences.method, 6, shared_by_heads=False)
    kept = compactor.apply(
        sequences.compactions, sequences.table_rows, sequences.batch.block_table, sequences.recent, returns_kept=True
    )
    for is_kept, eviction in zip(kept, EVICTIONS, strict=True):
        assert bool((is_kept.bool().sum(-1) == eviction.kept).all())


@pytest.mark.parametrize("bytes_at_once", [1, 20_000], ids=["one by one", "layer by layer"])
@pytest.mark.parametrize("name", ENTRIES)
def test_parts_of_a_cut_keep_what_the_whole_one_keeps(name, bytes_at_once):
    """Layers of two rotations, and seeds that differ between layers."""
    kept, caches = [], []
    for limit in (bytes_at_once, 1 << 30):
        sequences = Scattered(ENTRIES[name], num_rotations=2)
        arguments = sequences.compactions, sequences.table_rows, sequences.batch.block_table, sequences.recent
        compactor = Compactor(sequences.method, 6, shared_by_heads=False, bytes_at_once=limit)
        kept.append(compactor.apply(*arguments, returns_kept=True))
        caches.append(sequences.cache)
    assert all(torch.equal(*pair) for pair in zip(*kept, strict=True))
    assert torch.equal(caches[0].words, caches[1].words)


@pytest.mark.parametrize("name", ENTRIES)
def test_nothing_moves_where_nothing_is_evicted(name):
    sequences = Scattered(ENTRIES[name], [Eviction(90, 0, 4, 20)])
    (compaction,) = sequences.compactions
    untouched = RequestCompaction("request", 1000, 90, 0, 4, 20, tuple(sequences.old_pages[0].tolist()))
    before = sequences.cache.key_values.clone()
    compactor = Compactor(sequences.method, 6, shared_by_heads=True)
    (is_kept,) = compactor.apply([untouched], [0], sequences.batch.block_table, sequences.recent, returns_kept=True)
    assert bool(is_kept.bool().all()) and torch.equal(sequences.cache.key_values, before)
    assert compaction.evicted_tokens == 0


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.scores_are_final])
def test_final_scores_do_not_depend_on_tokens_to_come(name):
    sequences = Scattered(ENTRIES[name])
    shorter = [
        dataclasses.replace(compaction, resident_tokens=compaction.resident_tokens - 13, position=77)
        for compaction in sequences.compactions
    ]
    batch = CompactionBatch.make(shorter, sequences.table_rows, sequences.batch.block_table)
    earlier = batch.split(sequences.method.scores(batch, sequences.recent), 2, 2)
    for before, now in zip(earlier, sequences.scores(), strict=True):
        assert torch.equal(before, now[..., :-13])


@pytest.mark.parametrize("name", ENTRIES)
def test_caches_of_cpus_are_scored_like_those_of_gpus(name):
    """The C++ operators over a cache as CPUs lay it out, against the reference over one as GPUs do."""
    entry = ENTRIES[name]
    sequences = Scattered(entry, [Eviction(150, 32, 4, 20)])
    num_blocks = sequences.cache.num_blocks
    _, cache = make_cpu_cache(CpuGeometry(2, num_blocks, 2, 16, 12, num_planes=entry.stats(32)))
    for layer in range(2):
        key, value = sequences.cache.key_values[layer].transpose(1, 2).flatten(0, 1).split(12, dim=-1)
        slots = torch.arange(num_blocks * 16)
        for head in range(2):
            places = torch.full_like(slots, layer), slots // 16, torch.full_like(slots, head), slots % 16
            cache.write(*places, key[:, head], value[:, head])
    cache.planes.copy_(sequences.cache.planes)
    method = make(entry, model_of(cache, CPU_OPS))
    found = method.scores(sequences.batch, sequences.recent)
    torch.testing.assert_close(found, torch.cat([part.flatten() for part in sequences.scores()]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if not entry.needs_filters])
def test_an_engine_evicts_by_it_and_says_the_same_again(method, engines):
    limits = dict(budget=128, window=32, sinks=4, interval=32, chunk=128)
    engine = engines.get(method=method, filters=None, num_blocks=64, **limits)
    evicted_before = engine.scheduler.compression_stats.evicted_tokens
    prompts = [random_prompt(length, seed=length) for length in (300, 170)]
    first = engine.generate(prompts, max_tokens=60)
    assert engine.llm.reset_prefix_cache()
    again = engine.generate(prompts, max_tokens=60)
    assert [output.outputs[0].token_ids for output in first] == [output.outputs[0].token_ids for output in again]
    assert engine.scheduler.compression_stats.evicted_tokens > evicted_before + 500
    engine.assert_idle()


def test_random_is_drawn_anew_at_every_cut_and_random_once_is_not():
    fresh, once = Scattered(ENTRIES["random"]), Scattered(ENTRIES["random_once"])
    for sequences, is_new in ((fresh, True), (once, False)):
        before = sequences.scores()[0]
        later = [
            dataclasses.replace(compaction, position=compaction.position + 128) for compaction in sequences.compactions
        ]
        batch = CompactionBatch.make(later, sequences.table_rows, sequences.batch.block_table)
        after = batch.split(sequences.method.scores(batch, sequences.recent), 2, 2)[0]
        assert torch.equal(before, after) != is_new


@pytest.mark.parametrize("is_shared", [False, True])
def test_sampled_tokens_stay_as_often_as_they_score(is_shared):
    """The share of many cuts in which the highest score is one of the better half is that half's share of the sum."""
    expected = Scattered(ENTRIES["qfilters-expected"], EVICTIONS[2:], shared_by_heads=is_shared)
    sampled = Scattered(ENTRIES["qfilters-sampled"], EVICTIONS[2:], shared_by_heads=is_shared)
    scores = expected.scores()[0]  # [num_layers, num_heads, num_tokens]
    uniform = draw(sampled.method, sampled.batch, is_shared).view_as(scores)
    torch.testing.assert_close(sampled.scores()[0], scores.log() - (-uniform.log()).log(), atol=1e-4, rtol=1e-4)

    (compaction,) = sampled.compactions
    drawn = []
    for position in range(400):
        at = dataclasses.replace(compaction, position=1000 + position)
        batch = CompactionBatch.make([at], sampled.table_rows, sampled.batch.block_table)
        drawn.append(draw(sampled.method, batch, is_shared).view_as(scores))
    numbers = torch.stack(drawn)  # [400, num_layers, num_heads, num_tokens]
    assert torch.equal(numbers[:, :, 0], numbers[:, :, 1]) == is_shared
    assert numbers[:, 0, 0].unique().numel() > 0.99 * numbers[:, 0, 0].numel(), "anew at every position"
    weights = scores.pow(4)  # of which few are far above the others
    is_better = weights > weights.median(-1, keepdim=True).values
    highest = (weights.log() - (-numbers.log()).log()).argmax(-1, keepdim=True)
    found = is_better.expand_as(numbers).gather(-1, highest).float().mean()
    share = (weights * is_better).sum(-1) / weights.sum(-1)
    assert share.mean() > 0.6 and found == pytest.approx(float(share.mean()), abs=0.05)


def test_lagkv_follows_its_equations():
    _, _, cache = make_cache(Geometry(), device=CPU)
    method = LagKV(Model(cache, REFERENCE_OPS))
    keys, values = torch.randn(2, 2, 4 + 3 * LagKV.LAG + 17, 8, generator=torch.Generator().manual_seed(0))
    scores = method.scores_of_layer(keys, values, 4, 0)
    for partition in range(2):
        start = 4 + partition * LagKV.LAG
        own, following = slice(start, start + LagKV.LAG), slice(start + LagKV.LAG, start + 2 * LagKV.LAG)
        expected = torch.zeros(2, LagKV.LAG)
        for vectors in (keys, values):
            low, high = vectors[:, following].amin(1, keepdim=True), vectors[:, following].amax(1, keepdim=True)
            expected += ((vectors[:, own] - low) / (high - low)).std(-1).softmax(-1)
        torch.testing.assert_close(scores[:, own], expected)
    assert bool((scores[:, 4 + 2 * LagKV.LAG :] > scores[:, 4 : 4 + 2 * LagKV.LAG].max()).all())


def test_a_method_is_one_file_of_at_most_80_lines():
    for name, entry in ENTRIES.items():
        module, _, class_name = entry.implementation.partition(":")
        module = importlib.import_module(f"vllm_qfilters.methods.{module}")
        method = getattr(module, class_name)
        assert method.__module__ == module.__name__ and method.__doc__, name
        assert len(inspect.getsource(module).splitlines()) <= 85, name
        assert "Cost:" in method.__doc__ or issubclass(method, PerSequence), name
