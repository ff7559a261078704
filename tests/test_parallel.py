"""Tensor and pipeline parallelism: ranks hold different heads or layers and evict the same counts. Data parallelism:
engines that share a server."""

import concurrent.futures
import inspect
import json

import openai
import pytest
import torch
from vllm.utils.cpu_resource_utils import get_visible_memory_node

from tests.engines import BLOCK, Engine, Engines, prefixes_kept_with_cpu_mla
from tests.models import LATENT, NUM_LAYERS, ROTARY, make_tiny_llama, random_prompt, tiny_identity
from tests.run_engine import generate_each
from tests.server import Server
from vllm_qfilters import kv_compression
from vllm_qfilters.commands.inspection import command
from vllm_qfilters.commands.inspection.command import assemble
from vllm_qfilters.filters.reader import load

COMPRESSION = dict(budget=192, window=48, interval=32, chunk=128, prefill_interval=64)
CACHE = dict(num_blocks=64, max_model_len=1024, max_batched=256)
SHARED = random_prompt(160, seed=1)
REQUESTS = [dict(prompt=random_prompt(length, seed=length), max_tokens=70) for length in (500, 61)]
# Four more, that wait for one another's pages, and find pages of one another.
REQUESTS += [dict(prompt=SHARED + random_prompt(length, seed=length), max_tokens=60) for length in (400, 1, 340, 77)]


@pytest.fixture
def start(tiny_model):
    """Starts an engine with ranks in processes of their own, which end with the test."""
    started = []

    def start(compression, model=tiny_model, **parallel):
        started.append(Engine(model, **CACHE, compression=kv_compression(**compression), **parallel))
        return started[-1]

    yield start
    for engine in started:
        engine.llm.llm_engine.engine_core.shutdown()


def answer(engine: Engine) -> list[list[int]]:
    engine.drop_everything()
    evicted_before = engine.scheduler.compression_stats.evicted_tokens
    outputs = generate_each(engine.llm, REQUESTS)
    assert engine.scheduler.compression_stats.evicted_tokens - evicted_before > 1000
    assert sum(output.num_cached_tokens for output in outputs) > 0
    engine.assert_idle()
    return [list(output.outputs[0].token_ids) for output in outputs]


def next_turn(engine: Engine) -> list[int]:
    """Of a conversation whose first turn left a compressed prefix."""
    engine.drop_everything()
    (first,) = generate_each(engine.llm, REQUESTS[:1])
    history = [*REQUESTS[0]["prompt"], *first.outputs[0].token_ids, *random_prompt(20, seed=3)]
    before = engine.scheduler.compression_stats.prefix_hits
    (second,) = generate_each(engine.llm, [dict(prompt=history, max_tokens=30)])
    assert engine.scheduler.compression_stats.prefix_hits - before == 1 and second.num_cached_tokens >= 448
    engine.assert_idle()
    return list(second.outputs[0].token_ids)


@pytest.mark.parametrize("granularity", ["head", "page"])
def test_two_ranks_answer_as_one(granularity, start, tiny_filters, engines):
    compression = dict(COMPRESSION, filters=str(tiny_filters[0]), granularity=granularity)
    two, one = start(compression, tensor_parallel_size=2), engines.get(**compression, **CACHE)
    assert answer(two) == answer(one)
    assert next_turn(two) == next_turn(one)


def test_three_ranks_calibrate_and_their_heads_keep_the_same(start, empty_cache, tmp_path):
    """Each has one of the three KV heads, whose layers keep the tokens all heads agree on, as on one rank."""
    model = make_tiny_llama(tmp_path / "model", num_heads=6, num_kv_heads=3, vocab=576)  # each has a third
    found = answer(start(COMPRESSION, model, tensor_parallel_size=3))
    (path,) = (empty_cache / "qfilters").iterdir()
    assert found == answer(Engines(model, path).get(**COMPRESSION, **CACHE))


def test_two_ranks_that_hold_the_same_latents_answer_as_one(
    start, tiny_deepseek, deepseek_filters, deepseek_engines, monkeypatch, tmp_path
):
    """MLA: each has half of the query heads, and copies of the same keys, of which both keep the same."""
    compression = dict(COMPRESSION, filters=str(deepseek_filters[0]), rank=0)
    with prefixes_kept_with_cpu_mla():
        two = start(compression, tiny_deepseek, tensor_parallel_size=2, attention_backend="CPU_MLA")
    one = deepseek_engines.get(**compression, **CACHE)
    assert answer(two) == answer(one)
    assert next_turn(two) == next_turn(one)

    ranks = []
    monkeypatch.setattr(command, "assemble", lambda kept, num_tokens: ranks.extend(kept) or assemble(kept, num_tokens))
    found, expected = (command.inspect(engine.llm, REQUESTS[0]["prompt"], max_tokens=9) for engine in (two, one))
    assert ranks[0] == ranks[1] and len(ranks) == 3
    assert found.kept.shape == expected.kept.shape == (NUM_LAYERS, 1, 508)
    assert found.evicted_tokens > 256 and (found.kept == expected.kept).all()

    one.drop_everything()
    sequences, path, rank = [random_prompt(60, seed=3)], tmp_path / "filters.safetensors", LATENT + ROTARY
    two.llm.collective_rpc("calibrate_filters", args=(sequences, "", str(path), rank))
    calibrated = load(path, one.runner.identity)
    of_one = one.runner.calibrate_filters(sequences, "", rank)
    for name in ("filters", "query_mean_before_rope", "score_mean", "score_std"):
        torch.testing.assert_close(getattr(calibrated, name), getattr(of_one, name), atol=1e-3, rtol=1e-3)
    covariance, of_one_covariance = (made.query_factors.mT @ made.query_factors for made in (calibrated, of_one))
    torch.testing.assert_close(covariance, of_one_covariance, atol=1e-3, rtol=1e-3)


def test_two_pipeline_stages_calibrate_and_answer_as_one(start, engines, empty_cache):
    """One has one of the three layers, the other two. Two batches are in flight."""
    stages = start(COMPRESSION, pipeline_parallel_size=2)
    found, turn = answer(stages), next_turn(stages)
    (path,) = (empty_cache / "qfilters").iterdir()
    engine = engines.get(**COMPRESSION, **CACHE, filters=str(path))
    assert found == answer(engine) and turn == next_turn(engine)
    engine.drop_everything()
    expected, calibrated = (
        engine.runner.calibrate_filters(engine.runner._random_sequences(), ""),
        load(path, tiny_identity()),
    )
    torch.testing.assert_close(calibrated.filters, expected.filters, atol=1e-3, rtol=0)
    covariance, expected_covariance = (made.query_factors.mT @ made.query_factors for made in (calibrated, expected))
    torch.testing.assert_close(covariance, expected_covariance, atol=1e-3, rtol=1e-3)


def has_memory_node_for_second_engine() -> bool:
    """vLLM 0.33 gives each engine of a server a memory node of its own, and the worker of one for which there is none
    dies of an IndexError."""
    if "assigned_node_ids" not in inspect.signature(get_visible_memory_node).parameters:  # 0.32
        return True
    return bool(get_visible_memory_node([1]))


@pytest.mark.skipif(
    not has_memory_node_for_second_engine(), reason="vLLM 0.33 wants a memory node for each engine of a server on CPUs"
)
def test_two_engines_of_one_server_calibrate_and_answer_as_one(model_with_tokenizer, engines, empty_cache):
    flags = ["--data-parallel-size", "2", "--api-server-count", "1", "--dtype", "float32", "--block-size", str(BLOCK)]
    flags += ["--num-gpu-blocks-override", str(CACHE["num_blocks"]), "--max-model-len", str(CACHE["max_model_len"])]
    flags += ["--kv-cache-memory-bytes", str(1 << 28), "--max-num-batched-tokens", str(CACHE["max_batched"])]
    flags += ["--kv-compression", "qfilters", "--kv-compression-config", json.dumps({**COMPRESSION, "endpoint": True})]
    server = Server(model_with_tokenizer, *flags).wait()
    try:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)

        def ask(request) -> list[int]:
            extra = {"ignore_eos": True, "return_token_ids": True}
            return (
                client.completions.create(model="demo", temperature=0, extra_body=extra, **request).choices[0].token_ids
            )

        with concurrent.futures.ThreadPoolExecutor(len(REQUESTS)) as threads:
            found = list(threads.map(ask, REQUESTS))
        evicted = [server.metrics(engine=str(engine))["evicted_tokens_total"] for engine in (0, 1)]
        assert min(evicted) > 0 and server.metrics()["evicted_tokens_total"] == sum(evicted) > 1000
        assert server.sequences() == []
    finally:
        server.stop()
    (path,) = (empty_cache / "qfilters").iterdir()
    assert found == answer(engines.get(**COMPRESSION, **CACHE, filters=str(path)))
