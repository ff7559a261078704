"""Tensor parallelism: ranks hold different heads and evict the same counts."""

import pytest

from tests.models import random_prompt
from tests.run_engine import run_engine


@pytest.mark.parametrize("granularity", ["head", "page"])
def test_two_ranks_answer_as_one(granularity, tiny_model, tiny_filters, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    llm = dict(
        dtype="float32", block_size=32, skip_tokenizer_init=True, max_model_len=1024, kv_cache_memory_bytes=1 << 27,
        num_gpu_blocks_override=64,
    )  # fmt: skip
    compression = dict(
        method="qfilters", filters=str(tiny_filters[0]), budget=192, window=48, interval=32, chunk=128, granularity=granularity
    )
    requests = [dict(prompt=random_prompt(length, seed=length), max_tokens=120) for length in (500, 61)]
    one, two = (run_engine(tiny_model, requests, compression, **llm, tensor_parallel_size=ranks) for ranks in (1, 2))
    assert [result["token_ids"] for result in two] == [result["token_ids"] for result in one]
