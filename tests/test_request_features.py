"""LoRA adapters and structured output, each request with its own, and drafts for all of them, under compression."""

import json
import re

import pytest
import torch

from tests.engines import BLOCK, Engine, speculation, tokens_and_logprobs
from tests.models import make_tiny_adapter, make_tiny_filters, make_tiny_llama, make_tiny_tokenizer, random_prompt
from tests.run_engine import generate_each, run_engine
from vllm_qfilters import kv_compression

COMPRESSION = dict(budget=1024, window=48, sinks=4, interval=32, chunk=128)
EVICTING = {"kv_budget": 160}
REGEX = "([a-f]{3}[0-9]{2};){50}"
SCHEMA = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 40, "maxItems": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    make_tiny_llama(folder / "model")
    make_tiny_tokenizer(folder / "tokenizer")
    make_tiny_filters(folder / "filters.safetensors")
    make_tiny_adapter(folder / "adapter", folder / "model", folder / "merged")
    return folder


def llm_options(folder):
    tokenizer = dict(tokenizer=str(folder / "tokenizer"), skip_tokenizer_init=False)
    grammars = dict(structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True})
    # One slot more than adapters: see test_a_batch_answers_base_model_and_adapter_like_hugging_face.
    return dict(enable_lora=True, max_loras=2, max_lora_rank=8, **tokenizer, **grammars, **speculation(5))


@pytest.fixture(scope="module")
def engine(folder):
    compression = kv_compression("qfilters", filters=str(folder / "filters.safetensors"), **COMPRESSION)
    return Engine(folder / "model", 128, 1024, 256, compression, **llm_options(folder))


@pytest.fixture
def requests(folder):
    """Base model and adapter on one prompt; two grammars, one of them with the adapter, that end by themselves; one
    token.
    """
    prompt = random_prompt(300, seed=1)
    return [
        dict(prompt=prompt, max_tokens=150),
        dict(prompt=prompt, max_tokens=150, lora=str(folder / "adapter")),
        dict(prompt=prompt[:200], max_tokens=500, ignore_eos=False, structured_outputs={"regex": REGEX}),
        dict(
            prompt=prompt[:250],
            max_tokens=500,
            ignore_eos=False,
            structured_outputs={"json": SCHEMA},
            lora=str(folder / "adapter"),
        ),
        dict(prompt=[7], max_tokens=250),
    ]


def test_budget_above_length_is_bit_identical_to_plain_vllm(folder, engine, requests):
    llm = dict(
        dtype="float32", block_size=BLOCK, num_gpu_blocks_override=128,
        kv_cache_memory_bytes=1 << 28, max_model_len=1024,
        max_num_batched_tokens=256, max_num_seqs=16,
    )  # fmt: skip
    plain = run_engine(folder / "model", requests, None, **llm, **llm_options(folder))
    outputs = generate_each(engine.llm, requests)
    assert [tokens_and_logprobs(output) for output in outputs] == [
        (result["token_ids"], result["logprobs"]) for result in plain
    ]
    engine.assert_idle()


def test_a_batch_answers_base_model_and_adapter_like_hugging_face(folder, engine, requests):
    """Where adapters have a slot more than there are: vLLM 0.32's operators for CPUs take the base model's place in
    the last slot (docs/troubleshooting.md), so that plain vLLM 0.32 is no measure."""
    from transformers import LlamaForCausalLM

    base, adapted, *_ = generate_each(engine.llm, [dict(request, max_tokens=40) for request in requests[:2]])
    for output, model in ((base, folder / "model"), (adapted, folder / "merged")):
        llama = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        prompt = torch.tensor([requests[0]["prompt"]])
        expected = llama.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert list(output.outputs[0].token_ids) == expected[0, 300:].tolist()


def test_grammars_and_adapters_hold_while_tokens_are_evicted(folder, engine, requests):
    evicted_before = engine.scheduler.compression_stats.evicted_tokens
    requests = [dict(request, extra_args=EVICTING) for request in requests]
    outputs = generate_each(engine.llm, requests)
    assert engine.scheduler.compression_stats.evicted_tokens - evicted_before > 1000
    tokenizer = engine.llm.get_tokenizer()
    _, _, regex, schema, _ = (
        tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True) for output in outputs
    )
    assert re.fullmatch(REGEX, regex)
    assert len(json.loads(schema)) == 40
    engine.assert_idle()

    # An adapter does what the model it is merged into does, on an engine that knows neither adapters nor drafts.
    compression = kv_compression("qfilters", filters=str(folder / "filters.safetensors"), **COMPRESSION)
    merged = Engine(folder / "merged", 128, 1024, 256, compression)
    (base, adapted, *_), (expected,) = requests, generate_each(merged.llm, [requests[0]])
    assert engine.llm.reset_prefix_cache()
    (adapted,) = generate_each(engine.llm, [adapted])
    (base,) = generate_each(engine.llm, [base])
    ids, logprobs = tokens_and_logprobs(adapted)
    expected_ids, expected_logprobs = tokens_and_logprobs(expected)
    assert ids == expected_ids != tokens_and_logprobs(base)[0]
    torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected_logprobs), atol=1e-3, rtol=0)


def test_another_adapter_of_the_same_name_takes_no_pages_of_the_first_one(folder, engine):
    """While pages of the first one are cached, beyond the budget and within it."""
    other = make_tiny_adapter(folder / "other", folder / "model", folder / "other-merged", seed=6)
    prompt = random_prompt(300, seed=3)
    requests = [dict(prompt=prompt, max_tokens=60, extra_args=extra_args) for extra_args in (None, EVICTING)]

    def answers(adapter):
        outputs = [generate_each(engine.llm, [dict(request, lora=str(adapter))])[0] for request in requests]
        return [tokens_and_logprobs(output) for output in outputs]

    assert engine.llm.reset_prefix_cache()
    expected = answers(other)
    assert engine.llm.reset_prefix_cache()
    assert answers(folder / "adapter") != expected
    assert answers(other) == expected
    engine.assert_idle()
