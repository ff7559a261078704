"""Tensor and pipeline parallelism: ranks hold different heads or layers and evict the same counts."""

import pytest
import torch

from tests.engines import Engine
from tests.models import random_prompt, tiny_identity
from tests.run_engine import generate_each
from vllm_qfilters import kv_compression
from vllm_qfilters.filters.format import load

COMPRESSION = dict(budget=192, window=48, interval=32, chunk=128)
CACHE = dict(num_blocks=64, max_model_len=1024, max_batched=256)
SHARED = random_prompt(160, seed=1)
REQUESTS = [dict(prompt=random_prompt(length, seed=length), max_tokens=70) for length in (500, 61)]
# Four more, that wait for one another's pages, and find pages of one another.
REQUESTS += [dict(prompt=SHARED + random_prompt(length, seed=length), max_tokens=60) for length in (400, 1, 340, 77)]


@pytest.fixture
def start(tiny_model):
    """Starts an engine with ranks in processes of their own, which end with the test."""
    started = []

    def start(compression, **parallel):
        started.append(Engine(tiny_model, **CACHE, compression=kv_compression(**compression), **parallel))
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


@pytest.mark.parametrize("granularity", ["head", "page"])
def test_two_ranks_answer_as_one(granularity, start, tiny_filters, engines):
    compression = dict(COMPRESSION, filters=str(tiny_filters[0]), granularity=granularity)
    assert answer(start(compression, tensor_parallel_size=2)) == answer(engines.get(**compression, **CACHE))


def test_two_pipeline_stages_calibrate_and_answer_as_one(start, engines, monkeypatch, tmp_path):
    """One has one of the three layers, the other two. Two batches are in flight."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    found = answer(start(COMPRESSION, pipeline_parallel_size=2))
    (path,) = (tmp_path / "qfilters").iterdir()
    engine = engines.get(**COMPRESSION, **CACHE, filters=str(path))
    assert found == answer(engine)
    engine.drop_everything()
    expected, calibrated = engine.runner.calibrate_filters(engine.runner._random_sequences(), ""), load(path, tiny_identity())
    torch.testing.assert_close(calibrated.filters, expected.filters, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        calibrated.query_second_before_rope, expected.query_second_before_rope, atol=1e-3, rtol=1e-3
    )
