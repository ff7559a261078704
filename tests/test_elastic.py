"""``evict: pressure``: plain vLLM while pages are free; cuts, those furthest beyond their budget first, where they are
wanting."""

import random

import pytest
from vllm.exceptions import VLLMValidationError

from tests.engines import BLOCK, tokens_and_logprobs
from tests.models import random_prompt
from tests.test_random_load import Watch
from vllm_qfilters.core.scheduler import RESERVE

BUDGET, CHUNK = 192, 128
OPTIONS = dict(budget=BUDGET, window=48, sinks=4, interval=32, chunk=CHUNK, prefill_interval=64, max_model_len=1024)
ROOMY, SMALL = 256, 34  # pages


def elastic(engines, num_blocks, **options):
    engine = engines.get(**OPTIONS, num_blocks=num_blocks, evict="pressure", **options)
    engine.drop_everything()
    return engine


def counts(engine):
    stats = engine.scheduler.compression_stats
    return stats.compactions, stats.pressure_compactions, stats.freed_pages


class Run:
    """Serves requests and remembers what was cut, and who was preempted."""

    def __init__(self, engine):
        self.engine, self.cuts, self.preemptions = engine, [], 0
        self._plan = engine.scheduler.block_manager.plan_eviction

    def __call__(self, jobs):
        manager = self.engine.scheduler.block_manager
        manager.plan_eviction = self._plan_eviction
        try:
            ids = [self.engine.add(**job) for job in jobs]
            finished = self.engine.run(self._look)
        finally:
            del manager.plan_eviction
        self.engine.assert_idle()
        return [list(finished[name].outputs[0].token_ids) for name in ids]

    def _plan_eviction(self, request, evicted_tokens):
        pages = self.engine.scheduler.block_manager
        others = [
            pages.resident_tokens(other) - pages.limits[other.request_id].budget
            for other in self.engine.scheduler.running
            if other.request_id in pages.limits and not other.is_prefill_chunk
        ]
        row = self._plan(request, evicted_tokens)
        self.cuts.append((request.is_prefill_chunk, row, max(others, default=0)))
        return row

    def _look(self):
        self.preemptions += sum(request.num_preemptions for request in self.engine.scheduler.requests.values())


def jobs_of(*lengths, max_tokens=40, **more):
    return [dict(prompt=random_prompt(length, seed=length), max_tokens=max_tokens, **more) for length in lengths]


@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_while_pages_are_free_answers_are_those_without_compression(granularity, engines):
    engine = elastic(engines, ROOMY, granularity=granularity)
    prompts = [random_prompt(length, seed=length) for length in (50, 300, 700)]
    before = counts(engine)
    elastic_outputs = engine.generate(prompts, max_tokens=100)
    assert counts(engine) == before
    assert engine.llm.reset_prefix_cache()
    for output, plain in zip(elastic_outputs, engine.generate(prompts, max_tokens=100, kv_budget=0), strict=True):
        assert tokens_and_logprobs(output) == tokens_and_logprobs(plain)
    history = prompts[2] + list(elastic_outputs[2].outputs[0].token_ids)
    (again,) = engine.generate([history + random_prompt(20, seed=1)], max_tokens=5)
    assert again.num_cached_tokens >= len(history) - BLOCK, "the prefix cache holds a whole history"


def test_where_pages_are_wanting_sequences_are_cut_before_one_is_preempted(engines):
    jobs = jobs_of(150, 160, 170, 180, 190, max_tokens=300)
    always = Run(engines.get(**OPTIONS, num_blocks=SMALL + 8))
    always.engine.drop_everything()
    always(jobs)
    run = Run(elastic(engines, SMALL + 8))
    compactions, pressed, freed = counts(run.engine)
    answers = run(jobs)
    assert all(len(answer) == 300 for answer in answers)
    assert always.preemptions == run.preemptions == 0
    more = counts(run.engine)
    assert more[0] - compactions == more[1] - pressed == len(run.cuts) > 0 and more[2] > freed
    assert len(run.cuts) < len(always.cuts), "what need not be cut is not"


def test_the_furthest_beyond_its_budget_is_cut_first_and_a_reserve_is_freed(engines):
    engine = elastic(engines, SMALL)
    run = Run(engine)
    pool, free_after = engine.pool, []
    plan_relief = engine.scheduler._plan_relief

    def watched():
        rows = plan_relief()
        if rows:
            free_after.append(pool.get_num_free_blocks() + engine.scheduler.block_manager.num_releasable)
        return rows

    engine.scheduler._plan_relief = watched
    try:
        run(jobs_of(600, 250, max_tokens=200))
    finally:
        del engine.scheduler._plan_relief
    decoding = [(row, most) for is_prefilling, row, most in run.cuts if not is_prefilling and row is not None]
    assert decoding
    for row, most in decoding:
        assert row.resident_tokens - BUDGET > most - BLOCK
        assert BUDGET - OPTIONS["interval"] <= row.resident_tokens - row.evicted_tokens < BUDGET
    assert min(free_after) >= int(RESERVE * SMALL)


def test_a_waiting_request_is_let_in_by_cuts(engines):
    engine = elastic(engines, SMALL)
    before = counts(engine)
    engine.add(random_prompt(800, seed=1), max_tokens=200)
    for _ in range(10):
        engine.step()
    assert counts(engine) == before and engine.pool.get_num_free_blocks() < 10, "fewer than a chunk and a budget take"
    engine.add(random_prompt(330, seed=2), max_tokens=20)
    engine.step()
    assert counts(engine) == before and len(engine.scheduler.running) == 1
    engine.step()
    assert counts(engine)[1] == before[1] + 1 and len(engine.scheduler.running) == 2
    assert len(engine.run()) == 2


def test_a_hit_that_leaves_no_page_for_new_tokens_is_cut_short(engines):
    """Pages of a hit that nobody holds are free pages too: 14 of 15 are hit, and the rest of the prompt needs more."""
    engine = elastic(engines, 16)
    prompt = random_prompt(460, seed=5)
    engine.generate([prompt], max_tokens=1)
    engine.add(prompt + random_prompt(440, seed=6), max_tokens=10)
    (output,) = engine.run(max_steps=200).values()
    assert len(output.outputs[0].token_ids) == 10 and output.num_cached_tokens > 0
    engine.assert_idle()


def test_a_prompt_longer_than_the_cache_is_read(engines):
    engine = elastic(engines, 16)  # 480 tokens
    run = Run(engine)
    (answer,) = run(jobs_of(900, max_tokens=30))
    assert len(answer) == 30 and run.preemptions == 0 and any(is_prefilling for is_prefilling, _, _ in run.cuts)


def test_a_request_may_insist_on_its_budget(engines):
    engine = elastic(engines, ROOMY)
    prompt = random_prompt(500, seed=3)
    engine.add(prompt, max_tokens=60, extra_args={"kv_evict": "always"})
    (found,) = engine.run().values()
    always = engines.get(**OPTIONS, num_blocks=ROOMY)
    always.drop_everything()
    (expected,) = always.generate([prompt], max_tokens=60)
    assert list(found.outputs[0].token_ids) == list(expected.outputs[0].token_ids)
    with pytest.raises(VLLMValidationError, match="kv_evict='pressure': this server evicts always"):
        always.add(prompt, extra_args={"kv_evict": "pressure"})
    with pytest.raises(VLLMValidationError, match="kv_evict='never': choose one of always, pressure"):
        engine.add(prompt, extra_args={"kv_evict": "never"})


class ElasticWatch(Watch):
    """Of sequences that may hold any number of tokens."""

    def __call__(self) -> None:
        pages = self.engine.scheduler.block_manager
        limits, pages.limits = pages.limits, {}
        try:
            super().__call__()
        finally:
            pages.limits = limits


@pytest.mark.parametrize(
    "granularity, prefill, seed", [("layer", "chunked", 0), ("page", "chunked", 1), ("layer", "full", 2)]
)
def test_random_load_keeps_every_invariant_and_ends(granularity, prefill, seed, engines):
    rng = random.Random(seed)
    cuts = dict(prefill="full", chunk=None, prefill_interval=None) if prefill == "full" else {}
    engine = engines.get(**{**OPTIONS, **cuts}, num_blocks=SMALL, evict="pressure", granularity=granularity)
    engine.drop_everything()
    prefixes = [random_prompt(length, seed=100 + length) for length in (64, 200, 330)]
    watch, before, added = ElasticWatch(engine), counts(engine), 0
    finished = set()
    for _ in range(200):
        if added < 24 and rng.random() < 0.4:
            prompt = rng.choice([[], *prefixes]) + random_prompt(rng.randint(1, 300), seed=rng.randint(0, 10**6))
            insisting = rng.choice([None, None, {"kv_evict": "always"}, {"kv_budget": 0}, {"kv_budget": 160}])
            engine.add(prompt, max_tokens=rng.randint(1, 150), extra_args=insisting)
            added += 1
        if engine.llm.llm_engine.has_unfinished_requests():
            finished.update(output.request_id for output in engine.step() if output.finished)
        watch()
    finished.update(engine.run(watch))
    assert len(finished) == added and counts(engine)[1] > before[1]
    engine.assert_idle()
