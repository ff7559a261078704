"""Contexts longer than the cache: the startup check, admission and the log agree on what fits."""

import pytest
from vllm.exceptions import VLLMValidationError

from tests.models import random_prompt

CACHE = dict(num_blocks=129, max_model_len=65536)  # 128 usable pages of 32 tokens: 4,096 tokens for 65,536 positions
OPTIONS = dict(budget=1024, window=256, sinks=4, interval=128, chunk=2048)


def test_64k_positions_in_a_cache_of_4k_tokens(engines):
    engine = engines.get(**CACHE, **OPTIONS, max_batched=2048)
    prompt = random_prompt(64_500, seed=21)
    engine.add(prompt, max_tokens=500)
    most_held = 0

    def look():
        nonlocal most_held
        most_held = max([most_held, *(len(blocks) for blocks in engine.scheduler.block_manager.req_to_blocks.values())])

    (output,) = engine.run(look).values()
    assert len(output.outputs[0].token_ids) == 500
    assert most_held == (1024 + 2048) // 32
    engine.assert_idle()


def test_what_can_never_fit_is_refused_at_the_door_and_others_go_on(engines):
    engine = engines.get(**CACHE, **OPTIONS, max_batched=2048)
    running = engine.add(random_prompt(100, seed=22), max_tokens=50)
    for prompt_tokens, max_tokens, kv_budget in ((6_000, 10, 0), (100, 6_000, 0), (6_000, 10, 4_000)):
        with pytest.raises(VLLMValidationError, match="the whole KV cache has 128 pages"):
            engine.add(random_prompt(prompt_tokens, seed=23), max_tokens=max_tokens, kv_budget=kv_budget)
    engine.add(random_prompt(2_000, seed=24), max_tokens=20, kv_budget=0)  # uncompressed, but it fits
    assert running in engine.run()
    engine.assert_idle()


@pytest.mark.parametrize("options", [dict(prefill="full"), dict(scope="decode"), dict(budget=1.0, chunk=2048)], ids=str)
def test_configurations_that_hold_whole_prompts_are_refused_for_such_a_cache(options, engines):
    usual = {name: value for name, value in OPTIONS.items() if name != "chunk"}
    with pytest.raises(ValueError, match="KV cache is needed, which is larger than the available"):
        engines.get(**CACHE, **{**usual, **options}, max_batched=2048)
