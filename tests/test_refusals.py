"""Bad requests are refused with a reason, and leave nothing behind. Engines that cannot work are refused at start."""

import pytest
from vllm.exceptions import VLLMValidationError

from tests.models import random_prompt
from vllm_qfilters import kv_compression

OPTIONS = dict(budget=128, window=32, sinks=4, interval=32, chunk=128, num_blocks=64)


@pytest.mark.parametrize(
    "kv_budget, reason",
    [
        (-1, r"kv_budget=-1: give tokens \(an integer > 0\)"),
        (1.5, r"kv_budget=1.5: .*fraction of the prompt"),
        ("many", "kv_budget='many'"),
        (True, "kv_budget=True"),
        ([512], r"kv_budget=\[512\]"),
        (67, "kv_budget=67: at least 68 tokens are needed for window 32 [+] sinks 4 [+] interval 32"),
    ],
    ids=str,
)
def test_a_bad_kv_budget_is_refused(kv_budget, reason, engines):
    engine = engines.get(**OPTIONS)
    with pytest.raises(VLLMValidationError, match=reason):
        engine.add(random_prompt(10, seed=0), kv_budget=kv_budget)
    engine.assert_idle()


def test_a_kv_budget_of_too_few_pages_is_refused(engines):
    engine = engines.get(**dict(OPTIONS, budget=192), granularity="page")
    with pytest.raises(VLLMValidationError, match="kv_budget=129: at least 130 tokens .* interval 32, in whole pages of 32"):
        engine.add(random_prompt(10, seed=0), kv_budget=129)
    engine.add(random_prompt(10, seed=0), max_tokens=2, kv_budget=130)
    engine.run()
    engine.assert_idle()


@pytest.mark.parametrize(
    "llm, reason",
    [
        (dict(block_size=64), "interval=32 is not a multiple of the block size 64: set interval to 64"),
        (dict(kv_cache_dtype="fp8"), "KV compression does not support --kv-cache-dtype fp8"),
        (
            dict(speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}),
            "KV compression does not support speculative decoding; drop --speculative-config",
        ),
        (dict(hf_overrides={"sliding_window": 128, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}), "ull attention"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_engine_that_cannot_work_is_refused_at_start(llm, reason, tiny_model):
    from vllm import LLM

    compression = kv_compression("random", budget=128, window=32, sinks=4, interval=32, chunk=128)
    arguments = dict(block_size=32, skip_tokenizer_init=True, enforce_eager=True, kv_cache_memory_bytes=1 << 26, max_model_len=512)
    with pytest.raises(Exception, match=reason):
        LLM(str(tiny_model), **{**arguments, **llm}, **compression)


def test_filters_of_another_model_are_refused_at_start(tiny_model, tmp_path):
    import torch
    from vllm import LLM

    from tests.models import tiny_identity
    from vllm_qfilters.filters.format import Filters, save

    path = tmp_path / "other.safetensors"
    save(path, Filters(torch.ones(3, 4, 32)), tiny_identity())
    with pytest.raises(ValueError, match=r"shape \(3, 4, 32\), but .* needs \(3, 2, 32\)"):
        LLM(
            str(tiny_model),
            block_size=32,
            skip_tokenizer_init=True,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 26,
            max_model_len=512,
            **kv_compression("qfilters", budget=512, filters=str(path)),
        )


def test_a_budget_nobody_reaches_is_said_to_have_no_effect(engines, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("WARNING", logger="vllm.kv_compression"):
        engines.get(budget=2048, max_model_len=1024, num_blocks=40)
    assert "budget 2048 is not below max_model_len 1024: nothing will be evicted" in caplog.text
