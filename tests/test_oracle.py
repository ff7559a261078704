"""The engine against Hugging Face with the same eviction rule, token by token."""

import dataclasses

import pytest
import torch

from tests.engines import BLOCK, tokens_and_logprobs
from tests.marks import needs_fp8_caches
from tests.models import layer_names, random_prompt, tiny_identity
from tests.oracle import (
    Rule,
    attending_to,
    attends,
    hook_queries,
    in_order_of,
    joined,
    rotate,
    teacher_forced_logprobs,
    with_caches,
)
from vllm_qfilters.filters.bank import query_factors
from vllm_qfilters.filters.format import HORIZON, STORED_RANK, save

CASES = {
    # id: (configuration, prompt length, generated tokens)
    "chunked-layer": (dict(budget=256, window=64, sinks=4, interval=32, chunk=256), 900, 300),
    "chunked-head": (dict(budget=256, window=64, sinks=4, interval=64, chunk=256, granularity="head"), 900, 300),
    "chunked-odd-window": (dict(budget=250, window=45, sinks=7, interval=32, chunk=128, granularity="head"), 700, 300),
    "cut-often": (dict(budget=256, window=64, sinks=4, interval=32, chunk=256, prefill_interval=64), 900, 200),
    "no-sinks": (dict(budget=192, window=32, sinks=0, interval=32, chunk=256), 500, 200),
    "prompt-below-budget": (dict(budget=256, window=0.5, sinks=4, interval=64, chunk=256), 100, 400),
    "prompt-ends-at-a-cut": (dict(budget=256, window=64, sinks=4, interval=32, chunk=256), 768, 100),
    "full": (dict(budget=256, window=64, sinks=4, interval=64, prefill="full"), 900, 200),
    "scope-decode": (dict(budget=128, window=32, sinks=4, interval=32, scope="decode", granularity="head"), 300, 400),
    "few-tokens-between-sinks-and-window": (dict(budget=128, window=70, sinks=4, interval=32, chunk=128), 400, 200),
    "scope-decode-ends-a-prompt-inside-a-page": (
        dict(budget=128, window=90, sinks=4, interval=32, scope="decode"),
        300,
        250,
    ),
    "expected-head": (
        dict(budget=256, window=64, sinks=4, interval=32, chunk=256, granularity="head", observed=0, rank=0),
        900,
        200,
    ),
    "expected-covariance": (
        dict(budget=256, window=64, sinks=4, interval=64, chunk=256, granularity="head", observed=0, rank=32),
        900,
        200,
    ),
    "expected-observed": (
        dict(budget=256, window=64, sinks=4, interval=32, chunk=256, granularity="head", rank=0),
        900,
        200,
    ),
    "expected-observed-layer-full": (
        dict(budget=250, window=45, sinks=7, interval=32, prefill="full", rank=32),
        700,
        200,
    ),
    "expected-observed-cut-often": (
        dict(budget=250, window=45, sinks=4, interval=32, chunk=256, prefill_interval=96, rank=0),
        900,
        200,
    ),
    "expected-observed-below-budget": (
        dict(budget=256, window=0.25, sinks=4, interval=64, chunk=256, granularity="head", rank=0),
        100,
        400,
    ),
    "rotary": (
        dict(budget=256, window=64, sinks=4, interval=64, chunk=256, granularity="head", filter="rotary"),
        700,
        200,
    ),
    "rotary-fp8": (
        dict(budget=256, window=64, sinks=4, interval=32, chunk=256, filter="rotary", kv_cache_dtype="fp8"),
        700,
        200,
    ),
    "streaming": (dict(method="streaming", budget=192, sinks=4, interval=64, chunk=256, window=0), 700, 150),
    "prompt-share": (
        dict(budget=256, window=45, sinks=4, interval=64, chunk=256, granularity="head", prompt_share=0.4),
        900,
        400,
    ),
    "expected-prompt-share-of-a-short-prompt": (
        dict(budget=256, window=0.25, sinks=4, interval=32, chunk=256, rank=0, prompt_share=0.5),
        100,
        300,
    ),
    "expected-distinct-share": (
        dict(budget=256, window=64, sinks=4, interval=32, chunk=256, prefill_interval=64, rank=0, distinct_share=0.5),
        700,
        300,
    ),
    "expected-head-distinct-share-beside-a-prompt": (
        dict(
            budget=256,
            window=64,
            sinks=4,
            interval=32,
            granularity="head",
            scope="decode",
            rank=0,
            distinct_share=0.8,
        ),
        200,
        500,
    ),
    "rotary-distinct-share": (
        dict(budget=256, window=64, sinks=4, interval=64, chunk=256, filter="rotary", distinct_share=0.3),
        900,
        200,
    ),
    "streaming-prompt-share": (
        dict(method="streaming", budget=192, sinks=4, interval=64, chunk=256, window=0, prompt_share=0.3),
        700,
        350,
    ),
    "page-chunked": (dict(budget=256, window=64, sinks=4, interval=32, chunk=256, granularity="page"), 900, 300),
    "page-cut-often": (
        dict(budget=256, window=64, sinks=4, interval=32, chunk=256, prefill_interval=64, granularity="page"),
        900,
        200,
    ),
    "page-odd-window": (dict(budget=331, window=45, sinks=39, interval=96, chunk=128, granularity="page"), 700, 400),
    "page-no-sinks-no-window": (
        dict(budget=192, window=0, sinks=0, interval=32, chunk=256, granularity="page"),
        500,
        300,
    ),
    "page-full": (dict(budget=256, window=64, sinks=4, interval=64, granularity="page", prefill="full"), 900, 200),
    "page-scope-decode": (
        dict(budget=256, window=50, sinks=4, interval=64, granularity="page", scope="decode"),
        300,
        500,
    ),
    "page-smallest": (dict(budget=162, window=64, sinks=4, interval=32, chunk=128, granularity="page"), 400, 250),
    "page-streaming": (
        dict(method="streaming", budget=256, sinks=4, interval=64, chunk=256, window=0, granularity="page"),
        700,
        300,
    ),
}


def options_and_rule(case: str) -> tuple[dict, Rule]:
    """The engine's configuration and the oracle's."""
    options, _, _ = CASES[case]
    if case.startswith(("expected", "rotary")):
        return options, make_rule(options)
    static = {**options, "filter": "static"}
    return options if "method" in options else static, make_rule(static)


def make_rule(options: dict, min_window: int = 0) -> Rule:
    """min_window: that sliding windows reach back."""
    window = options["window"] if isinstance(options["window"], int) else int(options["window"] * options["budget"])
    whole = options.get("prefill") == "full" or options.get("scope") == "decode"
    has_fixed_filter = options.get("filter", "expected") != "expected"
    return Rule(
        budget=options["budget"],
        window=max(window, min_window),
        sinks=options["sinks"],
        interval=options["interval"],
        block=BLOCK,
        chunk=None if whole else options["chunk"],
        prefill_interval=None if whole else options.get("prefill_interval", options["chunk"]),
        shared_by_heads=options.get("granularity", "layer") == "layer",
        keep_prompt=options.get("scope") == "decode",
        prompt_share=options.get("prompt_share", 0.0),
        distinct_share=options.get("distinct_share", 0.0),
        method=options.get("method", "qfilters"),
        filter=options.get("filter", "expected"),
        rank=options.get("rank", 0),
        observed=0 if has_fixed_filter else options.get("observed", 32),
        whole_pages=options.get("granularity") == "page",
        has_fp8_cache="kv_cache_dtype" in options,
    )


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=needs_fp8_caches if "fp8" in case else ()) for case in CASES]
)
def test_engine_matches_hugging_face_with_the_same_rule(case, engines, hf_model, tiny_filters):
    _, prompt_tokens, new_tokens = CASES[case]
    options, rule = options_and_rule(case)
    assert_like_hugging_face(engines.get(**options), hf_model, tiny_filters[1], rule, prompt_tokens, new_tokens)


def assert_like_hugging_face(
    engine, hf_model, filters, rule: Rule, prompt_tokens: int, new_tokens: int, atol: float = 2e-4
) -> None:
    prompts = [random_prompt(prompt_tokens, seed=1), random_prompt(prompt_tokens - 61, seed=2)]
    atol = 1e-2 if rule.has_fp8_cache else atol  # fp8 makes a last bit of float32 one of 3 bits, now and then
    before = engine.scheduler.compression_stats.compactions
    outputs = engine.generate(prompts, max_tokens=new_tokens)
    assert engine.scheduler.compression_stats.compactions - before >= 4
    for prompt, output in zip(prompts, outputs, strict=True):
        ids, logprobs = tokens_and_logprobs(output)
        expected, _ = teacher_forced_logprobs(hf_model, prompt, ids, filters, rule)
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected), atol=atol, rtol=0)
    engine.assert_idle()


def test_the_oracle_tells_eviction_from_none(hf_model, tiny_filters, engines):
    """The comparison above is not vacuous: the same tokens have other log-probabilities without eviction."""
    options, prompt_tokens, _ = CASES["chunked-layer"]
    options = {**options, "filter": "static"}
    prompt = random_prompt(prompt_tokens, seed=1)
    ids, logprobs = tokens_and_logprobs(engines.get(**options).generate([prompt], max_tokens=50)[0])
    rule = Rule(
        budget=100_000,
        window=64,
        sinks=4,
        interval=32,
        block=BLOCK,
        chunk=256,
        prefill_interval=256,
        shared_by_heads=True,
    )
    uncompressed, _ = teacher_forced_logprobs(hf_model, prompt, ids, tiny_filters[1], rule)
    assert (torch.tensor(logprobs) - torch.tensor(uncompressed)).abs().max() > 0.05


def test_factors_evict_the_same_as_the_moments_they_were_made_of(engines, tiny_filters, tmp_path):
    """A file of version 3 against one of version 2."""
    options = dict(CASES["chunked-head"][0], rank=5)
    of_moments, filters, path = engines.get(**options), tiny_filters[1], tmp_path / "version-3.safetensors"
    factors = query_factors(
        filters.query_mean_before_rope, filters.query_second_before_rope, of_moments.runner.rotations(), STORED_RANK
    )
    save(path, dataclasses.replace(filters, layers=layer_names(), query_factors=factors), tiny_identity())
    prompt = random_prompt(900, seed=5)
    expected, found = (
        tokens_and_logprobs(engine.generate([prompt], max_tokens=100)[0])
        for engine in (of_moments, engines.get(**options, filters=str(path)))
    )
    assert found == expected


def test_calibration_sees_the_queries_of_every_layer_before_and_after_rope(engines, hf_model):
    assert_calibrates_like_hugging_face(engines.get(**CASES["rotary"][0]), hf_model)


def assert_calibrates_like_hugging_face(engine, hf_model, lengths: tuple[int, ...] = (300, 200)) -> None:
    """The statistics of the engine's own forward passes, against Hugging Face's on the same tokens."""
    sequences = [random_prompt(length, seed=seed) for seed, length in enumerate(lengths, 3)]
    found = engine.runner.calibrate_filters(sequences, "test", rank=engine.runner.layers[0].head_size)
    before = {i: {j: [] for j in attending_to(hf_model, i)} for i in with_caches(hf_model) if attends(hf_model, i)}
    hooks = [
        hook_queries(hf_model.model.layers[j], queries.append)
        for attending in before.values()
        for j, queries in attending.items()
    ]
    with torch.no_grad():
        for sequence in sequences:
            hf_model(torch.tensor([sequence]))
    for hook in hooks:
        hook.remove()
    for row, (index, attending) in enumerate(before.items()):
        whole = joined(hf_model, index, [torch.cat(queries, 1) for queries in attending.values()])
        own = slice(whole.shape[0])
        mean = in_order_of(hf_model, found.query_mean_before_rope[row][own])
        torch.testing.assert_close(mean, whole.mean(1), atol=1e-4, rtol=1e-4)
        num_queries = whole.shape[1]
        coming = whole.repeat_interleave(HORIZON, 1)  # each of them, at every position to come
        coming = rotate(hf_model, index, coming, torch.arange(HORIZON).repeat(num_queries))
        centred = coming - coming.mean(1, keepdim=True)
        covariance = centred.mT @ centred / (num_queries * HORIZON)
        factors = in_order_of(hf_model, found.query_factors[row][own])
        torch.testing.assert_close(factors.mT @ factors, covariance, atol=1e-3, rtol=1e-3)
        assert not found.query_mean_before_rope[row][len(whole) :].any()
