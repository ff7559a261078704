"""A budget no sequence reaches must not change a single bit of what plain vLLM computes."""

import pytest

from tests.marks import needs_fp8_caches
from tests.models import random_prompt
from tests.run_engine import run_engines

LLM = dict(kv_cache_memory_bytes=1 << 28, num_gpu_blocks_override=128, max_model_len=2048, max_num_batched_tokens=256)
REQUESTS = [
    dict(prompt=random_prompt(length, seed=length), max_tokens=tokens, prompt_logprobs=logprobs)
    for length, tokens, logprobs in ((900, 150, 0), (17, 300, None), (300, 200, None), (431, 64, 0), (1, 40, None))
]


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"),
    [("bfloat16", "auto"), ("float32", "auto"), pytest.param("bfloat16", "fp8", marks=needs_fp8_caches)],
)
def test_budget_above_length_is_bit_identical_to_plain_vllm(dtype, kv_cache_dtype, tiny_model, tiny_filters):
    llm = dict(LLM, dtype=dtype, kv_cache_dtype=kv_cache_dtype, block_size=32, skip_tokenizer_init=True)
    compression = dict(method="qfilters", budget=1536, filters=str(tiny_filters[0]))
    plain, compressed = run_engines(tiny_model, REQUESTS, [None, compression], **llm)
    assert [len(result["prompt_logprobs"]) for result in plain] == [900, 0, 0, 431, 0]
    assert compressed == plain
