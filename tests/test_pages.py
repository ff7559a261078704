"""Page granularity: which pages are freed, when their scores are known, and what becomes of both."""

import collections

import pytest
import torch
from safetensors.torch import save_file

from tests.engines import BLOCK, Engine
from tests.models import HEAD_SIZE, NUM_KV_HEADS, NUM_LAYERS, random_prompt
from vllm_qfilters.filters.format import Filters

OPTIONS = dict(budget=192, window=32, sinks=4, interval=32, chunk=128, granularity="page")


class Reference:
    """Recomputes every choice of pages from the keys in the cache."""

    def __init__(self, engine: Engine, filters: Filters, monkeypatch) -> None:
        self.engine, self.filters = engine, filters.filters
        self.mean, self.std = filters.score_mean, filters.score_std
        self.choices = 0
        self._compact = engine.scheduler.block_manager.plan_eviction
        monkeypatch.setattr(engine.scheduler.block_manager, "plan_eviction", self.compact)

    def compact(self, request, evicted_tokens):
        pages = self.engine.scheduler.block_manager
        before = [block.block_id for block in pages.req_to_blocks[request.request_id]]
        resident, limits = pages.resident_tokens(request), pages.limits[request.request_id]
        row = self._compact(request, evicted_tokens)
        count = evicted_tokens // BLOCK
        outside = [
            page
            for i, page in enumerate(before)
            if i * BLOCK >= limits.sinks and (i + 1) * BLOCK <= resident - limits.window
        ]
        lowest = sorted(outside, key=self.score)[:count]
        assert row.block_ids == tuple(page for page in before if page not in lowest)
        assert (row.resident_tokens, row.evicted_tokens) == (resident, evicted_tokens)
        self.choices += len(outside) > count
        return row

    def score(self, page: int) -> float:
        cache = self.engine.runner.cache
        layer, head, slot = torch.meshgrid(
            *(torch.arange(n) for n in (cache.num_layers, cache.num_kv_heads, BLOCK)), indexing="ij"
        )
        layer, head, slot = layer.flatten(), head.flatten(), slot.flatten()
        keys, _ = cache.read(layer, torch.full_like(layer, page), head, slot)
        projections = (keys.double() * self.filters[layer, head]).sum(-1)
        return float(((projections - self.mean[layer, head]) / self.std[layer, head]).mean())


@pytest.mark.parametrize("prefill", ["chunked", "full"])
def test_the_lowest_scoring_pages_are_freed_at_every_step_of_a_long_run(prefill, engines, tiny_filters, monkeypatch):
    """Shared prefixes, preemptions, several budgets; scores are of the keys that are there now, whoever wrote them."""
    options = {**OPTIONS, "prefill": prefill}
    if prefill == "full":
        del options["chunk"]
    engine = engines.get(**options, num_blocks=48, max_model_len=1024)
    reference = Reference(engine, tiny_filters[1], monkeypatch)
    shared = random_prompt(160, seed=31)
    for seed in range(12):
        prompt = (shared if seed % 2 else []) + random_prompt(60 + 37 * seed, seed=seed)
        engine.add(prompt, max_tokens=200, kv_budget=(None, 256, 0, 0.9)[seed % 4])
        for _ in range(15):
            engine.step()
    engine.run()
    assert reference.choices > 40
    engine.assert_idle()


# (computed, resident, pages) after each step of a 400-token prompt and 70 generated tokens; a page holds 32 tokens.
TABLE = [
    (256, 256, 8),  # no cut at 128: the budget was not exceeded; chunks end at cuts, 256 is the first
    (384, 320, 10),  # cut to 192, then the next chunk
    (400, 208, 7),  # cut to 192, then the rest of the prompt
    (401, 177, 6),  # 208 + 1 > 192: one page goes
    *[(401 + n, 177 + n, 6) for n in range(1, 16)],
    (417, 161, 6),  # 192 held, the next token would be one too many: `interval` go
    *[(417 + n, 161 + n, 6) for n in range(1, 32)],
    (449, 161, 6),
    *[(449 + n, 161 + n, 6) for n in range(1, 21)],
]


def test_step_table_of_one_request(engines):
    engine = engines.get(**OPTIONS, num_blocks=64)
    pages, pool = engine.scheduler.block_manager, engine.pool
    free_at_start, freed_before = pool.get_num_free_blocks(), engine.scheduler.compression_stats.freed_pages
    engine.add(random_prompt(400, seed=3), max_tokens=70)
    seen, sink_pages = [], set()

    def look():
        for request in engine.scheduler.running:
            block_ids = [block.block_id for block in pages.req_to_blocks[request.request_id]]
            resident = pages.resident_tokens(request)
            seen.append((request.num_computed_tokens, resident, len(block_ids)))
            assert pool.get_num_free_blocks() == free_at_start - len(block_ids)
            assert attended[0] == resident, "worker and scheduler disagree"
            table = engine.runner.input_batch.block_table[0]
            held = table.num_blocks_per_row[0]
            assert table.block_table.np[0, :held].tolist() == block_ids
            sink_pages.add(block_ids[0])

    with engine.attended_lengths() as attended:
        engine.run(look)
    assert seen == TABLE[: len(seen)] and len(seen) >= len(TABLE) - 1
    assert len(sink_pages) == 1
    assert engine.scheduler.compression_stats.freed_pages - freed_before == 2 + 4 + 1 + 1 + 1
    engine.assert_idle()


def test_pages_freed_by_one_request_serve_another_in_the_same_step(engines):
    """The cache has room for the second request only if the first one's pages are free before that step is
    scheduled.
    """
    engine = engines.get(**OPTIONS, num_blocks=14)  # 13 usable pages
    engine.drop_everything()
    engine.add(random_prompt(257, seed=4), max_tokens=20)  # holds 8 pages at its cut, then 6 + 1
    engine.step()
    assert engine.pool.get_num_free_blocks() == 5
    engine.add(random_prompt(190, seed=5), max_tokens=20)  # needs 6 pages
    engine.step()
    assert len(engine.scheduler.running) == 2
    engine.run()
    engine.assert_idle()


def test_a_cached_page_keeps_its_score_and_a_freed_one_is_still_found(engines):
    engine = engines.get(**OPTIONS, num_blocks=64)
    engine.drop_everything()
    pages, prompt = engine.scheduler.block_manager, random_prompt(257, seed=41)
    engine.add(prompt, max_tokens=40)
    engine.step()
    (request,) = engine.scheduler.running
    first = [block.block_id for block in pages.req_to_blocks[request.request_id]]
    scores = pages.block_scores[first].tolist()
    engine.step()
    held = {block.block_id for block in pages.req_to_blocks[request.request_id]}
    freed = [page for page in first if page not in held]
    assert len(freed) == 2 and freed == sorted(
        sorted(first[1:7], key=pages.block_scores.__getitem__)[:2], key=first.index
    )
    engine.run()

    cached = 256 // BLOCK - 1
    engine.add(prompt[: cached * BLOCK] + random_prompt(33, seed=42), max_tokens=40)  # parts before the first cut
    engine.step()
    (request,) = engine.scheduler.running
    again = [block.block_id for block in pages.req_to_blocks[request.request_id]]
    assert again[:cached] == first[:cached], "freed pages are not found"
    assert again[cached] != first[cached]
    assert pages.block_scores[again[:cached]].tolist() == scores[:cached]
    engine.run()
    engine.assert_idle()


def test_scores_of_a_page_filled_anew_replace_those_still_on_their_way(engines):
    """Async: the page is freed and filled by another request before the scores of its first filling have arrived."""
    engine = engines.get(**OPTIONS, num_blocks=64)
    pages = engine.scheduler.block_manager
    pages._awaited.update([9, 10])  # step 1 fills two pages, step 2 one of them again
    pages._awaited.update([10])
    pages.receive_scores([9, 10], [0.5, 0.25])
    assert set(pages._awaited) == {10}
    pages.receive_scores([10], [-1.0])
    assert not pages._awaited
    assert pages.block_scores[[9, 10]].tolist() == [0.5, -1.0]


def make_async(engine: Engine, depth: int = 2) -> None:
    """The next steps are scheduled before the output of one is looked at, as under async scheduling, which CPUs switch
    off.
    """
    core = engine.llm.llm_engine.engine_core.engine_core
    core.batch_queue_size, core.batch_queue = depth, collections.deque(maxlen=depth)
    core.step_fn = core.step_with_batch_queue
    engine.scheduler.scheduler_config.async_scheduling = True


JOBS = [(random_prompt(n, seed=n), tokens) for n, tokens in ((700, 150), (100, 300), (333, 200), (512, 100), (40, 400))]


def run_jobs(engine: Engine, order) -> tuple[dict, list]:
    """Token ids of each job, and each eviction as (prompt length, computed tokens, places in the sequence)."""
    evictions = []
    pages, compact = engine.scheduler.block_manager, engine.scheduler.block_manager.plan_eviction

    def record(request, evicted_tokens):
        before = [block.block_id for block in pages.req_to_blocks[request.request_id]]
        row = compact(request, evicted_tokens)
        places = tuple(i for i, page in enumerate(before) if page not in row.block_ids)
        evictions.append((request.num_prompt_tokens, request.num_computed_tokens, places))
        return row

    pages.plan_eviction = record
    try:
        names = {engine.add(JOBS[i][0], max_tokens=JOBS[i][1]): i for i in order}
        finished = engine.run()
    finally:
        pages.plan_eviction = compact
    return {names[name]: list(output.outputs[0].token_ids) for name, output in finished.items()}, sorted(evictions)


@pytest.mark.parametrize("window", [32, 0])
@pytest.mark.parametrize("depth", [2, 4])
def test_late_scores_change_nothing(depth, window, engines):
    """The same evictions as without async scheduling, and nobody exceeds the budget while waiting for scores."""
    options = dict(OPTIONS, window=window)
    first = engines.get(**options, num_blocks=256)
    first.drop_everything()  # prompts that start behind a cut are not cut there
    expected = run_jobs(first, range(5))
    engine = engines.get(**options, num_blocks=256 + depth)  # an engine of its own
    make_async(engine, depth)
    pages, scheduler = engine.scheduler.block_manager, engine.scheduler
    schedule, waits = scheduler.schedule, 0

    def watch(*args):
        nonlocal waits
        output = schedule(*args)
        waits += len(scheduler._sitting_out)
        for name in scheduler._sitting_out:
            assert name not in output.num_scheduled_tokens
        for request in scheduler.running:
            if not request.is_prefill_chunk and request.num_computed_tokens > request.num_prompt_tokens:
                assert pages.resident_tokens(request) <= 192
        return output

    scheduler.schedule = watch
    assert run_jobs(engine, (3, 0, 4, 2, 1)) == expected
    assert waits > 5
    assert not pages._awaited
    engine.assert_idle()


@pytest.mark.parametrize("method", ["qfilters", "knorm", "random_once"])
def test_scores_without_statistics_are_normalised_by_measured_ones(method, engines, tmp_path_factory):
    """Published filters have none."""
    path = tmp_path_factory.mktemp("published") / "filters.safetensors"
    save_file({"q_filters": torch.randn(NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE)}, path)
    filters = {"filters": str(path)} if method == "qfilters" else {}
    engine = engines.get(method=method, **OPTIONS, **filters, num_blocks=64)
    scorer, cache = engine.runner.page_scorer, engine.runner.cache
    engine.add(random_prompt(600, seed=5), max_tokens=2)
    engine.step()
    scores = cache.scores[:, 1:9].transpose(1, 2).flatten(2)
    assert bool((scorer._std > 0).all())
    z = (scores - scorer._mean[..., None]) / scorer._std[..., None]
    assert float(z.mean((1, 2)).abs().max()) < 0.3 and 0.7 < float(z.std()) < 1.3
    engine.run()
    engine.assert_idle()


def test_streaming_frees_the_oldest_pages_and_scores_none(engines):
    engine = engines.get(method="streaming", **dict(OPTIONS, window=0), num_blocks=64)
    assert engine.runner.page_scorer is None
    pages = engine.scheduler.block_manager
    engine.add(random_prompt(257, seed=6), max_tokens=4)
    engine.step()
    (request,) = engine.scheduler.running
    before = [block.block_id for block in pages.req_to_blocks[request.request_id]]
    engine.step()
    after = [block.block_id for block in pages.req_to_blocks[request.request_id]]
    assert after[:-1] == before[:1] + before[3:]
    engine.run()
    assert not pages._awaited
    engine.assert_idle()
