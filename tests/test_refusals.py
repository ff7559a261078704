"""Bad requests are refused with a reason, and leave nothing behind. Engines that cannot work are refused at start."""

import contextlib
import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma4TextConfig, LlamaConfig
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.exceptions import VLLMValidationError
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

from tests.marks import needs_fp8_caches
from tests.models import HEAD_SIZE, NUM_KV_HEADS, NUM_LAYERS, random_prompt, tiny_identity
from vllm_qfilters import cpu, kv_compression
from vllm_qfilters.attention import FP8_DTYPES
from vllm_qfilters.config import FP8_CACHE_DTYPES, KVCompressionConfig
from vllm_qfilters.frontend import support
from vllm_qfilters.frontend.engine_args import CPU_WORKER_CLS, GPU_WORKER_CLS
from vllm_qfilters.frontend.support import REFUSALS, Start, check_request, check_supported, warn_of_slow_dtype
from vllm_qfilters.policy import Policy, resolve
from vllm_qfilters.worker import specs
from vllm_qfilters.worker.specs import check_cuda_graphs, check_specs

OPTIONS = dict(budget=128, window=32, sinks=4, interval=32, chunk=128, num_blocks=64)


def policy_of(**options) -> Policy:
    return resolve(KVCompressionConfig(**options))


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
    with pytest.raises(
        VLLMValidationError, match=r"kv_budget=129: at least 130 tokens .* interval 32, in whole pages of 32"
    ):
        engine.add(random_prompt(10, seed=0), kv_budget=129)
    engine.add(random_prompt(10, seed=0), max_tokens=2, kv_budget=130)
    engine.run()
    engine.assert_idle()


@pytest.mark.parametrize(
    "key", ["kv_buget", "kv-budget", "kV_evikt", "kvBudget", "kv_window", "k_budget", "budget", "distinct_share"]
)
def test_what_a_request_cannot_set_is_refused_with_what_it_can(key, engines):
    engine = engines.get(**OPTIONS)
    names = "is given as 'kv_budget', .* evicts as 'kv_evict'; other options of KV compression are for the server"
    with pytest.raises(VLLMValidationError, match=f"unknown extra argument '{key}': .* {names}"):
        engine.add(random_prompt(10, seed=0), extra_args={key: 100})
    engine.assert_idle()


@pytest.mark.parametrize(
    "key", ["kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode", "session_id", "token_budget", "window"]
)
def test_extra_arguments_of_others_pass(key):
    config = SimpleNamespace(cache_config=SimpleNamespace(block_size=32, num_gpu_blocks=None))
    params = SamplingParams(extra_args={key: 1, "kv_budget": 512})
    request = SimpleNamespace(sampling_params=params, resumable=False, prompt_token_ids=[1, 2], mm_features=None)
    check_request(policy_of(), config, request)


def test_the_front_end_resolves_the_policy_once_for_all_requests(engines, monkeypatch):
    engine = engines.get(**OPTIONS)
    engine.add(random_prompt(10, seed=0), max_tokens=1)
    monkeypatch.setattr(Policy, "from_vllm_config", lambda vllm_config: pytest.fail("resolved again"))
    engine.add(random_prompt(10, seed=1), max_tokens=1)
    engine.run()


@pytest.mark.parametrize(
    "llm, reason",
    [
        (dict(block_size=64), "interval=32 is not a multiple of the block size 64: set interval to 64"),
        # vLLM's own for CPUs: at the door up to 0.32, in the worker from 0.33 on.
        (dict(block_size=None), "interval=32 is not a multiple of the block size 128: set interval to 128"),
        (
            dict(speculative_config={"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 2}),
            "KV compression does not support speculative decoding by models that draft and other methods; use ngram",
        ),
        (
            dict(
                speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2},
                pipeline_parallel_size=2,
            ),
            "KV compression does not support speculative decoding with pipeline parallelism",
        ),
        (
            dict(speculative_config={"method": "draft_model", "model": "itself", "num_speculative_tokens": 2}),
            "KV compression does not support speculative decoding by models that draft and other methods; use ngram",
        ),
        (
            dict(
                hf_overrides={"sliding_window": 128, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
            ),
            r"budget=128: at least 163 tokens are needed for window 32 \(at least 127, which the model's sliding "
            r"windows reach back\)",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_engine_that_cannot_work_is_refused_at_start(llm, reason, tiny_model):
    from vllm import LLM

    compression = kv_compression("random_once", budget=128, window=32, sinks=4, interval=32, chunk=128)
    arguments = dict(
        block_size=32, skip_tokenizer_init=True, enforce_eager=True, kv_cache_memory_bytes=1 << 26, max_model_len=512
    )
    if llm.get("speculative_config", {}).get("model"):
        llm = dict(speculative_config={**llm["speculative_config"], "model": str(tiny_model)})
    with pytest.raises(Exception, match=reason):
        LLM(str(tiny_model), **{**arguments, **llm}, **compression)


def supported_config() -> SimpleNamespace:
    """What :func:`check_supported` reads of a VllmConfig; a real one lets every start of an engine fail if a name
    changes.
    """
    return SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type="generate", is_encoder_decoder=False, use_mla=False, rswa_window=None, architecture="Llama",
            original_max_model_len=4096, max_model_len=4096, is_moe=True, is_hybrid=False, hf_text_config=LlamaConfig(),
            is_attention_free=False, uses_alibi=False, attention_chunk_size=None,
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1,
            use_ubatching=False, worker_cls=CPU_WORKER_CLS, data_parallel_size=1,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=32, kv_sharing_fast_prefill=False),
        kv_transfer_config=None,
        ec_transfer_config=None,
        kv_events_config=None,
        speculative_config=None,
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(fuse_rope_kvcache_cat_mla=False)),
        use_v2_model_runner=False,
    )  # fmt: skip


def nemotron_nas(heads_in_group: tuple[int | None, ...]) -> SimpleNamespace:
    """What is read of its configuration; None: a layer without attention."""
    blocks = [
        SimpleNamespace(attention=SimpleNamespace(no_op=number is None, n_heads_in_group=number))
        for number in heads_in_group
    ]
    return SimpleNamespace(block_configs=blocks, num_attention_heads=32)


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("model_config.runner_type", "pooling", "pooling models"),
        ("model_config.is_encoder_decoder", True, "encoder-decoder models"),
        (
            "model_config.hf_text_config",
            Gemma4TextConfig(num_hidden_layers=6),
            r"models whose layers differ in the number or the size of their KV heads, unless those",
        ),
        ("model_config.architecture", "FlintForCausalLM", r"models that write keys and values themselves, .*: Flint"),
        (
            "model_config.hf_text_config",
            nemotron_nas((8, 4, None)),
            r"models whose layers differ in the number or the size",
        ),
        (
            "model_config.hf_text_config",
            LlamaConfig(param_sink_number=128),
            "models that put sinks of their own into the",
        ),
        ("model_config.is_attention_free", True, r"models without attention \(Mamba\), which keep no KV cache"),
        ("model_config.uses_alibi", True, "ALiBi, which takes a token's place in the cache for its position"),
        (
            "model_config.attention_chunk_size",
            8192,
            r"models with layers that attend to chunks of the sequence \(Llama",
        ),
        (
            "model_config.architecture",
            "JambaForCausalLM",
            "models that keep states of Mamba 1 beside .*: JambaForCausalLM",
        ),
        ("model_config.architecture", "BailingMoeV2_5ForCausalLM", "models that keep states of lightning attention"),
        ("model_config.architecture", "HrmTextForCausalLM", "models whose prompts attend in both directions: HrmText"),
        (
            "model_config.architecture",
            "IQuestLoopCoderForCausalLM",
            "models whose layers run again with a KV cache",
        ),
        ("model_config.architecture", "Step1ForCausalLM", "models with ALiBi: Step1ForCausalLM"),
        ("model_config.architecture", "MiMoV2ForCausalLM", r"models whose values are narrower than keys .* on CPUs"),
        ("model_config.rswa_window", 128, r"models whose generated tokens alone attend to a sliding window \(R-SWA\)"),
        ("model_config.original_max_model_len", -1, "--max-model-len auto"),
        ("cache_config.kv_sharing_fast_prefill", True, "prompts that stop before the layers without a KV cache"),
        ("kv_transfer_config", SimpleNamespace(), "KV connectors; drop --kv-transfer-config"),
        ("ec_transfer_config", SimpleNamespace(), "encoder-cache connectors; drop --ec-transfer-config"),
        ("kv_events_config", SimpleNamespace(enable_kv_cache_events=True), "KV cache events; drop --kv-events-config"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config.prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config.data_parallel_size", 2, "data parallelism of mixture-of-experts models"),
        ("parallel_config.use_ubatching", True, "microbatches; drop --enable-dbo"),
        ("parallel_config.worker_cls", GPU_WORKER_CLS, "model runner V1 on GPUs; unset VLLM_USE_V2_MODEL_RUNNER"),
        ("use_v2_model_runner", True, "model runner V2 on CPUs; unset VLLM_USE_V2_MODEL_RUNNER"),
        pytest.param(
            "cache_config.cache_dtype",
            "int4_per_token_head",
            "--kv-cache-dtype int4_per_token_head; use auto or fp8",
            marks=needs_fp8_caches,
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, value, reason):
    config, compression = supported_config(), policy_of(method="random_once", interval=32, chunk=128)
    check_supported(compression, config)
    *path, attribute = name.split(".")
    setattr(getattr(config, path[0]) if path else config, attribute, value)
    with pytest.raises(ValueError, match=f"KV compression does not support {reason}"):
        check_supported(compression, config)


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("model_config.is_hybrid", True, r"MLA \(latent attention\) models that have states beside their attention"),
        (
            "model_config.hf_text_config",
            SimpleNamespace(index_topk=2048),
            r"MLA \(latent attention\) models whose attention goes by a sparse indexer",
        ),
        ("cache_config.cache_dtype", "fp8", "--kv-cache-dtype fp8 with MLA; use auto"),
        (
            "compilation_config.pass_config",
            SimpleNamespace(fuse_rope_kvcache_cat_mla=True),
            "the compiler pass that fuses RoPE and the write of keys with MLA",
        ),
    ],
)
def test_what_mla_is_not_supported_with_is_refused_by_name(name, value, reason):
    config, compression = supported_config(), policy_of(method="keydiff", interval=32, chunk=128)
    config.model_config.use_mla = True
    check_supported(compression, config)
    part, attribute = name.split(".")
    setattr(getattr(config, part), attribute, value)
    with pytest.raises(ValueError, match=f"KV compression does not support {reason}"):
        check_supported(compression, config)


def test_mla_on_gpus_needs_a_backend_that_is_not_the_default_there(monkeypatch):
    config, compression = supported_config(), policy_of(method="keydiff", interval=32, chunk=128)
    config.model_config.use_mla = True
    monkeypatch.setattr(support.current_platform, "is_cuda", lambda: True)
    for backend in (None, AttentionBackendEnum.FLASH_ATTN_MLA):
        config.attention_config = SimpleNamespace(backend=backend)
        with pytest.raises(ValueError, match="MLA .* on GPUs .*; use --attention-backend TRITON_MLA"):
            check_supported(compression, config)
    config.attention_config.backend = AttentionBackendEnum.TRITON_MLA
    check_supported(compression, config)


@pytest.mark.parametrize("method", ["knorm", "lagkv", "cur"])
def test_methods_that_need_keys_and_values_of_heads_are_refused_with_mla(method):
    config, compression = supported_config(), policy_of(method=method, interval=32, chunk=128)
    config.model_config.use_mla = True
    reason = (
        f"method '{method}' with MLA .* choose among qfilters, streaming, keydiff, random, random_once, snapkv, tova"
    )
    with pytest.raises(ValueError, match=reason):
        check_supported(compression, config)


def test_resuming_without_the_prefix_cache_is_refused():
    config = supported_config()
    config.cache_config.enable_prefix_caching = False
    check_supported(policy_of(method="random_once", interval=32, chunk=128), config)
    with pytest.raises(ValueError, match="prefix='resume' without vLLM's prefix caching; drop --no-enable-prefix"):
        check_supported(policy_of(method="random_once", interval=32, chunk=128, prefix="resume"), config)


def test_a_refusal_that_cannot_be_evaluated_hides_no_other():
    config, compression = supported_config(), policy_of(method="random_once", interval=32, chunk=128)
    del config.model_config.use_mla  # as if vLLM had renamed it
    with pytest.raises(AttributeError, match="use_mla"):
        check_supported(compression, config)
    config.parallel_config.use_ubatching = True
    with pytest.raises(ValueError, match="KV compression does not support microbatches"):
        check_supported(compression, config)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.message[:30])
def test_no_refusal_applies_to_what_is_supported(refusal):
    start = Start(policy_of(method="random_once", interval=32, chunk=128), supported_config())
    assert not refusal.applies(start)
    assert refusal.message.format(start=start)


@pytest.mark.parametrize("has_avx512", [True, False])
def test_fp8_caches_are_refused_on_cpus_that_have_none(has_avx512, monkeypatch):
    """As vLLM has it: its attention raises in the worker on such a CPU, and not before."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_avx512)
    config, compression = supported_config(), policy_of(method="random_once", interval=32, chunk=128)
    config.cache_config.cache_dtype = "fp8"
    if has_avx512:
        check_supported(compression, config)
        assert _get_attn_isa(torch.bfloat16, 32, 64, "fp8") == "vec"
        return
    reason = r"--kv-cache-dtype fp8 on this CPU \(AVX2\): fp8 caches need AVX-512 or AMX; use auto"
    with pytest.raises(ValueError, match=reason):
        check_supported(compression, config)
    with pytest.raises(NotImplementedError, match="AVX-512 or AMX"):
        _get_attn_isa(torch.bfloat16, 32, 64, "fp8")


@pytest.mark.parametrize(
    "has_fast_bfloat16, asked, dtype, is_warned",
    [
        (False, "auto", torch.bfloat16, True),
        (False, "auto", torch.float16, True),
        (False, "auto", torch.float32, False),
        (False, "bfloat16", torch.bfloat16, False),
        (True, "auto", torch.bfloat16, False),
    ],
)
def test_a_dtype_this_cpu_is_slow_in_is_warned_of(has_fast_bfloat16, asked, dtype, is_warned, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_fast_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    config = supported_config()
    config.model_config.dtype = dtype
    warn_of_slow_dtype(asked, config)
    assert ("--dtype float32 reads prompts several times as fast" in caplog.text) == is_warned
    assert cpu.fast_dtype() == ("bfloat16" if has_fast_bfloat16 else "float32")


def test_speculation_on_gpus_is_refused_by_name_and_pipelines_are_not():
    config, compression = supported_config(), policy_of(method="random_once", interval=32, chunk=128)
    config.parallel_config.worker_cls, config.use_v2_model_runner = GPU_WORKER_CLS, True
    config.parallel_config.pipeline_parallel_size = 2
    check_supported(compression, config)
    config.speculative_config, config.parallel_config.pipeline_parallel_size = SimpleNamespace(method="ngram"), 1
    with pytest.raises(ValueError, match="KV compression does not support speculative decoding on GPUs"):
        check_supported(compression, config)


def test_pages_in_pipelines_are_refused_by_name():
    config, compression = supported_config(), policy_of(method="random_once", interval=32, chunk=128)
    config.parallel_config.pipeline_parallel_size = 2
    check_supported(compression, config)
    with pytest.raises(
        ValueError, match="KV compression does not support pipeline parallelism with granularity 'page'"
    ):
        check_supported(dataclasses.replace(compression, granularity="page"), config)


@pytest.mark.parametrize(
    "uses, modality, max_tokens, kv_budget, reason",
    [
        ("is_mm_prefix_lm", "image", 1, 512, "models that attend to them in both directions: set kv_budget to 0"),
        ("is_mm_prefix_lm", "image", 1, 0, None),
        ("is_mm_prefix_lm", None, 1, 512, None),
        ("uses_mrope", "image", 511, 512, "can come to 513 tokens, up to its budget of 512 none is evicted"),
        ("uses_mrope", "video", 5000, 512, "with M-RoPE, .* can come to 4096 tokens"),
        ("uses_mrope", "image", 510, 512, None),
        ("uses_mrope", "image", 5000, 0, None),
        ("uses_mrope", "prompt_embeds", 5000, 512, None),
        ("uses_mrope", None, 5000, 512, None),
        ("neither", "image", 5000, 512, None),
    ],
)
def test_media_are_refused_where_positions_or_attention_are_not_those_of_text(
    uses, modality, max_tokens, kv_budget, reason
):
    model = SimpleNamespace(is_mm_prefix_lm=False, uses_mrope=False, max_model_len=4096)
    setattr(model, uses, True)
    config = SimpleNamespace(model_config=model, cache_config=SimpleNamespace(block_size=32, num_gpu_blocks=None))
    params = SamplingParams(max_tokens=max_tokens, extra_args={"kv_budget": kv_budget})
    features = [SimpleNamespace(modality=modality)] if modality else []
    request = SimpleNamespace(sampling_params=params, resumable=False, prompt_token_ids=[1, 2], mm_features=features)
    refused = pytest.raises(VLLMValidationError, match=reason) if reason else contextlib.nullcontext()
    with refused:
        check_request(policy_of(allow_kv_budget_off=True), config, request)


@pytest.mark.parametrize(
    "spec_cls, change, reason",
    [
        (
            ChunkedLocalAttentionSpec,
            dict(attention_chunk_size=128),
            "sliding windows, but second has a ChunkedLocalAttentionSpec",
        ),
        (
            SlidingWindowSpec,
            dict(sliding_window=129),
            "keeps the 128 tokens .* as its sliding window, but second has one of 129",
        ),
        (FullAttentionSpec, dict(attention_chunk_size=128), "chunked or non-causal attention, which second has"),
        (FullAttentionSpec, dict(non_causal=True), "chunked or non-causal attention, which second has"),
        (FullAttentionSpec, dict(head_size_v=96), "values wider than keys: those of second have 96 and 64"),
        (FullAttentionSpec, dict(head_size_v=32), "second has 2 of 64 and 32 .*, the first one 2 of 64 and 64"),
        (FullAttentionSpec, dict(page_size_padded=1 << 20), "the cache layout of second"),
        (FullAttentionSpec, dict(num_kv_heads=4), "second has 4 of 64 and 64 .*, the first one 2 of 64 and 64"),
        (
            FullAttentionSpec,
            dict(dtype=torch.uint8),
            "second is torch.uint8, .* torch.float32; drop --kv-cache-dtype-skip",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else getattr(value, "__name__", ""),
)
def test_layers_that_are_not_all_alike_are_refused(spec_cls, change, reason):
    usual = dict(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32)
    first = FullAttentionSpec(**usual)
    config = dataclasses.replace(policy_of(), sliding_window=128)
    sliding = {f"window {window}": SlidingWindowSpec(**usual, sliding_window=window) for window in (128, 4096)}
    check_specs(config, {"first": first, "second": first, **sliding}, max_model_len=4096)
    with pytest.raises(ValueError, match=reason):
        check_specs(config, {"first": first, "second": spec_cls(**{**usual, **change})}, max_model_len=4096)


def test_layers_that_a_configuration_does_not_tell_of_are_refused(monkeypatch):
    monkeypatch.setattr(specs, "get_pp_group", lambda: SimpleNamespace(world_size=1))
    monkeypatch.setattr(specs, "get_tensor_model_parallel_world_size", lambda: 1)
    model, layer = tiny_identity(), SimpleNamespace(num_kv_heads=NUM_KV_HEADS, head_size=HEAD_SIZE)
    specs.check_identity(model, [layer] * NUM_LAYERS)
    for layers in ([layer] * 2 * NUM_LAYERS, [SimpleNamespace(num_kv_heads=NUM_KV_HEADS, head_size=96)] * NUM_LAYERS):
        with pytest.raises(ValueError, match="expected 3 with 2 of 32: choose a method without filters"):
            specs.check_identity(model, layers)


def test_values_narrower_than_keys_are_refused_where_vllm_does_not_attend_to_them():
    narrow = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, head_size_v=32, dtype=torch.float32)
    check_specs(policy_of(), {"first": narrow}, max_model_len=4096)
    with pytest.raises(ValueError, match="narrower than keys .MiMo-V2. on CPUs, .* those of first have 32 and 64"):
        check_specs(policy_of(), {"first": narrow}, max_model_len=4096, attends_to_narrow_values=False)


@pytest.mark.parametrize("method", ["snapkv", "tova"])
def test_any_full_graphs_are_refused_where_generated_tokens_are_observed(method):
    for mode in (CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE):
        with pytest.raises(ValueError, match=f"method '{method}' .* use cudagraph_mode PIECEWISE"):
            check_cuda_graphs(policy_of(method=method), mode)
    for mode in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE):
        check_cuda_graphs(policy_of(method=method), mode)


def test_vllm_s_names_of_fp8_caches_stand_for_the_same_in_front_end_and_worker():
    assert tuple(FP8_DTYPES) == FP8_CACHE_DTYPES


def test_full_graphs_of_prompts_are_refused_where_queries_are_observed():
    with pytest.raises(
        ValueError, match=r"observed=32: .* use cudagraph_mode FULL_AND_PIECEWISE, .* or set observed to 0"
    ):
        check_cuda_graphs(policy_of(), CUDAGraphMode.FULL)
    check_cuda_graphs(policy_of(observed=0), CUDAGraphMode.FULL)
    for mode in (
        CUDAGraphMode.NONE,
        CUDAGraphMode.PIECEWISE,
        CUDAGraphMode.FULL_DECODE_ONLY,
        CUDAGraphMode.FULL_AND_PIECEWISE,
    ):
        check_cuda_graphs(policy_of(), mode)


def test_filters_of_another_model_are_refused_at_start(tiny_model, tmp_path):
    from vllm import LLM

    from tests.models import layer_names, tiny_identity
    from vllm_qfilters.filters.format import Filters, save

    path = tmp_path / "other.safetensors"
    save(path, Filters(torch.ones(3, 4, 32), layer_names()), tiny_identity())
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
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("WARNING", logger="vllm.kv_compression"):
        engines.get(budget=2048, max_model_len=1024, num_blocks=40)
    assert "budget 2048 is not below max_model_len 1024: nothing will be evicted" in caplog.text
