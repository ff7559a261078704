"""Engines whose model torch.compile has compiled, as vLLM serves it unless told otherwise. Those of all other tests are
eager."""

import pytest
import torch
from torch._dynamo.utils import counters
from vllm.compilation.counter import compilation_counter

from tests import run_engine
from tests.forks import in_forks
from tests.models import random_prompt

LLM = dict(
    block_size=32,
    kv_cache_memory_bytes=1 << 26,
    max_model_len=512,
    max_num_batched_tokens=128,
    skip_tokenizer_init=True,
    dtype="float32",
)
REQUESTS = [dict(prompt=random_prompt(length, seed=length), max_tokens=40) for length in (150, 70)]
EVICTING = dict(budget=96, window=24, sinks=4, interval=32, chunk=64, prefill_interval=32)


def run_compiled(model, compression: dict | None) -> list[dict]:
    """What :func:`tests.run_engine.run_engine` returns. One engine after the other, so that the next one finds in
    Inductor's cache what the last one compiled."""
    (results,) = in_forks(_run_compiled, (str(model), compression))
    return results


def _run_compiled(model: str, compression: dict | None) -> list[dict]:
    torch._dynamo.config.disable = False  # PyTorch read the environment when it was imported
    results = run_engine._run(model, REQUESTS, compression, dict(LLM, enforce_eager=False))
    assert compilation_counter.num_models_seen and counters["frames"]["ok"] and counters["inductor"], "it is eager"
    return results


@pytest.fixture(autouse=True)
def compiled(empty_cache, monkeypatch):
    monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "0")  # else what was traced runs as it is
    return empty_cache


def test_budget_above_length_is_bit_identical_to_plain_vllm(tiny_model, tiny_filters):
    options = dict(EVICTING, budget=256, filters=str(tiny_filters[0]))
    assert run_compiled(tiny_model, options) == run_compiled(tiny_model, None)


def test_evicts_as_an_eager_engine_does(tiny_model, tiny_filters, compiled):
    """Under other options too, for which what was compiled before is found."""
    for others in ({}, dict(budget=160, granularity="head")):
        options = EVICTING | dict(filters=str(tiny_filters[0])) | others
        found, eager = run_compiled(tiny_model, options), run_engine.run_engine(tiny_model, REQUESTS, options, **LLM)
        for ours, theirs in zip(found, eager, strict=True):
            assert ours["token_ids"] == theirs["token_ids"]
            logprobs = torch.tensor(ours["logprobs"]), torch.tensor(theirs["logprobs"])
            torch.testing.assert_close(*logprobs, atol=2e-4, rtol=0)
    assert len(list((compiled / "torch_compile_cache" / "torch_aot_compile").iterdir())) == 1
