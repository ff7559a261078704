"""MLA (DeepSeek-V3): the cache holds one key per token, a part of which is its value, and which all heads share.

vLLM's CPU_MLA computes in float32, so that it can be compared; AMX_MLA is what CPUs with AMX serve with, in bfloat16.
"""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import models
from tests.engines import Engines, tokens_and_logprobs
from tests.models import random_prompt
from tests.oracle import teacher_forced_logprobs
from tests.run_engine import run_engines
from tests.test_groups import answers, assert_close
from tests.test_oracle import assert_calibrates_like_hugging_face, assert_like_hugging_face, make_rule
from tests.test_prefix_cache import assert_goes_on_like_a_session
from vllm_qfilters.commands.inspection.command import inspect

BLOCK = 16  # tokens per page, which vLLM's CPU_MLA takes and no other number
OPTIONS = dict(budget=256, sinks=4, interval=32, chunk=256)
CASES = {
    "streaming": dict(method="streaming", window=0),
    "streaming-page": dict(method="streaming", window=0, granularity="page"),
    "random": dict(method="random", window=32, prefill_interval=64),
    "keydiff": dict(method="keydiff", window=0.1),
    "keydiff-full": dict(method="keydiff", window=45, prefill="full"),
    "expected": dict(window=0.1, rank=0),
    "expected-cut-often": dict(window=32, rank=0, prefill_interval=64),
    "static": dict(window=32, filter="static"),
    "static-page": dict(window=32, filter="static", granularity="page"),
    "keydiff-head": dict(method="keydiff", window=45, granularity="head", scope="decode", budget=96, interval=16),
}


@pytest.fixture(scope="module")
def engines(tiny_deepseek, deepseek_filters):
    return Engines(tiny_deepseek, deepseek_filters[0], attention_backend="CPU_MLA")


@pytest.fixture(scope="module")
def hf_model(tiny_deepseek):
    return AutoModelForCausalLM.from_pretrained(tiny_deepseek, dtype=torch.float32, attn_implementation="eager").eval()


def options_of(case: str) -> dict:
    options = {**OPTIONS, **CASES[case]}
    if "prefill" in options or "scope" in options:
        del options["chunk"]
    return options


@pytest.mark.parametrize("case", CASES)
def test_engine_matches_hugging_face_with_the_same_rule(case, engines, deepseek_filters, hf_model):
    options = options_of(case)
    rule = dataclasses.replace(make_rule(options), block=BLOCK)
    if rule.method != "qfilters":
        rule = dataclasses.replace(rule, observed=0)
    filters = deepseek_filters[1]
    assert_like_hugging_face(engines.get(**options), hf_model, filters, rule, prompt_tokens=700, new_tokens=150)


def test_calibration_sees_queries_as_they_attend_to_latents(engines, hf_model):
    engine = engines.get(**options_of("expected"))
    assert [rotation.partner[: models.LATENT].tolist() for rotation in engine.runner.rotations()] == [
        [*range(models.LATENT)]
    ] * models.NUM_LAYERS
    assert not any(rotation.is_identity for rotation in engine.runner.rotations())
    assert_calibrates_like_hugging_face(engine, hf_model, lengths=(40, 30))


TURNS = {
    "keydiff": dict(OPTIONS, method="keydiff", window=32, prefill_interval=64),
    "expected": dict(OPTIONS, window=32, prefill_interval=64, rank=0),
}


@pytest.mark.parametrize("method", TURNS)
def test_turn_after_turn_reads_what_is_new_and_says_what_a_cold_engine_says(method, deepseek_engines):
    engine = deepseek_engines.get(**TURNS[method])
    history, cached = random_prompt(900, seed=2), []
    for turn in range(3):
        (output,) = engine.generate([history], max_tokens=20)
        cached.append(output.num_cached_tokens)
        warm, asked = tokens_and_logprobs(output), history
        history = history + warm[0] + random_prompt(150, seed=10 + turn)
    assert cached[0] == 0 and 600 < cached[1] < cached[2]
    assert engine.scheduler.compression_stats.prefix_hits >= 2
    assert engine.llm.reset_prefix_cache()
    assert_close([warm], answers(engine, [asked], max_tokens=20))
    engine.assert_idle()


def test_a_resumed_session_is_one_that_never_left_the_engine(deepseek_engines):
    engine = deepseek_engines.get(**TURNS["expected"], observed=0, prefix="resume")
    assert_goes_on_like_a_session(engine, num_cached=944)


def test_requests_that_preempt_each_other_end_as_alone(deepseek_engines, monkeypatch):
    """They come to hold their budgets, for which there is no room together, and evict."""
    engine = deepseek_engines.get(num_blocks=40, max_model_len=1024, max_batched=128, **TURNS["expected"])
    prompts = [random_prompt(length, seed=length) for length in (110, 100, 120, 90, 130)]
    preempt, preempted = engine.scheduler._preempt_request, []

    def see(request, *args, **kwargs):
        preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", see)
    together = answers(engine, prompts, max_tokens=220)
    assert preempted and engine.scheduler.compression_stats.compactions >= 5
    engine.assert_idle()
    assert engine.llm.reset_prefix_cache()
    assert_close(together, [answers(engine, [prompt], max_tokens=220)[0] for prompt in prompts])


needs_amx = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="the CPU has no AMX")


@pytest.fixture(scope="module")
def amx_engines(tiny_deepseek, deepseek_filters):
    return Engines(tiny_deepseek, deepseek_filters[0], attention_backend="AMX_MLA", dtype="bfloat16")


@needs_amx
@pytest.mark.parametrize(("options", "share"), [({"observed": 0}, 0.9), ({}, 0.6)], ids=str)
def test_amx_keeps_what_the_attention_in_float32_keeps(options, share, amx_engines, deepseek_engines):
    """But for tokens that score alike in bfloat16, as many do where random queries are observed: CPU_MLA in bfloat16
    keeps no more of them. By chance a third would be the same.

    As many stay with pages of 32 tokens, of which AMX_MLA has a multiple, as with those of CPU_MLA.
    """
    prompt, options = random_prompt(916, seed=1), {**TURNS["expected"], **options}
    found, expected = (
        inspect(each.get(**options).llm, prompt, max_tokens=2) for each in (amx_engines, deepseek_engines)
    )
    assert found.kept.shape == expected.kept.shape and found.evicted_tokens == expected.evicted_tokens > 600
    assert (found.kept & expected.kept).sum() > share * expected.kept.sum()


@needs_amx
def test_amx_answers_from_what_it_keeps(amx_engines, hf_model):
    """In bfloat16; what another rule keeps gives another answer."""
    options = options_of("random")
    rule, prompt = dataclasses.replace(make_rule(options), observed=0), random_prompt(700, seed=1)
    ids, logprobs = tokens_and_logprobs(amx_engines.get(**options).generate([prompt], max_tokens=100)[0])
    right, wrong = (
        torch.tensor(teacher_forced_logprobs(hf_model, prompt, ids, None, each)[0]).sub(torch.tensor(logprobs)).abs()
        for each in (rule, dataclasses.replace(rule, sinks=rule.sinks + 1))
    )
    assert right.mean() < 0.25 * wrong.mean()


REQUESTS = [
    dict(prompt=random_prompt(length, seed=length), max_tokens=tokens, prompt_logprobs=logprobs)
    for length, tokens, logprobs in ((700, 60, 0), (17, 90, None), (300, 60, None))
]


@pytest.mark.parametrize(
    ("backend", "dtype"), [("CPU_MLA", "float32"), pytest.param("AMX_MLA", "bfloat16", marks=needs_amx)]
)
def test_budget_above_length_is_bit_identical_to_plain_vllm(backend, dtype, tiny_deepseek, deepseek_filters):
    llm = dict(
        attention_backend=backend, dtype=dtype, skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 28,
        num_gpu_blocks_override=128, max_model_len=1024, max_num_batched_tokens=256, block_size=32,
    )  # fmt: skip
    compression = dict(budget=960, filters=str(deepseek_filters[0]))
    plain, compressed = run_engines(tiny_deepseek, REQUESTS, [None, compression], **llm)
    assert compressed == plain
