"""Step tables: tokens and pages a sequence holds after every step, on both sides of the process boundary."""

import itertools

from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from tests.engines import BLOCK
from tests.models import random_prompt

OPTIONS = dict(budget=128, window=32, sinks=4, interval=32, chunk=128, num_blocks=64)

# (computed, resident, pages) after each step of a 300-token prompt and 70 generated tokens; a page holds 32 tokens.
TABLE = [
    (256, 256, 8),  # no cut at 128: the budget was not exceeded; chunks end at cuts, 256 is the first
    (300, 172, 6),  # cut to 128, then the rest of the prompt
    (301, 109, 4),  # 172 + 1 > 128: two whole pages go, 108 stay, and the new token
    *[(301 + n, 109 + n, 4) for n in range(1, 20)],
    (321, 97, 4),  # 128 held, the next token would be one too many: `interval` go
    *[(321 + n, 97 + n, 4) for n in range(1, 32)],
    (353, 97, 4),
    *[(353 + n, 97 + n, 4) for n in range(1, 17)],
]


def test_step_table_of_one_request(engines):
    engine = engines.get(**OPTIONS)
    pages, pool = engine.scheduler.block_manager, engine.pool
    free_at_start = pool.get_num_free_blocks()
    engine.add(random_prompt(300, seed=3), max_tokens=70)
    seen = []

    def look():
        for request in engine.scheduler.running:
            held = len(pages.req_to_blocks[request.request_id])
            resident = pages.resident_tokens(request)
            seen.append((request.num_computed_tokens, resident, held))
            assert pool.get_num_free_blocks() == free_at_start - held
            assert attended[0] == resident, "worker and scheduler disagree"
            assert engine.runner.input_batch.block_table[0].num_blocks_per_row[0] == held

    with engine.attended_lengths() as attended:
        finished = engine.run(look)
    assert seen == TABLE[: len(seen)] and len(seen) >= len(TABLE) - 1
    (output,) = finished.values()
    assert len(output.outputs[0].token_ids) == 70
    engine.assert_idle()


def test_pages_freed_by_one_request_serve_another_in_the_same_step(engines):
    """The cache has room for the second request only if the first one's pages are free before that step is
    scheduled.
    """
    engine = engines.get(**dict(OPTIONS, num_blocks=13))  # 12 usable pages
    first = random_prompt(257, seed=4)  # holds 8 pages at its cut, then 4 + 1
    engine.add(first, max_tokens=20)
    engine.step()
    assert engine.pool.get_num_free_blocks() == 4
    engine.add(random_prompt(200, seed=5), max_tokens=20)  # needs 7 pages
    engine.step()
    assert len(engine.scheduler.running) == 2
    engine.run()
    engine.assert_idle()


def test_per_request_budgets_in_one_batch(engines):
    engine = engines.get(**OPTIONS)
    budgets = {None: 128, 96: 96, 256: 256, 0.5: 150, 0: None}
    prompt = random_prompt(300, seed=6)
    ids = {engine.add(prompt, max_tokens=60, kv_budget=key): limit for key, limit in budgets.items()}
    largest = dict.fromkeys(ids, 0)

    def look():
        for request in engine.scheduler.running:
            if request.num_computed_tokens > request.num_prompt_tokens:
                name = request.request_id.rpartition("-")[0]  # vLLM appends a random suffix
                largest[name] = max(largest[name], engine.scheduler.block_manager.resident_tokens(request))

    together = engine.run(look)
    for (name, limit), kv_budget in zip(ids.items(), budgets):
        assert largest[name] == (limit or 358), (name, largest)  # off: all but the last token
        (alone,) = engine.generate([prompt], max_tokens=60, kv_budget=kv_budget)
        assert together[name].outputs[0].token_ids == alone.outputs[0].token_ids, (
            f"{kv_budget}: neighbours change the answer"
        )
    engine.assert_idle()


def test_full_prefill_holds_the_whole_prompt_and_then_the_budget(engines):
    engine = engines.get(budget=128, window=32, sinks=4, interval=32, prefill="full", num_blocks=64, max_model_len=1024)
    engine.add(random_prompt(700, seed=7), max_tokens=40)
    held = []
    engine.run(lambda: held.extend(engine.scheduler.block_manager.resident_tokens(r) for r in engine.scheduler.running))
    assert max(held) == 700 and max(held[3:]) <= 128
    assert BLOCK * len(engine.pool.blocks) > 700
    engine.assert_idle()


def test_abort_returns_every_page(engines):
    engine = engines.get(**OPTIONS)
    for seed in range(4):
        engine.add(random_prompt(400, seed=seed), max_tokens=500)
    for _ in range(30):
        engine.step()
    assert engine.scheduler.block_manager.evicted
    engine.llm.llm_engine.abort_request([request.request_id for request in engine.scheduler.running], internal=True)
    engine.run()
    engine.assert_idle()


def test_a_seed_survives_a_prompt_read_in_chunks(engines):
    """Plain vLLM 0.32 dies of it on a CPU: it rewinds generators that cannot be rewound."""
    engine = engines.get(**OPTIONS)
    prompt = random_prompt(500, seed=8)

    def sample(seed):
        assert engine.llm.reset_prefix_cache()
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=40, ignore_eos=True, detokenize=False)
        (output,) = engine.llm.generate([TokensPrompt(prompt_token_ids=prompt)], params, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    first = sample(7)
    assert sample(7) == first
    assert sample(8) != first


def test_more_queries_are_observed_than_tokens_are_held(engines):
    """The prompt's last 64 queries are kept; when its end is cut, 32 tokens up to them are left."""
    engine = engines.get(budget=40, window=0, sinks=4, interval=32, chunk=64, observed=64)
    scores = []
    method = engine.runner.compactor.method
    method.scores = lambda *arguments: scores.append(type(method).scores(method, *arguments)) or scores[-1]
    engine.add(random_prompt(130, seed=9), max_tokens=80)
    engine.run()
    del method.scores
    assert len(scores) >= 3 and all(bool(found.isfinite().all()) for found in scores)
    engine.assert_idle()


def test_a_budget_that_no_front_end_refused_ends_no_engine(engines, monkeypatch):
    """vLLM's front end in Rust runs no plugin: the request gets the server's own budget, and the log says so."""
    engine = engines.get(**OPTIONS)
    monkeypatch.setattr("vllm_qfilters.frontend.compat.check_request", lambda *arguments: None)
    errors = []
    monkeypatch.setattr("vllm_qfilters.core.scheduler.logger.error", lambda text, *values: errors.append(text % values))
    prompt = random_prompt(300, seed=3)
    for wrong in ({"kv_budget": "256"}, {"kv_budget": -1}, {"kv_evict": "never"}):
        engine.add(prompt, max_tokens=70, extra_args=wrong)
    answers = [list(output.outputs[0].token_ids) for output in engine.run().values()]
    (expected,) = engine.generate([prompt], max_tokens=70)
    assert answers == 3 * [list(expected.outputs[0].token_ids)]
    assert len(errors) == 3 and "gets the server's own budget: kv_budget='256': give tokens" in errors[0]
    engine.assert_idle()


def test_steps_that_hold_prompts_back_change_nothing(engines, monkeypatch):
    """vLLM's --prefill-schedule-interval, which from 0.33 on also works on a single engine: prompts wait at cuts."""
    engine = engines.get(**OPTIONS)
    schedule, steps = engine.scheduler.schedule, itertools.count()

    def run(interval):
        assert engine.llm.reset_prefix_cache()
        stats, first_step = engine.scheduler.compression_stats, next(steps)
        before = stats.compactions, stats.evicted_tokens
        monkeypatch.setattr(engine.scheduler, "schedule", lambda *_: schedule(next(steps) % interval != 0))
        requests = [engine.add(random_prompt(20, seed=9), max_tokens=40)]
        engine.step()
        requests.append(engine.add(random_prompt(700, seed=10), max_tokens=80))
        finished = engine.run()
        tokens = [finished[request].outputs[0].token_ids for request in requests]
        counts = stats.compactions - before[0], stats.evicted_tokens - before[1]
        return tokens, counts, next(steps) - first_step

    tokens, counts, num_steps = run(1)
    held_back, counts_held_back, more_steps = run(4)
    assert counts[0] > 4 and more_steps > num_steps
    assert (held_back, counts_held_back) == (tokens, counts)
    engine.assert_idle()
