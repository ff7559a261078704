"""M-RoPE with prompts of text: the components of a position are equal, and it is RoPE."""

import functools

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests import models
from tests.engines import TEXT_ONLY, Engine, Engines, tokens_and_logprobs
from tests.models import random_prompt
from tests.oracle import TextModel
from tests.test_architectures import options_of
from tests.test_oracle import assert_calibrates_like_hugging_face, assert_like_hugging_face, make_rule

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def family(tmp_path_factory, tiny_qwen_vl, qwen_vl_filters, qwen_vl_engines):
    """By name: (folder, Engines, Filters, Hugging Face's model)"""

    @functools.cache
    def get(name: str):
        folder, (path, filters), engines = tiny_qwen_vl, qwen_vl_filters, qwen_vl_engines
        if name == "qwen3_vl":
            folder = models.make_tiny_qwen3_vl(tmp_path_factory.mktemp(name))
            path = tmp_path_factory.mktemp("filters") / f"{name}.safetensors"
            filters = models.make_tiny_filters(path, model=folder)
            engines = Engines(folder, path, **TEXT_ONLY)
        hf_model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        return folder, engines, filters, TextModel(hf_model)

    return get


@pytest.mark.parametrize(
    "name, case",
    [("qwen2_5_vl", "expected-layer"), ("qwen2_5_vl", "rotary-cut-often"), ("qwen3_vl", "expected-head-covariance")],
)
def test_engine_matches_hugging_face_with_the_same_rule(name, case, family):
    """Two requests at once."""
    _, engines, filters, hf_model = family(name)
    options = options_of(case)
    assert_like_hugging_face(
        engines.get(**options), hf_model, filters, make_rule(options), prompt_tokens=900, new_tokens=200
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_calibration_sees_how_queries_turn(name, family):
    _, engines, _, hf_model = family(name)
    engine = engines.get(**options_of("expected-head-covariance" if name == "qwen3_vl" else "expected-layer"))
    assert engine.runner.uses_mrope and not any(rotation.is_identity for rotation in engine.runner.rotations())
    assert_calibrates_like_hugging_face(engine, hf_model)


@pytest.mark.parametrize("name", FAMILIES)
def test_budget_above_length_is_bit_identical_to_plain_vllm(name, family):
    folder, engines, _, _ = family(name)
    prompts = [random_prompt(300, seed=1), random_prompt(45, seed=2)]
    plain = Engine(folder, 128, 1024, 256, {}, **TEXT_ONLY)
    compressed = engines.get(num_blocks=128, max_model_len=1024, max_batched=256, budget=768, chunk=128)
    answers = [
        [tokens_and_logprobs(output) for output in engine.generate(prompts, max_tokens=60)]
        for engine in (plain, compressed)
    ]
    assert answers[0] == answers[1]


def test_preempted_sequences_and_reused_prefixes_answer_as_alone(family):
    """Of three sequences that all outgrow their budgets, two fit once each wants its eighth page."""
    _, engines, _, _ = family("qwen2_5_vl")
    engine = engines.get(**dict(options_of("expected-layer"), num_blocks=23, max_model_len=1024, max_batched=256))
    prompts = [random_prompt(200, seed=seed) for seed in (4, 5, 6)]
    alone = []
    for prompt in prompts:
        alone += engine.generate([prompt], max_tokens=120)
        (again,) = engine.generate([prompt], max_tokens=120)
        assert again.num_cached_tokens == 160, "whole pages before the last 32 queries, which are observed"
        assert_same_answer(again, alone[-1])
        assert engine.llm.reset_prefix_cache()
    preempted, preempt = [], engine.scheduler._preempt_request
    engine.scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(1), preempt(*args, **kwargs))[1]
    try:
        together = engine.generate(prompts, max_tokens=120)
    finally:
        del engine.scheduler._preempt_request
    assert preempted
    for found, expected in zip(together, alone):
        assert_same_answer(found, expected)
    engine.assert_idle()


def assert_same_answer(found, expected) -> None:
    (ids, logprobs), (expected_ids, expected_logprobs) = tokens_and_logprobs(found), tokens_and_logprobs(expected)
    assert ids == expected_ids
    torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected_logprobs), atol=2e-4, rtol=0)
