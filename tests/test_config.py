"""The configuration: what it refuses, what it is resolved to, and what limits a request gets from it."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_qfilters.budget import RequestLimits
from vllm_qfilters.config import ADDITIONAL_CONFIG_KEY, GRANULARITIES, PREFILLS, SCOPES, KVCompressionConfig
from vllm_qfilters.groups import GroupsBeside
from vllm_qfilters.methods.catalog import METHODS, OPTIONS_OF_SOME, QFILTERS
from vllm_qfilters.policy import Policy, resolve

BUDGET_RANGE = ("an integer > 0", "<= 1.0")
WINDOW_RANGE = ("an integer >= 0", "0 <= window < 1")
OPTIONS = dataclasses.fields(KVCompressionConfig)
SMALL = dict(budget=512, window=64, sinks=4, interval=32)
STATIC = dict(SMALL, filter="static")
CHUNKED = dict(STATIC, chunk=256)

REFUSED = {
    # id: (options, what the message must name)
    "budget-zero": (dict(budget=0), ("budget=0:", *BUDGET_RANGE)),
    "budget-negative": (dict(budget=-5), ("budget=-5:", *BUDGET_RANGE)),
    "budget-true": (dict(budget=True), ("budget=True:", *BUDGET_RANGE)),
    "budget-false": (dict(budget=False), ("budget=False:", *BUDGET_RANGE)),
    "budget-none": (dict(budget=None), ("budget=None:", *BUDGET_RANGE)),
    "budget-text": (dict(budget="1024"), ("budget='1024':", *BUDGET_RANGE)),
    "budget-fraction-above-one": (dict(budget=1.5), ("budget=1.5:", *BUDGET_RANGE)),
    "budget-fraction-zero": (dict(budget=0.0), ("budget=0.0:", *BUDGET_RANGE)),
    "budget-fraction-negative": (dict(budget=-0.5), ("budget=-0.5:", *BUDGET_RANGE)),
    "budget-nan": (dict(budget=float("nan")), ("budget=nan:", *BUDGET_RANGE)),
    "budget-infinite": (dict(budget=float("inf")), ("budget=inf:", *BUDGET_RANGE)),
    "budget-below-window-sinks-interval": (
        dict(budget=99, window=64, sinks=4, interval=32),
        ("budget=99:", "at least 100", "window 64", "sinks 4", "interval 32"),
    ),
    "budget-below-fractional-window": (
        dict(budget=38, window=0.5, sinks=4, interval=16),
        ("budget=38:", "window 0.5", "sinks 4", "interval 16"),
    ),
    "budget-below-interval": (dict(budget=64, window=0), ("budget=64:", "at least 132", "interval 128")),
    "max-budget-text": (dict(max_budget="all"), ("max_budget='all':", *BUDGET_RANGE, "or 'unlimited'")),
    "max-budget-zero": (dict(max_budget=0), ("max_budget=0:", *BUDGET_RANGE)),
    "max-budget-true": (dict(max_budget=True), ("max_budget=True:", *BUDGET_RANGE)),
    "allow-off-text": (dict(allow_kv_budget_off="yes"), ("allow_kv_budget_off='yes':", "true or false")),
    "window-negative": (dict(window=-1), ("window=-1:", "an integer >= 0")),
    "window-fraction-negative": (dict(window=-0.5), ("window=-0.5:", *WINDOW_RANGE)),
    "window-whole-budget": (dict(window=1.0), ("window=1.0:", *WINDOW_RANGE)),
    "window-nan": (dict(window=float("nan")), ("window=nan:", *WINDOW_RANGE)),
    "window-true": (dict(window=True), ("window=True:", *WINDOW_RANGE)),
    "window-text": (dict(window="64"), ("window='64':", *WINDOW_RANGE)),
    "prompt-share-whole": (dict(prompt_share=1.0), ("prompt_share=1.0:", "0 <= prompt_share < 1")),
    "prompt-share-flag": (dict(prompt_share=False), ("prompt_share=False:", "a fraction of the budget")),
    "prompt-share-tokens": (dict(prompt_share=256), ("prompt_share=256:", "a fraction of the budget")),
    "prompt-share-negative": (dict(prompt_share=-0.5), ("prompt_share=-0.5:", "a fraction of the budget")),
    "distinct-share-whole": (dict(distinct_share=1.0), ("distinct_share=1.0:", "0 <= distinct_share < 1")),
    "distinct-share-tokens": (dict(distinct_share=128), ("distinct_share=128:", "a fraction of the budget")),
    "distinct-share-of-pages": (
        dict(distinct_share=0.5, granularity="page"),
        ("distinct_share=0.5 does nothing with granularity 'page'", "choose granularity 'layer' or 'head'"),
    ),
    "distinct-share-of-pages-beside-a-prompt": (
        dict(distinct_share=0.5, granularity="page", scope="decode"),
        ("distinct_share=0.5 does nothing with granularity 'page'", "choose granularity 'layer' or 'head'"),
    ),
    "distinct-share-of-streaming": (
        dict(distinct_share=0.5, method="streaming"),
        ("distinct_share=0.5 does nothing with method 'streaming'", "choose method 'qfilters'"),
    ),
    "prompt-share-and-window": (
        dict(prompt_share=0.5, window=0.5),
        ("prompt_share=0.5 and window=0.5", "together are less than 1"),
    ),
    "budget-below-prompt-share": (
        dict(budget=200, prompt_share=0.5, window=0.25),
        ("budget=200: at least 507", "window 0.25 + prompt_share 0.5 + sinks 4 + interval 128"),
    ),
    "sinks-negative": (dict(sinks=-1), ("sinks=-1:", "an integer >= 0")),
    "sinks-float": (dict(sinks=4.0), ("sinks=4.0:", "an integer >= 0")),
    "sinks-true": (dict(sinks=True), ("sinks=True:", "an integer >= 0")),
    "interval-zero": (dict(interval=0), ("interval=0:", "an integer >= 1")),
    "interval-negative": (dict(interval=-32), ("interval=-32:", "an integer >= 1")),
    "interval-float": (dict(interval=32.0), ("interval=32.0:", "an integer >= 1")),
    "chunk-zero": (dict(chunk=0), ("chunk=0:", "an integer >= 1")),
    "sinks-none": (dict(sinks=None), ("sinks=None:", "an integer >= 0")),
    "chunk-float": (dict(chunk=256.0), ("chunk=256.0:", "an integer >= 1")),
    "prefill-interval-zero": (dict(prefill_interval=0), ("prefill_interval=0:", "an integer >= 1")),
    "prefill-interval-float": (dict(prefill_interval=64.0), ("prefill_interval=64.0:", "an integer >= 1")),
    "prefill-interval-above-chunk": (
        dict(prefill_interval=512, chunk=256),
        ("prefill_interval=512:", "at most chunk=256"),
    ),
    "prefill-interval-above-the-default-chunk": (
        dict(prefill_interval=4096),
        ("prefill_interval=4096:", "at most chunk=2048"),
    ),
    "method-unknown": (dict(method="h2o"), ("method='h2o':", *METHODS)),
    "method-none": (dict(method=None), ("method=None:", *METHODS)),
    "granularity-unknown": (dict(granularity="token"), ("granularity='token':", *GRANULARITIES)),
    "prefill-unknown": (dict(prefill="none"), ("prefill='none':", *PREFILLS)),
    "scope-unknown": (dict(scope="prompt"), ("scope='prompt':", *SCOPES)),
    "filter-unknown": (dict(filter="svd"), ("filter='svd':", *QFILTERS)),
    "rank-negative": (dict(rank=-1), ("rank=-1:", "an integer >= 0")),
    "rank-float": (dict(rank=8.0), ("rank=8.0:", "an integer >= 0")),
    "observed-negative": (dict(observed=-1), ("observed=-1:", "an integer >= 0")),
    "observed-true": (dict(observed=True), ("observed=True:", "an integer >= 0")),
    "filters-empty": (dict(filters=""), ("filters='':", "'auto'", "a file")),
    "filters-true": (dict(filters=True), ("filters=True:", "'auto'", "a file")),
}


def policy_of(**options) -> Policy:
    return resolve(KVCompressionConfig(**options))


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_out_of_range_is_refused_naming_value_and_range(case):
    options, parts = REFUSED[case]
    with pytest.raises(ValueError) as refusal:
        policy_of(**options)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param(dict(budget=100, window=64, sinks=4, interval=32), id="smallest-budget"),
        pytest.param(dict(budget=1.0), id="budget-whole-prompt"),
        pytest.param(dict(budget=1e-6), id="budget-tiny-fraction"),
        pytest.param(dict(window=0, sinks=0), id="nothing-protected"),
        pytest.param(dict(window=0.0), id="window-fraction-zero"),
        *(pytest.param(dict(method=method), id=f"method-{method}") for method in METHODS),
        *(pytest.param(dict(filter=filter), id=f"filter-{filter}") for filter in QFILTERS),
        pytest.param(dict(rank=0, observed=0), id="mean-alone"),
        *(
            pytest.param(dict(granularity=granularity), id=f"granularity-{granularity}")
            for granularity in GRANULARITIES
        ),
        *(pytest.param(dict(prefill=prefill), id=f"prefill-{prefill}") for prefill in PREFILLS),
        *(pytest.param(dict(scope=scope), id=f"scope-{scope}") for scope in SCOPES),
    ],
)
def test_a_valid_configuration_survives_json(options):
    config = KVCompressionConfig(**options)
    assert resolve(config).written is config
    values = json.loads(json.dumps(config.to_dict()))
    assert KVCompressionConfig.from_dict(values) == config
    for name, value in options.items():
        assert values[name] == value and type(values[name]) is type(value)


def test_to_dict_names_every_option():
    assert set(KVCompressionConfig().to_dict()) == {field.name for field in OPTIONS}


def test_unknown_options_are_refused_by_name_and_the_known_ones_listed():
    with pytest.raises(ValueError) as refusal:
        KVCompressionConfig.from_dict({"budget": 1024, "windw": 3, "Sinks": 4})
    message = str(refusal.value)
    assert "Sinks, windw" in message
    for field in OPTIONS:
        assert field.name in message


def test_the_sliding_window_is_the_models_and_no_option():
    with pytest.raises(ValueError, match="unknown KV compression option sliding_window"):
        KVCompressionConfig.from_dict({"sliding_window": 64})


def test_what_was_written_and_what_was_resolved_cannot_be_changed():
    config = KVCompressionConfig()
    for record in (config, resolve(config)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.budget = 1
    assert config == KVCompressionConfig(), "resolving edits nothing"


def of_model(
    sliding_window: int | None,
    layer_types: list[str] | None = None,
    block_size: int = 16,
    is_one_group: bool = False,
    num_stages: int = 1,
    is_hybrid: bool = False,
    **options,
) -> Policy:
    """The policy of an engine that serves a model with such a window."""
    additional = {ADDITIONAL_CONFIG_KEY: KVCompressionConfig(**options).to_dict(), "other": 1}
    hf_text_config = SimpleNamespace() if layer_types is None else SimpleNamespace(layer_types=layer_types)
    model_config = SimpleNamespace(
        get_sliding_window=lambda: sliding_window,
        is_hybrid=is_hybrid,
        max_model_len=4096,
        hf_text_config=hf_text_config,
        get_total_num_hidden_layers=lambda: 2,
    )
    return Policy.from_vllm_config(
        SimpleNamespace(
            additional_config=additional,
            model_config=model_config,
            cache_config=SimpleNamespace(block_size=block_size),
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=is_one_group),
            parallel_config=SimpleNamespace(pipeline_parallel_size=num_stages),
        )
    )


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "window, layer_types, expected",
    [
        (None, None, 0),
        (64, None, 64),
        (64, [FULL] * 2, 0),
        (64, [SLIDING] * 2, 64),
        (4095, None, 4095),
        (4096, None, 0),  # reaches over the longest context
        (4096, [SLIDING, FULL], 0),
        (64, [SLIDING] + [FULL] * 2, 64),  # vLLM would make two groups of the full ones
    ],
)
def test_which_sliding_windows_a_budget_must_hold(window, layer_types, expected):
    policy = of_model(window, layer_types)
    assert policy.sliding_window == expected and policy.beside == GroupsBeside()


@pytest.mark.parametrize(
    "num_sliding, num_full, number", [(1, 1, 1), (2, 1, 2), (52, 10, 6), (12, 12, 1), (13, 12, 1), (12, 13, 1)]
)
def test_sliding_windows_beside_full_attention_have_groups_of_their_own(num_sliding, num_full, number):
    layer_types = [SLIDING] * num_sliding + [FULL] * num_full
    policy = of_model(64, layer_types)
    assert policy.sliding_window == 0 and policy.beside == GroupsBeside(64, number)
    assert policy.beside.pages(1000, step_tokens=100, block_size=16) == number * 12  # of 163 tokens, and one begun
    assert policy.beside.pages(33, step_tokens=100, block_size=16) == number * 3
    for in_one in (dict(is_one_group=True), dict(num_stages=2)):
        policy = of_model(64, layer_types, **in_one)
        assert policy.sliding_window == 64 and policy.beside == GroupsBeside()


@pytest.mark.parametrize(
    "layer_types, number",
    [
        (["linear_attention"] * 24 + [FULL] * 8, 3),  # Qwen3.5-4B
        (["linear_attention"] * 27 + ["mlp"] * 25 + [FULL] * 4, 7),  # Nemotron Nano 9B v2
        (["conv"] * 10 + [FULL] * 6, 2),  # LFM2 1.2B
        (["mamba"] * 7 + ["attention"] * 6, 1),
        (None, 1),  # Falcon-H1: both in every layer
    ],
)
def test_states_beside_attention_have_groups_of_their_own(layer_types, number):
    policy = of_model(None, layer_types, is_hybrid=True)
    assert policy.sliding_window == 0 and policy.beside == GroupsBeside(num_states=number)
    assert policy.beside.pages(1000, step_tokens=100, block_size=16) == number * 3  # whatever the length


def test_the_engine_configuration_carries_it():
    assert of_model(None, **CHUNKED) == policy_of(**CHUNKED)
    assert of_model(None, **CHUNKED).written == KVCompressionConfig(**CHUNKED)


@pytest.mark.parametrize("window, kept", [(0, 63), (63, 63), (64, 64), (0.25, 63), (0.5, 100)])
def test_the_window_holds_what_sliding_windows_attend_to(window, kept):
    config = of_model(64, budget=200, window=window, sinks=4, interval=32)
    assert config.request_limits(None, prompt_tokens=1000).window == kept


@pytest.mark.parametrize("window", [0, 0.25])
def test_a_budget_below_a_sliding_window_is_refused(window):
    config = of_model(64, budget=256, window=window, sinks=4, interval=32)
    assert config.min_budget() == 63 + 4 + 32
    assert config.request_limits({"kv_budget": 99}, prompt_tokens=1000).window == 63
    refusal = (
        rf"kv_budget=98: at least 99 tokens are needed for window {window} \(at least 63, which the model's sliding"
    )
    with pytest.raises(ValueError, match=refusal):
        config.request_limits({"kv_budget": 98}, prompt_tokens=1000)
    assert config.request_limits({"kv_budget": 0.01}, prompt_tokens=1000).budget == 99
    config = of_model(64, budget=80, window=window, sinks=4, interval=16)
    with pytest.raises(ValueError, match="budget=80: at least 83 tokens"):
        config.check_block_size(16)


@pytest.mark.parametrize("additional", [{}, {"other": 1}, None, object()], ids=["empty", "other-key", "none", "object"])
def test_an_engine_without_it_is_not_compressed(additional):
    vllm_config = SimpleNamespace(additional_config=additional)
    assert KVCompressionConfig.from_vllm_config(vllm_config) is Policy.from_vllm_config(vllm_config) is None


@pytest.mark.parametrize(
    ("block_size", "tokens"),
    [
        *((size, (128, 2048, 512)) for size in (1, 16, 32, 64, 128)),
        (96, (192, 2112, 576)),
        (256, (256, 2048, 512)),
        (544, (544, 2176, 544)),
    ],
)
def test_the_defaults_fit_every_block_size(block_size, tokens):
    of_size = of_model(None, block_size=block_size)
    of_size.check_block_size(block_size)
    assert (of_size.interval, of_size.chunk, of_size.prefill_interval) == tokens
    assert of_model(None, block_size=16).for_block_size(block_size) == of_size, "a backend may choose it late"


def test_what_the_user_gave_is_never_rounded_to_the_block_size():
    policy = policy_of(interval=128, chunk=1280)
    for block_size, refusal in ((256, "interval=128 is not a multiple"), (100, "interval=128 is not a multiple")):
        with pytest.raises(ValueError, match=refusal):
            policy.for_block_size(block_size).check_block_size(block_size)
    policy = policy_of(chunk=1280).for_block_size(256)
    assert (policy.interval, policy.chunk, policy.prefill_interval) == (256, 1280, 512)
    policy = policy_of(chunk=256, prefill_interval=256).for_block_size(256)
    assert (policy.interval, policy.chunk, policy.prefill_interval) == (256, 256, 256)


@pytest.mark.parametrize("name", ["interval", "chunk", "prefill_interval"])
@pytest.mark.parametrize(
    ("value", "block_size", "suggested"), [(100, 32, 96), (5, 32, 32), (129, 128, 128), (250, 128, 256)]
)
def test_tokens_that_are_no_whole_pages_are_refused_with_a_value_that_fits(name, value, block_size, suggested):
    options = {"interval": block_size, "chunk": 16 * block_size, name: value}
    with pytest.raises(ValueError) as refusal:
        policy_of(**options).check_block_size(block_size)
    assert f"{name}={value} " in str(refusal.value)
    assert f"block size {block_size}" in str(refusal.value)
    assert f"set {name} to {suggested}," in str(refusal.value)
    policy_of(**{**options, name: suggested}).for_block_size(block_size).check_block_size(block_size)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        pytest.param("abc", ("kv_budget='abc':", *BUDGET_RANGE), id="text"),
        pytest.param(-1, ("kv_budget=-1:", *BUDGET_RANGE), id="negative"),
        pytest.param(True, ("kv_budget=True:", *BUDGET_RANGE), id="true"),
        pytest.param(False, ("kv_budget=False:", *BUDGET_RANGE), id="false"),
        pytest.param(None, ("kv_budget=None:", *BUDGET_RANGE), id="none"),
        pytest.param([512], ("kv_budget=[512]:", *BUDGET_RANGE), id="list"),
        pytest.param(1.5, ("kv_budget=1.5:", *BUDGET_RANGE), id="fraction-above-one"),
        pytest.param(float("nan"), ("kv_budget=nan:", *BUDGET_RANGE), id="nan"),
        pytest.param(99, ("kv_budget=99:", "at least 100", "window 64", "sinks 4", "interval 32"), id="too-small"),
    ],
)
def test_a_bad_budget_of_a_request_is_refused_naming_value_and_range(value, parts):
    with pytest.raises(ValueError) as refusal:
        policy_of(**CHUNKED).request_limits({"kv_budget": value}, prompt_tokens=1000)
    for part in parts:
        assert part in str(refusal.value)


def test_a_refused_budget_of_a_request_says_how_to_switch_compression_off():
    with pytest.raises(ValueError, match="0 to switch compression off"):
        policy_of(**CHUNKED).request_limits({"kv_budget": -1}, prompt_tokens=1000)


@pytest.mark.parametrize("zero", [0, 0.0])
def test_a_request_with_budget_zero_is_not_compressed(zero):
    policy = policy_of(**CHUNKED, allow_kv_budget_off=True)
    assert policy.request_limits({"kv_budget": zero}, prompt_tokens=1000) is None
    with pytest.raises(ValueError, match="kv_budget=0: .* switch compression off: give 512 tokens at most"):
        policy_of(**CHUNKED).request_limits({"kv_budget": zero}, prompt_tokens=1000)


@pytest.mark.parametrize(
    ("options", "value", "budget"),
    [
        pytest.param({}, 512, 512, id="the-servers-own"),
        pytest.param({}, 513, None, id="above-the-servers-own"),
        pytest.param({}, 1.0, None, id="fraction-above"),
        pytest.param({}, 0.5, 500, id="fraction-below"),
        pytest.param({"max_budget": 700}, 700, 700, id="at-the-limit"),
        pytest.param({"max_budget": 700}, 701, None, id="above-the-limit"),
        pytest.param({"max_budget": 0.6}, 600, 600, id="at-a-fraction"),
        pytest.param({"max_budget": 0.6}, 601, None, id="above-a-fraction"),
        pytest.param({"max_budget": "unlimited"}, 10**6, 10**6, id="unlimited"),
        pytest.param({"budget": 0.5}, 501, None, id="above-the-servers-fraction"),
        pytest.param({"budget": 0.5, "max_budget": 300}, None, 300, id="a-limit-bounds-the-servers-fraction"),
        pytest.param({"max_budget": 0.2}, None, 200, id="a-fraction-bounds-the-servers-budget"),
    ],
)
def test_a_request_gets_no_more_than_the_server_allows(options, value, budget):
    policy = policy_of(**{**CHUNKED, **options})
    extra_args = None if value is None else {"kv_budget": value}
    if budget is None:
        with pytest.raises(ValueError, match=rf"kv_budget={value}: more than this server allows: give \d+ tokens"):
            policy.request_limits(extra_args, prompt_tokens=1000)
    else:
        assert policy.request_limits(extra_args, prompt_tokens=1000).budget == budget


def test_a_limit_below_the_servers_budget_or_the_least_one_is_refused():
    with pytest.raises(ValueError, match="max_budget=64: at least 100 tokens are needed"):
        policy_of(**{**CHUNKED, "budget": 0.5, "max_budget": 64})
    for budget, limit in ((512, 511), (0.5, 0.4)):
        with pytest.raises(ValueError, match=f"max_budget={limit} is below budget={budget}"):
            policy_of(**{**CHUNKED, "budget": budget, "max_budget": limit})


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        pytest.param({}, 512 + 256, id="the-servers-own"),
        pytest.param({"max_budget": 700}, 700 + 256, id="limit"),
        pytest.param({"max_budget": "unlimited"}, 100_000, id="unlimited"),
        pytest.param({"chunk": None, "prefill": "full"}, 100_000, id="prompts-read-whole"),
    ],
)
def test_the_most_tokens_that_are_compacted_follow_the_limit(options, tokens):
    assert policy_of(**{**CHUNKED, **options}).max_compacted_tokens(100_000) == tokens


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 7}], ids=["none", "empty", "other-key"])
def test_a_request_without_a_budget_gets_the_configured_one(extra_args):
    limits = policy_of(**CHUNKED).request_limits(extra_args, prompt_tokens=1000)
    assert limits == RequestLimits(
        budget=512, window=64, sinks=4, interval=32, chunk=256, prefill_interval=256, keeps_distinct=True
    )


@pytest.mark.parametrize(
    ("value", "prompt_tokens", "budget"),
    [
        pytest.param(100, 1000, 100, id="smallest"),
        pytest.param(5000, 1000, 5000, id="above-prompt"),
        pytest.param(0.25, 1000, 250, id="fraction"),
        pytest.param(0.25, 1001, 251, id="fraction-rounded-up"),
        pytest.param(1.0, 1000, 1000, id="whole-prompt"),
        pytest.param(0.25, 100, 100, id="fraction-raised-to-the-smallest"),
    ],
)
def test_a_request_sets_its_own_budget(value, prompt_tokens, budget):
    limits = policy_of(**CHUNKED, max_budget="unlimited").request_limits({"kv_budget": value}, prompt_tokens)
    assert limits == RequestLimits(
        budget, window=64, sinks=4, interval=32, chunk=256, prefill_interval=256, keeps_distinct=True
    )


def test_a_configured_fraction_is_of_the_prompt():
    config = policy_of(**{**CHUNKED, "budget": 0.5})
    assert config.request_limits(None, prompt_tokens=3000).budget == 1500
    assert config.request_limits({"kv_budget": 200}, prompt_tokens=3000).budget == 200


@pytest.mark.parametrize(("budget", "window"), [(512, 256), (301, 150), (0.25, 125)])
def test_a_fractional_window_is_of_the_budget_of_the_request(budget, window):
    config = policy_of(**{**CHUNKED, "window": 0.5})
    assert config.request_limits({"kv_budget": budget}, prompt_tokens=1000).window == window


@pytest.mark.parametrize(
    ("prompt_tokens", "budget", "sinks"),
    [pytest.param(1000, 1512, 1000, id="long-prompt"), pytest.param(3, 515, 4, id="prompt-below-sinks")],
)
def test_scope_decode_keeps_the_prompt_beside_the_budget(prompt_tokens, budget, sinks):
    limits = policy_of(**STATIC, scope="decode").request_limits(None, prompt_tokens)
    expected = RequestLimits(
        budget, window=64, sinks=sinks, interval=32, chunk=None, prefill_interval=None, keeps_distinct=True
    )
    assert limits == expected


def test_scope_decode_takes_a_fractional_window_of_the_generated_tokens_alone():
    limits = policy_of(budget=512, window=0.25, scope="decode").request_limits(None, prompt_tokens=1000)
    assert limits.window == 128


@pytest.mark.parametrize(("chunk", "interval"), [(2048, 512), (512, 512), (128, 128)])
def test_prompts_are_cut_every_512_tokens_or_every_chunk(chunk, interval):
    policy = policy_of(chunk=chunk)
    assert policy.prefill_interval == policy.request_limits(None, prompt_tokens=1000).prefill_interval == interval
    assert KVCompressionConfig.from_dict(policy.written.to_dict()) == policy.written


@pytest.mark.parametrize(("share", "pinned"), [(None, 0), (0, 0), (0.5, 256), (0.001, 4)])
def test_the_share_of_a_prompt_is_of_the_budget_of_the_request(share, pinned):
    policy = policy_of(**dict(CHUNKED, window=0.25), prompt_share=share)
    assert policy.request_limits(None, prompt_tokens=1000).pinned_prompt == pinned
    limits = policy.request_limits({"kv_budget": 400}, prompt_tokens=100)
    assert limits.pinned_prompt == (200 if pinned == 256 else pinned)


def test_prefill_full_cuts_no_prompt_in_chunks():
    config = policy_of(**STATIC, prefill="full")
    assert not config.evicts_prompts_in_chunks
    assert config.request_limits(None, prompt_tokens=1000).chunk is None


@pytest.mark.parametrize("method", METHODS)
def test_streaming_alone_keeps_recent_tokens_only(method):
    limits = policy_of(**SMALL, method=method).request_limits(None, prompt_tokens=1000)
    assert limits.recent_only == (method == "streaming")
    assert limits.protected_window(kept=480) == (476 if method == "streaming" else 64)


@pytest.mark.parametrize("granularity, method", [
    (granularity, method) for granularity in GRANULARITIES for method, entry in METHODS.items()
    if granularity != "page" or entry.scores_are_final or method == "qfilters"
])  # fmt: skip
def test_what_a_prompt_holds_beyond_the_budget_is_distinct_for_qfilters_alone(method, granularity):
    limits = policy_of(**SMALL, granularity=granularity, method=method).request_limits(None, prompt_tokens=1000)

    def distinct_tokens(kept, reads_prompt=True):
        return limits.distinct_tokens(kept, protected=68, reads_prompt=reads_prompt)

    assert distinct_tokens(kept=600) == (88 if method == "qfilters" and granularity != "page" else 0)
    assert distinct_tokens(kept=512) == distinct_tokens(kept=400) == distinct_tokens(kept=600, reads_prompt=False) == 0


@pytest.mark.parametrize("method", ["expected", "sampled", "rotary", "static"])
def test_a_share_of_the_budget_is_for_distinct_tokens(method):
    options = {**SMALL, "filter": method, "distinct_share": 0.5}
    limits = policy_of(**options).request_limits({"kv_budget": 256}, prompt_tokens=1000)
    beside_prompt = policy_of(**options, scope="decode").request_limits(None, prompt_tokens=1000)

    def distinct_tokens(kept, protected=68, reads_prompt=False):
        return limits.distinct_tokens(kept, protected, reads_prompt)

    assert distinct_tokens(kept=256) == distinct_tokens(kept=224) == 128
    assert distinct_tokens(kept=300, reads_prompt=True) == 128 + 44
    assert distinct_tokens(kept=224, protected=200) == 24  # no more than sinks and window leave room for
    assert beside_prompt.distinct_tokens(1500, 1064, reads_prompt=False) == 256


@pytest.mark.parametrize(
    ("options", "queries", "planes"),
    [
        pytest.param({}, 32, 1, id="defaults"),
        pytest.param(dict(observed=8), 8, 1, id="fewer"),
        pytest.param(dict(observed=0), 0, 0, id="none"),
        pytest.param(dict(filter="rotary"), 0, 0, id="rotary"),
        pytest.param(dict(filter="static"), 0, 1, id="static"),
        pytest.param(dict(method="knorm"), 0, 1, id="other-method"),
        pytest.param(dict(method="snapkv"), 32, 1, id="method-that-looks"),
        pytest.param(dict(method="tova"), 1, 1, id="method-that-looks-once"),
    ],
)
def test_observed_queries_take_a_plane_and_make_windows_private(options, queries, planes):
    config = policy_of(**options)
    assert (config.observed_queries, config.num_planes) == (queries, planes)
    assert config.request_limits(None, prompt_tokens=1000).private_window == (queries > 0)


@pytest.mark.parametrize(
    ("options", "max_model_len", "tokens"),
    [
        pytest.param(dict(chunk=256), 10_000, 512 + 256, id="budget-and-chunk"),
        pytest.param(dict(chunk=256), 600, 600, id="short-model"),
        pytest.param(dict(prefill="full"), 10_000, 10_000, id="prefill-full"),
        pytest.param(dict(scope="decode"), 10_000, 10_000, id="scope-decode"),
        pytest.param(dict(budget=0.5, chunk=256), 10_000, 5000 + 256, id="fraction"),
    ],
)
def test_the_most_one_sequence_holds(options, max_model_len, tokens):
    assert policy_of(**{**STATIC, **options}).max_resident_tokens(max_model_len) == tokens


@settings(deadline=None)
@given(
    window=st.one_of(st.integers(0, 500), st.floats(0, 0.99)),
    sinks=st.integers(0, 100),
    interval=st.integers(1, 256),
    scope=st.sampled_from(SCOPES),
    kv_budget=st.one_of(st.floats(0, 1, exclude_min=True), st.integers(0, 2000)),
    prompt_tokens=st.integers(1, 5000),
)
def test_every_allowed_request_has_room_for_sinks_and_window_after_an_eviction(
    window, sinks, interval, scope, kv_budget, prompt_tokens
):
    options = dict(budget=1.0, window=window, sinks=sinks, interval=interval, scope=scope)
    config = policy_of(**options, max_budget="unlimited")
    if isinstance(kv_budget, int):
        kv_budget += config.min_budget()
    limits = config.request_limits({"kv_budget": kv_budget}, prompt_tokens)
    assert limits.budget - limits.interval >= limits.window + limits.sinks


@settings(deadline=None, max_examples=300)
@given(
    window=st.one_of(st.integers(0, 500), st.floats(0, 0.99)),
    sinks=st.integers(0, 100),
    block_size=st.sampled_from([1, 16, 32, 128]),
    pages_per_interval=st.integers(1, 4),
    prefill=st.sampled_from(PREFILLS),
    scope=st.sampled_from(SCOPES),
    method=st.sampled_from([name for name, entry in METHODS.items() if entry.scores_are_final or name == "qfilters"]),
    kv_budget=st.one_of(st.floats(0, 1, exclude_min=True), st.integers(0, 300)),
    prompt_tokens=st.integers(1, 3000),
    surplus=st.integers(0, 3000),
    is_prefilling=st.booleans(),
)
def test_whole_pages_outside_sinks_and_window_always_suffice(
    window,
    sinks,
    block_size,
    pages_per_interval,
    prefill,
    scope,
    method,
    kv_budget,
    prompt_tokens,
    surplus,
    is_prefilling,
):
    interval = pages_per_interval * block_size
    config = policy_of(
        method=method,
        budget=1.0,
        window=window,
        sinks=sinks,
        interval=interval,
        prefill=prefill if scope == "all" else None,
        scope=scope,
        granularity="page",
        max_budget="unlimited",
    )
    if isinstance(kv_budget, int):
        kv_budget += config.min_budget(block_size)
    limits = config.request_limits({"kv_budget": kv_budget}, prompt_tokens, block_size)
    assume(limits.chunk is not None or not is_prefilling)
    resident = limits.budget + (limits.chunk - limits.prefill_interval if is_prefilling else 0) + surplus
    evicted = limits.evicted_tokens(resident, is_prefilling, block_size)
    window_tokens = limits.protected_window(resident - evicted)
    first_page, last_page = -(-limits.sinks // block_size), (resident - window_tokens) // block_size
    assert last_page - first_page >= evicted // block_size


def test_page_granularity_needs_a_budget_of_whole_pages():
    options = dict(CHUNKED, granularity="page")
    policy = policy_of(**dict(options, budget=220))
    policy.check_block_size(32)
    with pytest.raises(
        ValueError, match=r"budget=160: at least 162 tokens are needed .* in whole pages of 32; raise budget"
    ):
        policy_of(**dict(options, budget=160)).check_block_size(32)
    with pytest.raises(ValueError, match="budget=99: at least 100 tokens .*, and more in whole pages; raise"):
        policy_of(**dict(options, budget=99))
    policy_of(**dict(options, budget=160, granularity="layer")).check_block_size(32)
    limits = policy.request_limits(None, prompt_tokens=1000, block_size=32)
    assert (limits.budget, limits.sinks) == (220, 32)


def test_a_share_of_the_prompt_needs_a_budget_of_whole_pages():
    options = dict(budget=512, window=64, interval=128, prompt_share=0.6)
    with pytest.raises(ValueError, match="budget=400: at least 478 tokens .*, and more in whole pages; raise"):
        policy_of(**dict(options, budget=400))
    with pytest.raises(ValueError, match="budget=512: at least 796 tokens .*, in whole pages of 128; raise"):
        policy_of(**options).check_block_size(128)
    policy_of(**dict(options, budget=796)).check_block_size(128)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (
            dict(filter="expected"),
            "filter='expected' scores a token by where its sequence stands, .* use filter 'static', or choose",
        ),
        (dict(filter="rotary"), "filter='rotary' scores a token by where its sequence stands"),
        *(
            (dict(method=method), f"method='{method}' scores a token anew .* choose granularity 'layer' or 'head'")
            for method, entry in METHODS.items()
            if not entry.scores_are_final and method != "qfilters"
        ),
    ],
    ids=str,
)
def test_page_granularity_needs_scores_that_are_final(options, refusal):
    with pytest.raises(ValueError, match=refusal):
        policy_of(**options, granularity="page")
    policy_of(**options)


DOES_NOTHING = {
    # id: (options, what the message must name)
    **{
        f"{method}-{name}": (
            {"method": method, name: value},
            (f"{name}={value!r} does nothing with method {method!r}:", "drop it, or choose method 'qfilters'"),
        )
        for method, entry in METHODS.items()
        for name, value in dict(filter="static", rank=8, observed=32, filters="auto").items()
        if name not in entry.options
    },
    **{
        f"{filter}-{name}": (
            {"filter": filter, name: 0},
            (f"{name}=0 does nothing with filter {filter!r}:", "drop it, or choose filter 'expected'"),
        )
        for filter in ("static", "rotary")
        for name in ("rank", "observed")
    },
    "page-observed": (
        dict(granularity="page", observed=8),
        ("observed=8 does nothing with filter 'static' (the default in page granularity):",),
    ),
    "scope-decode-prompt-share": (
        dict(scope="decode", prompt_share=0.5),
        ("prompt_share=0.5 does nothing with scope 'decode'", "drop it, or choose scope 'all'"),
    ),
    "page-prompt-share": (
        dict(granularity="page", prompt_share=0.5),
        ("prompt_share=0.5 does nothing with granularity 'page'", "choose granularity 'layer' or 'head'"),
    ),
    "scope-decode-prefill": (
        dict(scope="decode", prefill="full"),
        ("prefill='full' does nothing with scope 'decode'", "drop it, or choose scope 'all'"),
    ),
    "scope-decode-chunk": (
        dict(scope="decode", chunk=2048),
        ("chunk=2048 does nothing with scope 'decode'", "drop it, or choose scope 'all'"),
    ),
    "scope-decode-prefill-interval": (
        dict(scope="decode", prefill_interval=64),
        ("prefill_interval=64 does nothing with scope 'decode'", "drop it, or choose scope 'all'"),
    ),
    "prefill-full-chunk": (
        dict(prefill="full", chunk=2048),
        ("chunk=2048 does nothing with prefill 'full'", "drop it, or choose prefill 'chunked'"),
    ),
    "prefill-full-prefill-interval": (
        dict(prefill="full", prefill_interval=64),
        ("prefill_interval=64 does nothing with prefill 'full'", "drop it, or choose prefill 'chunked'"),
    ),
}


@pytest.mark.parametrize("case", DOES_NOTHING)
def test_an_option_that_does_nothing_is_refused_naming_it_and_what_to_do(case):
    options, parts = DOES_NOTHING[case]
    with pytest.raises(ValueError) as refusal:
        policy_of(**options)
    for part in parts:
        assert part in str(refusal.value)


def test_a_prompt_share_under_pressure_is_refused():
    with pytest.raises(ValueError, match="prompt_share=0.5 needs evict='always'"):
        policy_of(prompt_share=0.5, evict="pressure")
    assert policy_of(prompt_share=0.0, evict="pressure").evict == "pressure"


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(evict="pressure"), "needs evict='always'"),
        (dict(scope="decode"), "needs scope='all'"),
        (dict(budget=0.5), "needs a budget in tokens, not budget=0.5"),
    ],
    ids=str,
)
def test_resuming_is_refused_where_no_prompt_could(options, reason):
    assert policy_of(prefix="resume").resumes and not policy_of(**options).resumes
    with pytest.raises(ValueError, match=f"prefix='resume' {reason}"):
        policy_of(prefix="resume", **options)


def test_a_budget_to_resume_from_holds_the_tokens_of_a_page_that_is_not_full():
    options = dict(method="random", window=8, sinks=4, interval=128, chunk=128)
    least = 128 + 4 + 127
    policy_of(prefix="resume", budget=least, **options).check_block_size(128)
    too_small = policy_of(prefix="resume", budget=least - 1, **options)
    reason = rf"budget={least - 1}: at least {least} .* window 8 \(at least 127, as many as a page that is not full"
    with pytest.raises(ValueError, match=reason):
        too_small.check_block_size(128)
    policy_of(budget=128 + 4 + 8, **options).check_block_size(128)


def test_every_option_of_some_is_read_by_a_method_that_is_not_told_to_drop_it():
    for entry in (*METHODS.values(), *QFILTERS.values()):
        assert entry.options <= OPTIONS_OF_SOME == {"filter", "filters", "rank", "observed", "distinct_share"}
    policy = policy_of(filter="expected", rank=3, observed=5, filters="a/b")
    assert (policy.filter, policy.rank, policy.observed, policy.filters) == ("expected", 3, 5, "a/b")


def test_the_filter_is_the_first_that_the_granularity_can_use():
    assert [policy_of(granularity=granularity).filter for granularity in GRANULARITIES] == ["expected"] * 2 + ["static"]
    assert policy_of(method="knorm").filter is None


def test_a_policy_lists_what_it_reads():
    assert set(policy_of().to_dict()) == {field.name for field in OPTIONS}
    assert policy_of().to_dict()["rank"] == 8 and policy_of(rank=2).to_dict()["rank"] == 2
    assert set(policy_of(method="streaming").to_dict()) == {field.name for field in OPTIONS} - OPTIONS_OF_SOME
    assert not {"prefill", "chunk", "prefill_interval"} & set(policy_of(scope="decode").to_dict())
