"""Models that keep states beside attention: tokens are evicted from the layers of attention alone, and states are as
vLLM has them. Operators of states that vLLM lacks on CPUs are those of ``tests/states.py``.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from vllm.exceptions import VLLMValidationError
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from tests import models, states
from tests.engines import (
    ANY_BUDGET,
    TEXT_ONLY,
    Engine,
    Engines,
    register_qwen_vl,
    share_group_of_experts,
    tokens_and_logprobs,
)
from tests.models import HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, random_prompt
from tests.oracle import TextModel
from tests.test_groups import answers, assert_close, held_by_group
from tests.test_oracle import assert_calibrates_like_hugging_face, assert_like_hugging_face, make_rule
from tests.test_refusals import supported_config
from vllm_qfilters import commands, kv_compression
from vllm_qfilters.config import KVCompressionConfig
from vllm_qfilters.frontend.support import check_supported
from vllm_qfilters.groups import GroupsBeside
from vllm_qfilters.policy import resolve
from vllm_qfilters.worker.specs import STATES, check_specs


class Family(NamedTuple):
    """Attributes:

    attention: indices of the layers that attend.
    block_size: tokens per page, of 32 that are asked for, in float32: vLLM makes a page as large as a state.
    has_prefix_caching: on CPUs too, where vLLM 0.32 fails over the states that Mamba 2 leaves for it.
    kv_shape: number and size of KV heads.
    """

    make: Callable[[pathlib.Path], pathlib.Path]
    attention: list[int]
    block_size: int
    has_prefix_caching: bool
    kv_shape: tuple[int, int] = (NUM_KV_HEADS, HEAD_SIZE)


FAMILIES = {
    "lfm2": Family(models.make_tiny_lfm2, [1], 32, True),
    "qwen3_next": Family(models.make_tiny_qwen3_next, [1], 96, True),
    "qwen3_5": Family(models.make_tiny_qwen3_5, [1], 96, True),
    "nemotron_h": Family(models.make_tiny_nemotron_h, [2], 64, False),
    "falcon_h1": Family(models.make_tiny_falcon_h1, [0, 1, 2], 64, False),
    "zamba2": Family(models.make_tiny_zamba2, [0, 2], 32, False, (NUM_HEADS, 2 * HEAD_SIZE)),
}
CASES = {
    "expected-layer": dict(window=0.1, rank=0),
    "expected-head-covariance": dict(window=60, rank=32, granularity="head", observed=0),
    "page": dict(window=0, granularity="page", filter="static"),
    "streaming": dict(window=0, method="streaming"),
}
PAGES = 4  # in a budget


def options_of(name: str, case: str) -> dict:
    """In whole pages of the family."""
    size = FAMILIES[name].block_size
    sizes = dict(budget=PAGES * size, interval=size, chunk=PAGES * size, prefill_interval=2 * size)
    return dict(**sizes, sinks=4, **CASES[case])


@pytest.fixture(scope="module", autouse=True)
def operators():
    register_qwen_vl("qwen3_5")
    with states.stood_in():
        yield


@pytest.fixture(scope="module")
def family(tmp_path_factory, operators):
    """By name: (folder, filters file, Engines, Filters, Hugging Face's model)"""

    @functools.cache
    def get(name: str):
        folder = FAMILIES[name].make(tmp_path_factory.mktemp(name))
        path = tmp_path_factory.mktemp("filters") / f"{name}.safetensors"
        filters = models.make_tiny_filters(
            path, model=folder, layers=FAMILIES[name].attention, kv_shape=FAMILIES[name].kv_shape
        )
        engines = Engines(folder, path, enable_prefix_caching=False, **llm_of(name))
        share_group_of_experts()
        auto = AutoModelForImageTextToText if name == "qwen3_5" else AutoModelForCausalLM
        hf_model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        return folder, path, engines, filters, TextModel(hf_model) if name == "qwen3_5" else hf_model

    return get


def llm_of(name: str) -> dict:
    return TEXT_ONLY if name == "qwen3_5" else {}


@pytest.mark.parametrize(
    "name, case",
    [
        ("lfm2", "expected-layer"),
        ("lfm2", "page"),
        ("qwen3_next", "streaming"),
        ("qwen3_next", "expected-head-covariance"),
        ("qwen3_5", "expected-layer"),
        ("nemotron_h", "streaming"),
        ("nemotron_h", "expected-layer"),
        ("falcon_h1", "expected-layer"),
        ("zamba2", "expected-layer"),
        ("zamba2", "page"),
    ],
)
def test_engine_matches_hugging_face_with_the_same_rule(name, case, family):
    """Two requests at once."""
    _, _, engines, filters, hf_model = family(name)
    options, block_size = options_of(name, case), FAMILIES[name].block_size
    engine = engines.get(**options)
    assert engine.scheduler.block_manager.block_size == block_size
    rule = dataclasses.replace(make_rule(options), block=block_size)
    sizes = dict(prompt_tokens=11 * block_size, new_tokens=150)
    assert_like_hugging_face(engine, hf_model, filters, rule, **sizes)
    if case == "expected-layer":  # what another rule evicts shows
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            other = dataclasses.replace(rule, sinks=rule.sinks + 1)
            assert_like_hugging_face(engine, hf_model, filters, other, **sizes, atol=4e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_calibration_sees_how_queries_turn(name, family):
    _, _, engines, _, hf_model = family(name)
    case = "expected-head-covariance" if name == "qwen3_next" else "expected-layer"
    engine = engines.get(**options_of(name, case))
    are_identities = [rotation.is_identity for rotation in engine.runner.rotations()]
    assert are_identities == [name == "nemotron_h"] * len(FAMILIES[name].attention)
    assert_calibrates_like_hugging_face(engine, hf_model)


@pytest.mark.parametrize("name", FAMILIES)
def test_budget_above_length_is_bit_identical_to_plain_vllm(name, family):
    """Gated delta nets with vLLM's own operators. Requests begin alike where the prefix cache is on."""
    folder, path, *_ = family(name)
    begin = random_prompt(200, seed=7)
    prompts = [begin + random_prompt(length, seed=length) for length in (300, 9, 77)]
    found = []
    for compression in ({}, kv_compression("qfilters", budget=960, filters=str(path), **ANY_BUDGET)):
        engine = Engine(
            folder,
            *(96, 1024, 256, compression),
            dtype="bfloat16" if name.startswith("qwen") else "float32",
            enable_prefix_caching=FAMILIES[name].has_prefix_caching,
            **llm_of(name),
        )
        # Later rounds start from what the prefix cache holds: their last digits are other ones than those of the first.
        rounds = (prompts, None), (prompts[::-1], None), (prompts, 0)
        found.append([answers(engine, asked, max_tokens=60, kv_budget=kv_budget) for asked, kv_budget in rounds])
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def small_engine(family):
    """By name: an engine with few pages. The prefix cache is on where vLLM has it."""

    @functools.cache
    def get(name: str) -> Engine:
        folder, path, *_ = family(name)
        engines = Engines(folder, path, enable_prefix_caching=FAMILIES[name].has_prefix_caching, **llm_of(name))
        options = options_of(name, "expected-layer")
        return engines.get(num_blocks=28, max_model_len=2048, max_batched=FAMILIES[name].block_size, **options)

    return get


@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h"])
def test_requests_that_preempt_each_other_or_begin_alike_end_as_alone(name, small_engine):
    """Where states are kept too, a hit is on pages from before any cut: nobody starts behind a compressed context."""
    engine, size = small_engine(name), FAMILIES[name].block_size
    begin = random_prompt(size + size // 2, seed=7)
    prompts = [begin + random_prompt(length, seed=length) for length in (5, 10, 15, 20, 25, 7 * size)]
    sampling = dict(max_tokens=size + size // 2)
    preempted, preempt = [], engine.scheduler._preempt_request
    engine.scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(1), preempt(*args, **kwargs))[1]
    try:
        together = engine.generate(prompts, **sampling)
    finally:
        del engine.scheduler._preempt_request
    assert preempted
    again = engine.generate(prompts, **sampling)
    alone = []
    for prompt in prompts:
        assert engine.llm.reset_prefix_cache()
        alone += answers(engine, [prompt], **sampling)
    for outputs in (together, again):
        assert_close([tokens_and_logprobs(output) for output in outputs], alone)
    first_cut = engine.runner.compression.request_limits(None, 1000, size).first_prefill_cut
    cached = [output.num_cached_tokens for output in again]
    assert max(cached) < first_cut and (any(cached) == FAMILIES[name].has_prefix_caching)
    assert engine.scheduler.compression_stats.evicted_tokens > 12 * size
    engine.assert_idle()


@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h"])
def test_states_take_the_pages_that_they_take_without_compression(name, small_engine):
    engine, block_size = small_engine(name), FAMILIES[name].block_size
    engine.drop_everything()
    request_id, held = engine.add(random_prompt(11 * block_size, seed=1), max_tokens=100), []
    engine.run(on_step=lambda: engine.scheduler.requests and held.append(held_by_group(engine, request_id)))
    compressed, *of_states = zip(*held, strict=True)
    assert max(compressed) == 2 * PAGES and compressed[-1] <= PAGES
    assert len(of_states) == 2
    for pages in of_states:
        assert max(pages) <= 2 if FAMILIES[name].has_prefix_caching else max(pages) == 1
    with pytest.raises(VLLMValidationError, match=r"\(28 pages\), the whole KV cache has 27 pages"):
        engine.add(random_prompt(22 * block_size - 100, seed=1), max_tokens=100, kv_budget=0)
    engine.assert_idle()


LAYERS = ["linear_attention"] * 3 + ["full_attention"]


@pytest.mark.parametrize(
    "name, value, options, reason",
    [
        ("model_config.use_mla", True, {}, "MLA .* models that have states beside their attention"),
        ("speculative_config", SimpleNamespace(method="ngram"), {}, "speculative decoding of models that keep states"),
        ("parallel_config.pipeline_parallel_size", 2, {}, "pipeline parallelism of models that keep states"),
        ("scheduler_config.disable_hybrid_kv_cache_manager", True, {}, "in one KV cache group; drop --disable-hybrid"),
        ("cache_config.prefix_match_unit", 16, {}, "prefix cache hits within a page; drop --prefix-match-unit"),
        ("model_config.hf_text_config.layer_types", [*LAYERS, "sliding_attention"], {}, "and have sliding windows"),
        (
            "model_config.hf_text_config.layer_types",
            [*LAYERS, *LAYERS[3:] * 4],
            {},
            "many more layers attend than keep",
        ),
        (None, None, dict(evict="pressure"), "evict='pressure' of models that keep states beside attention"),
        (None, None, dict(prefix="resume"), "prefix='resume' of models with sliding windows or states"),
    ],
)
def test_what_does_not_work_beside_states_is_refused(name, value, options, reason, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config, model = supported_config(), supported_config().model_config
    config.model_config = model
    model.is_hybrid, model.hf_text_config = True, SimpleNamespace(layer_types=LAYERS, num_kv_shared_layers=0)
    model.get_sliding_window, model.get_total_num_hidden_layers = lambda: 128, lambda: 4
    config.scheduler_config = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    config.cache_config.prefix_match_unit, config.cache_config.enable_prefix_caching = None, True

    def check(**options) -> None:
        written = KVCompressionConfig(method="random_once", interval=32, chunk=128, **options)
        check_supported(resolve(written, model, block_size=32), config)

    check()
    assert "budget 2048 is below the 8192 tokens that docs/budget.md advises for such models" in caplog.text
    if name is not None:
        *path, attribute = name.split(".")
        setattr(functools.reduce(getattr, path, config), attribute, value)
    with pytest.raises(ValueError, match=f"KV compression does not support .*{reason}"):
        check(**options)


def test_states_of_other_kinds_are_refused():
    policy = dataclasses.replace(resolve(KVCompressionConfig()), beside=GroupsBeside(num_states=1))
    attention = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32)
    for kind in MambaAttentionBackendEnum.__members__.values():
        state = MambaSpec(block_size=32, shapes=((2, 64),), dtypes=(torch.float32,), mamba_type=kind)
        if kind in STATES:
            check_specs(policy, {"attention": attention, "state": state}, max_model_len=4096)
            continue
        with pytest.raises(ValueError, match=f"states of kind {kind.name} beside attention, as state does; supported:"):
            check_specs(policy, {"attention": attention, "state": state}, max_model_len=4096)


def test_sizes_of_states_are_not_reckoned_in_one_group(family, capsys):
    argv = ["size", str(family("lfm2")[0]), "--memory", "1GiB", "--pipeline-parallel-size", "2"]
    assert commands.main(argv) == 2
    assert "models that keep states beside attention have several KV cache groups: use --pip" in capsys.readouterr().err
