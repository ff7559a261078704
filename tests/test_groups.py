"""Models whose layers have several KV cache groups: one is compressed, the others are as vLLM has them."""

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from tests.engines import BLOCK, tokens_and_logprobs
from tests.models import SLIDING_WINDOW, random_prompt
from vllm_qfilters.budget import cdiv

OPTIONS = dict(budget=256, window=0.1, sinks=4, interval=32, chunk=256, prefill_interval=64)


def held_by_group(engine, request_id) -> list[int]:
    """Pages of a request, those of the compressed group first."""
    manager = engine.scheduler.block_manager
    return [
        sum(not block.is_null for block in blocks)
        for blocks in manager._blocks_by_group(request_id_of(engine, request_id)).values()
    ]


def request_id_of(engine, request_id: str) -> str:
    (found,) = [known for known in engine.scheduler.requests if known.startswith(request_id)]
    return found


def answers(engine, prompts, **params) -> list:
    return [tokens_and_logprobs(output) for output in engine.generate(prompts, **params)]


def assert_close(found, expected) -> None:
    for (ids, logprobs), (expected_ids, expected_logprobs) in zip(found, expected, strict=True):
        assert ids == expected_ids
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected_logprobs), atol=2e-4, rtol=0)


@pytest.fixture
def engine(exaone_engines):
    engine = exaone_engines.get(**OPTIONS)
    engine.drop_everything()
    # What pages held for others must not matter: bytes of all groups lie in the same memory.
    for layer in engine.runner.layers:
        layer.kv_cache.untyped_storage().fill_(0x45)  # a large number
    return engine


def test_windows_hold_no_more_than_they_reach(engine):
    request_id = engine.add(random_prompt(900, seed=1), max_tokens=100)
    held = []
    engine.run(on_step=lambda: engine.scheduler.requests and held.append(held_by_group(engine, request_id)))
    compressed, *windows = zip(*held, strict=True)
    assert len(windows) == 2 and max(compressed) == cdiv(256 + 256, BLOCK)
    policy = engine.runner.compression
    for of_window in windows:
        assert max(of_window) <= policy.beside.pages(1000, 512, BLOCK) // 2
        assert max(of_window[-90:]) <= cdiv(SLIDING_WINDOW - 1, BLOCK) + 1
    engine.assert_idle()


def test_turn_after_turn_reads_what_is_new_and_says_what_a_cold_engine_says(engine):
    history, cached = random_prompt(1300, seed=2), []
    for turn in range(3):
        (output,) = engine.generate([history], max_tokens=20)
        cached.append(output.num_cached_tokens)
        warm = tokens_and_logprobs(output)
        history = history + warm[0] + random_prompt(150, seed=10 + turn)
        assert engine.llm.reset_prefix_cache() if turn == 2 else True
    assert cached[0] == 0 and 1000 < cached[1] < cached[2]
    cold = answers(engine, [history[: len(history) - 150 - 20]], max_tokens=20)
    assert_close([warm], cold)
    assert engine.scheduler.compression_stats.prefix_hits >= 2
    engine.assert_idle()


def test_what_was_computed_beside_a_compressed_context_serves_no_other_limits(engine):
    """Nor do windows that an uncompressed request left behind a cut serve a compressed one."""
    prompt = random_prompt(1000, seed=3)
    cold = {}
    for kv_budget in (None, 0, 320):
        assert engine.llm.reset_prefix_cache()
        cold[kv_budget] = answers(engine, [prompt], max_tokens=20, kv_budget=kv_budget)
    assert engine.llm.reset_prefix_cache()
    for kv_budget in (None, 0, 320, None, 0):
        assert_close(answers(engine, [prompt], max_tokens=20, kv_budget=kv_budget), cold[kv_budget])
    engine.assert_idle()


@pytest.mark.parametrize("evict", ["always", "pressure"])
def test_requests_that_preempt_each_other_end_as_alone(evict, exaone_engines):
    options = OPTIONS if evict == "always" else {**OPTIONS, "evict": evict}
    engine = exaone_engines.get(num_blocks=40, max_model_len=1024, max_batched=128, **options)
    prompts = [random_prompt(length, seed=length) for length in (700, 300, 500, 90, 450)]
    together = answers(engine, prompts, max_tokens=80)
    engine.assert_idle()
    if evict == "always":
        assert engine.llm.reset_prefix_cache()
        alone = [answers(engine, [prompt], max_tokens=80)[0] for prompt in prompts]
        assert_close(together, alone)
    else:
        assert engine.scheduler.compression_stats.pressure_compactions > 0
    assert [len(ids) for ids, _ in together] == [80] * 5


def test_what_can_never_fit_is_refused_by_the_pages_of_all_groups(exaone_engines):
    engine = exaone_engines.get(num_blocks=40, max_model_len=1024, max_batched=128, **OPTIONS)
    with pytest.raises(VLLMValidationError, match=r"900 tokens \(4\d pages\), the whole KV cache has 39 pages"):
        engine.add(random_prompt(800, seed=1), max_tokens=100, kv_budget=0)
    engine.generate([random_prompt(400, seed=1)], max_tokens=60, kv_budget=0)
    engine.assert_idle()
