"""Prefix caching stays on and right: a request served from cached pages gives what a cold engine gives."""

import contextlib

import pytest
import torch

from tests.engines import tokens_and_logprobs
from tests.models import random_prompt

OPTIONS = dict(budget=256, window=64, sinks=4, interval=64, num_blocks=256)
SHARED = random_prompt(640, seed=11)
FIRST = SHARED + random_prompt(90, seed=12)
SECOND = SHARED + random_prompt(50, seed=13)
NEW_TOKENS = 120


PREFILLS = {
    "chunked": dict(chunk=256, prefill_interval=64),
    "chunked rarely": dict(chunk=256),
    "full": dict(prefill="full"),
}


@pytest.fixture(
    params=[(prefill, granularity) for prefill in PREFILLS for granularity in ("layer", "page")], ids="-".join
)
def engine(request, engines):
    prefill, granularity = request.param
    engine = engines.get(**OPTIONS, **PREFILLS[prefill], granularity=granularity)
    assert engine.llm.reset_prefix_cache()
    return engine


def generate(engine, prompt, kv_budget=None, max_tokens=NEW_TOKENS):
    (output,) = engine.generate([prompt], max_tokens=max_tokens, kv_budget=kv_budget)
    return output


def cold(engine, prompt, kv_budget=None):
    assert engine.llm.reset_prefix_cache()
    output = generate(engine, prompt, kv_budget)
    assert output.num_cached_tokens == 0
    assert engine.llm.reset_prefix_cache()
    return output


def assert_same(output, expected):
    ids, logprobs = tokens_and_logprobs(output)
    expected_ids, expected_logprobs = tokens_and_logprobs(expected)
    assert ids == expected_ids
    torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected_logprobs), atol=1e-4, rtol=0)


def test_a_request_after_another_with_the_same_prefix(engine):
    expected = cold(engine, SECOND)
    generate(engine, FIRST)
    warm = generate(engine, SECOND)
    assert warm.num_cached_tokens > 0
    assert_same(warm, expected)


def test_a_request_after_one_whose_prompt_ended_within_the_prefix(engine):
    """What its question looked at stands beside the tokens of the shared pages, and is none of this request's
    business.
    """
    expected = cold(engine, SECOND)
    generate(engine, SHARED[:330])
    warm = generate(engine, SECOND)
    assert warm.num_cached_tokens == 320
    assert_same(warm, expected)


def test_the_same_prompt_again_computes_the_queries_that_are_its_question(engine):
    prompt = SHARED[:330]
    expected = cold(engine, prompt)
    generate(engine, prompt)
    warm = generate(engine, prompt)
    uncached = max(1, engine.runner.compression.observed_queries)
    assert warm.num_cached_tokens == (330 - uncached) // 32 * 32
    assert_same(warm, expected)


def test_a_request_while_the_first_one_compacts(engine):
    expected_first, expected_second = cold(engine, FIRST), cold(engine, SECOND)
    ids = {engine.add(FIRST, NEW_TOKENS): expected_first}
    for _ in range(60):
        engine.step()
    assert engine.scheduler.block_manager.evicted
    ids[engine.add(SECOND, NEW_TOKENS)] = expected_second
    finished = engine.run()
    for name, expected in ids.items():
        assert list(finished[name].outputs[0].token_ids) == list(expected.outputs[0].token_ids)
    assert finished[list(ids)[1]].num_cached_tokens > 0


def test_two_requests_with_the_same_prefix_at_once(engine):
    expected = [cold(engine, FIRST), cold(engine, SECOND)]
    outputs = engine.generate([FIRST, SECOND], max_tokens=NEW_TOKENS)
    for output, reference in zip(outputs, expected, strict=True):
        assert_same(output, reference)


def test_an_uncompressed_request_reads_shared_pages_intact(engine):
    """It shares its pages with one that is compacted under its eyes, and comes back for them afterwards."""
    expected = cold(engine, FIRST, kv_budget=0)
    uncompressed = engine.add(FIRST, NEW_TOKENS, kv_budget=0)
    engine.step(), engine.step()
    engine.add(SECOND, NEW_TOKENS)
    finished = engine.run()
    assert list(finished[uncompressed].outputs[0].token_ids) == list(expected.outputs[0].token_ids)
    again = generate(engine, FIRST, kv_budget=0)
    assert again.num_cached_tokens >= 608
    assert_same(again, expected)
    engine.assert_idle()


def test_an_uncompressed_request_finds_only_pages_from_before_the_first_eviction(engine):
    expected = cold(engine, FIRST, kv_budget=0)
    generate(engine, FIRST, kv_budget=200)  # cut after 256 tokens, it later holds more pages than it did then
    again = generate(engine, FIRST, kv_budget=0)
    assert again.num_cached_tokens > 0
    assert_same(again, expected)


def held_at_the_end(engine, prompt, max_tokens=100, **params):
    """The answer, and the keys of all tokens held before the last step, in the order they lie in the cache."""
    name, keys = engine.add(prompt, max_tokens, **params), []

    def look():
        pages, cache = engine.scheduler.block_manager, engine.runner.cache
        for request in engine.scheduler.running:
            blocks = torch.tensor([block.block_id for block in pages.req_to_blocks[request.request_id]])
            held = pages.resident_tokens(request)
            keys[:] = [cache.resident_keys(layer, blocks, held) for layer in range(cache.num_layers)]

    output = engine.run(look)[name]
    engine.assert_idle()
    return output, torch.stack(keys)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(PREFILLS["chunked"], id="layer"),
        pytest.param(PREFILLS["chunked"] | {"granularity": "page"}, id="page"),
        pytest.param(PREFILLS["chunked"] | {"granularity": "head"}, id="head"),
        pytest.param(PREFILLS["chunked rarely"], id="layer-looks-at-every-cut"),
        pytest.param(PREFILLS["chunked"] | {"method": "snapkv"}, id="snapkv"),
        pytest.param(PREFILLS["chunked"] | {"method": "random"}, id="random"),
    ],
)
def test_turn_after_turn_reads_what_is_new_and_says_what_a_cold_engine_says(options, engines):
    engine = engines.get(**OPTIONS, **options)
    pages, observed = engine.scheduler.block_manager, max(1, engine.runner.compression.observed_queries)
    history, read_before = [], 0
    for turn, num_tokens in enumerate((900, 150, 40, 300)):
        prompt = history + random_prompt(num_tokens, seed=20 + turn)
        assert engine.llm.reset_prefix_cache()
        expected, expected_keys = held_at_the_end(engine, prompt)
        assert expected.num_cached_tokens == 0
        # What the last turn left: this prompt's, up to where it was the last prompt's.
        assert engine.llm.reset_prefix_cache()
        if turn:
            held_at_the_end(engine, prompt[:read_before])
        output, keys = held_at_the_end(engine, prompt)
        assert output.num_cached_tokens == min(read_before, len(prompt) - observed) // 32 * 32
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        torch.testing.assert_close(keys, expected_keys, atol=1e-4, rtol=0)
        history, read_before = prompt + list(output.outputs[0].token_ids), len(prompt)
    assert not pages._standings and not pages._planned


@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_two_users_go_on_from_the_same_history_at_once(granularity, engines):
    engine = engines.get(**OPTIONS, **PREFILLS["chunked"], granularity=granularity)
    history = random_prompt(900, seed=31)
    prompts = [history + random_prompt(num_tokens, seed=num_tokens) for num_tokens in (30, 260, 31)]
    expected = [cold(engine, prompt) for prompt in prompts]
    generate(engine, history)
    for output, reference in zip(engine.generate(prompts, max_tokens=NEW_TOKENS), expected, strict=True):
        assert output.num_cached_tokens >= 864 - 32
        assert_same(output, reference)
    for prompt, reference in zip(prompts, expected, strict=True):
        again = generate(engine, prompt)
        assert again.num_cached_tokens >= 864
        assert_same(again, reference)
    engine.assert_idle()


@contextlib.contextmanager
def told_to_say(engine, tokens):
    """The only request that runs says ``tokens``, and then what it wants."""
    sampler, left = engine.runner.sampler, list(tokens)

    def sample(*args, **kwargs):
        output = type(sampler).forward(sampler, *args, **kwargs)
        (request,) = engine.scheduler.running
        if left and not request.is_prefill_chunk:
            output.sampled_token_ids[:] = left.pop(0)
        return output

    sampler.forward = sample
    try:
        yield
    finally:
        del sampler.forward
    assert not left


def assert_goes_on_like_a_session(engine, num_cached: int) -> list[int]:
    """Which decodes the message of the second turn, as if it had said it: no cut falls into the message, and there are
    cuts behind it.

    Args:
        num_cached: of the 959 tokens that are computed in the first turn.

    Returns:
        prompt, answer and message.
    """
    stats = engine.scheduler.compression_stats
    prompt, message = random_prompt(900, seed=41), random_prompt(8, seed=42)
    assert engine.llm.reset_prefix_cache()
    before = stats.resumed_requests
    answer = list(generate(engine, prompt, max_tokens=60).outputs[0].token_ids)
    output, keys = held_at_the_end(engine, [*prompt, *answer, *message], max_tokens=NEW_TOKENS)
    assert output.num_cached_tokens == num_cached and stats.resumed_requests == before + 1
    assert engine.llm.reset_prefix_cache()
    with told_to_say(engine, [*answer, *message]):
        session, session_keys = held_at_the_end(engine, prompt, max_tokens=68 + NEW_TOKENS)
    assert list(output.outputs[0].token_ids) == list(session.outputs[0].token_ids)[68:]
    torch.testing.assert_close(keys, session_keys, atol=1e-4, rtol=0)
    return [*prompt, *answer, *message]


@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_a_resumed_session_is_one_that_never_left_the_engine(granularity, engines):
    options = {"observed": 0} if granularity == "layer" else {}
    engine = engines.get(**OPTIONS, **PREFILLS["chunked"], granularity=granularity, prefix="resume", **options)
    history = assert_goes_on_like_a_session(engine, num_cached=928)
    # Another budget, or another salt, finds nothing.
    resumed = engine.scheduler.compression_stats.resumed_requests
    generate(engine, history[:900], max_tokens=60)
    assert generate(engine, history, kv_budget=250, max_tokens=1).num_cached_tokens == 416
    assert engine.scheduler.compression_stats.resumed_requests == resumed


@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_a_long_cached_prefix_is_cut_where_a_cold_prompt_is(granularity, engines):
    """An uncompressed request cached more than budget and chunk allow: the hit ends before the first cut."""
    engine = engines.get(**OPTIONS, **PREFILLS["chunked rarely"], granularity=granularity)
    expected = cold(engine, SECOND)
    generate(engine, FIRST, kv_budget=0)
    warm = generate(engine, SECOND)
    assert warm.num_cached_tokens == 512 - 32
    assert_same(warm, expected)
