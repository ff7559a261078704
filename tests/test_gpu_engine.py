"""The GPU path from the scheduler to the kernels, on a CPU: model runner V2 and TRITON_ATTN under Triton's interpreter."""

import json
import subprocess
import sys

import pytest
import torch

from tests.engines import tokens_and_logprobs
from tests.models import HEAD_SIZE, NUM_KV_HEADS, NUM_LAYERS, random_prompt

LLM = dict(
    block_size=32, num_gpu_blocks_override=32, kv_cache_memory_bytes=1 << 26, max_model_len=512, max_num_batched_tokens=128
)
EVICTING = dict(budget=96, window=24, sinks=4, interval=32, chunk=64)
PAGES = dict(EVICTING, budget=128, granularity="page")
STATIC = dict(EVICTING, granularity="head", filter="static")
LONG = random_prompt(150, seed=1)
# Two at once, both evict; then one that begins like the first.
BATCHES = [
    [dict(prompt=LONG, max_tokens=12), dict(prompt=random_prompt(100, seed=2), max_tokens=12)],
    [dict(prompt=LONG[:96] + random_prompt(30, seed=3), max_tokens=8)],
]
# The last two hold the first two pages in common, and take out the second one in the same step, at their first token.
SHARING = dict(EVICTING, window=48)
SHARED_PREFIX = [
    [dict(prompt=LONG[:64] + random_prompt(63, seed=seed), max_tokens=max_tokens) for seed in seeds]
    for max_tokens, seeds in ((1, (7,)), (4, (8, 9)))
]
SHORT = [dict(prompt=random_prompt(140, seed=4), max_tokens=3), dict(prompt=random_prompt(20, seed=5), max_tokens=5)]
# Eleven pages: too few when the last one has evicted down to three, and the others come to want a third each.
CROWD = [dict(prompt=random_prompt(length, seed=length), max_tokens=8) for length in (60, 61, 62, 150)]
CALIBRATION = [random_prompt(40, seed=6)]


@pytest.fixture(scope="module")
def runs(tiny_model, tiny_filters):
    wanted = [
        dict(compression=None, llm=LLM, requests=SHORT),
        dict(compression=dict(budget=256, chunk=64, interval=32), llm=LLM, requests=SHORT),
        dict(compression=EVICTING, llm=dict(LLM, async_scheduling=True), requests=BATCHES, calibration=CALIBRATION),
        dict(compression=STATIC, llm=dict(LLM, num_gpu_blocks_override=12), requests=CROWD),
        dict(compression=PAGES, llm=LLM, requests=BATCHES),
        dict(compression=SHARING, llm=LLM, requests=SHARED_PREFIX),
    ]
    job = dict(model=str(tiny_model), filters=str(tiny_filters[0]), runs=wanted)
    command = [sys.executable, "-m", "tests.interpreted_engine"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    results = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))  # the rest is vLLM's log
    assert {result["runner"] for result in results} == {"vllm.v1.worker.gpu.model_runner"}
    return results


def test_budget_above_length_is_bit_identical_to_plain_vllm(runs):
    plain, compressed, *_ = runs
    assert compressed["outputs"] == plain["outputs"]
    assert compressed["compactions"] == 0


def assert_like_v1(engine, batches, result):
    assert engine.llm.reset_prefix_cache()
    engine.llm.collective_rpc("record_kept_tokens")
    expected = [output for batch in batches for output in generate(engine, batch)]
    (rank,) = engine.llm.collective_rpc("take_kept_tokens")
    assert sorted(result["kept"]) == sorted([end, mask.hex()] for end, mask in rank["requests"].values())
    assert len(result["outputs"]) == len(expected)
    for found, output in zip(result["outputs"], expected, strict=True):
        ids, logprobs = tokens_and_logprobs(output)
        assert found["token_ids"] == ids
        torch.testing.assert_close(torch.tensor(found["logprobs"]), torch.tensor(logprobs), atol=1e-3, rtol=0)
        assert found["cached_tokens"] == output.num_cached_tokens


def generate(engine, batch):
    (max_tokens,) = {request["max_tokens"] for request in batch}
    return engine.generate([request["prompt"] for request in batch], max_tokens=max_tokens)


def test_evicts_what_the_cpu_path_evicts(runs, engines):
    """Under async scheduling, two sequences at once, and one that begins with pages from the prefix cache."""
    result = runs[2]
    assert result["async_scheduling"]
    assert result["compactions"] >= 5 and result["evicted_tokens"] >= 5 * 32 and result["freed_pages"] >= 5
    assert [output["cached_tokens"] > 0 for output in result["outputs"]] == [False, False, True]
    assert_like_v1(engines.get(num_blocks=32, max_model_len=512, max_batched=128, **EVICTING), BATCHES, result)


def test_a_preempted_sequence_starts_again_with_nothing_evicted(runs, engines):
    """With the filters of the paper, scored as keys are written; heads select for themselves."""
    result = runs[3]
    assert result["preemptions"] > 0 and result["evicted_tokens"] >= 3 * 32
    assert_like_v1(engines.get(num_blocks=12, max_model_len=512, max_batched=128, **STATIC), [CROWD], result)


def test_frees_the_pages_the_cpu_path_frees(runs, engines):
    result = runs[4]
    assert result["evicted_tokens"] >= 3 * 32
    assert_like_v1(engines.get(num_blocks=32, max_model_len=512, max_batched=128, **PAGES), BATCHES, result)


def test_two_sequences_that_take_out_the_same_page_at_once(runs, engines):
    """What each one's queries observe there moves with its own survivors: later evictions go by it."""
    result = runs[5]
    assert result["compactions"] >= 4 and [output["cached_tokens"] for output in result["outputs"]] == [0, 64, 64]
    assert_like_v1(engines.get(num_blocks=32, max_model_len=512, max_batched=128, **SHARING), SHARED_PREFIX, result)


def test_calibrates_what_the_cpu_path_calibrates(runs, engines):
    engine = engines.get(num_blocks=32, max_model_len=512, max_batched=128, **EVICTING)
    assert engine.llm.reset_prefix_cache()
    expected = engine.runner.calibrate_filters(CALIBRATION, "test")
    found = torch.tensor(runs[2]["filters"])
    assert found.shape == (NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE)
    torch.testing.assert_close(found, expected.filters, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        torch.tensor(runs[2]["query_mean_before_rope"]), expected.query_mean_before_rope, atol=1e-3, rtol=1e-3
    )
