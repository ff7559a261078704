"""What KV compression does not work with yet: refused by name, at start or at the request, saying what to change."""

from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_qfilters import cpu
from vllm_qfilters.budget import cdiv
from vllm_qfilters.config import FP8_CACHE_DTYPES
from vllm_qfilters.filters.format import ModelIdentity
from vllm_qfilters.filters.load import AUTO, find_filters
from vllm_qfilters.frontend.engine_args import CPU_WORKER_CLS, GPU_WORKER_CLS
from vllm_qfilters.policy import Policy

logger = init_logger("vllm.kv_compression")  # below "vllm", whose handlers print it


def check_supported(policy: Policy, vllm_config: VllmConfig) -> None:
    """Refuses engine configurations in the front end, before any process is started.

    Raises:
        ValueError: names the feature and what to change; also for filters that are given and do not fit.
    """
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    speculative, on_cpu = vllm_config.speculative_config, parallel.worker_cls == CPU_WORKER_CLS
    if on_cpu:
        has_fp8 = cpu.has_fp8_caches()
        where = "" if has_fp8 else f" on this CPU ({cpu.isa()}): fp8 caches need AVX-512 or AMX"
    else:
        has_fp8 = current_platform.is_cuda() and current_platform.has_device_capability(89)
        where = ""
    refused = {
        "pooling models, which keep no KV cache while decoding": model.runner_type == "pooling",
        "encoder-decoder models": model.is_encoder_decoder,
        "MLA (latent attention) models": model.use_mla,
        "models with M-RoPE positions": model.uses_mrope,
        "models whose generated tokens alone attend to a sliding window (R-SWA)": model.rswa_window is not None,
        "KV connectors; drop --kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "encoder-cache connectors; drop --ec-transfer-config": vllm_config.ec_transfer_config is not None,
        "KV cache events; drop --kv-events-config": vllm_config.kv_events_config is not None
        and vllm_config.kv_events_config.enable_kv_cache_events,
        "speculative decoding on GPUs yet; drop --speculative-config": speculative is not None and not on_cpu,
        "speculative decoding by models that draft and other methods; use ngram": (
            speculative is not None and speculative.method != "ngram"
        ),
        "speculative decoding with pipeline parallelism; drop --speculative-config or use --pipeline-parallel-size 1": (
            speculative is not None and parallel.pipeline_parallel_size > 1
        ),
        "pipeline parallelism with granularity 'page'; choose granularity 'layer' or 'head'": (
            parallel.pipeline_parallel_size > 1 and policy.evicts_whole_pages
        ),
        f"--kv-cache-dtype {cache.cache_dtype}{where}; use auto" + (" or fp8" if has_fp8 else ""): (
            is_quantized_kv_cache(cache.cache_dtype) and not (has_fp8 and cache.cache_dtype in FP8_CACHE_DTYPES)
        ),
        "context parallelism; use --decode-context-parallel-size 1": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "model runner V2 on CPUs; unset VLLM_USE_V2_MODEL_RUNNER": (on_cpu and vllm_config.use_v2_model_runner),
        "model runner V1 on GPUs; unset VLLM_USE_V2_MODEL_RUNNER and drop what vLLM's log says V2 does not support": (
            parallel.worker_cls == GPU_WORKER_CLS and not vllm_config.use_v2_model_runner
        ),
        "data parallelism of mixture-of-experts models, whose engines step together; use --data-parallel-size 1": (
            parallel.data_parallel_size > 1 and model.is_moe
        ),
        "microbatches; drop --enable-dbo": parallel.use_ubatching,
        "endpoint=True with several API servers, which share the statistics between them; use --api-server-count 1": (
            policy.endpoint and parallel._api_process_count > 1
        ),
        "--max-model-len auto, which looks for the longest context the cache holds uncompressed; give a number": (
            model.original_max_model_len == -1
        ),
    }
    for what, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"KV compression does not support {what}")
    policy.check_block_size(cache.block_size)
    if policy.filters is not None and policy.filters != AUTO:
        find_filters(policy.filters, ModelIdentity.from_model_config(model))
    if isinstance(policy.budget, int) and policy.budget >= model.max_model_len:
        logger.warning(
            "KV compression: budget %d is not below max_model_len %d: nothing will be evicted, except from requests that set a "
            "smaller kv_budget",
            policy.budget,
            model.max_model_len,
        )


def warn_of_slow_dtype(asked_dtype: str, vllm_config: VllmConfig) -> None:
    """Says what to give where ``--dtype auto`` became one that this CPU is slow in.

    Args:
        asked_dtype: the engine argument.
        vllm_config: what became of it.
    """
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    on_cpu = vllm_config.parallel_config.worker_cls == CPU_WORKER_CLS
    if on_cpu and asked_dtype == "auto" and dtype != "float32" and not cpu.has_fast_bfloat16():
        logger.warning(
            "--dtype auto serves this model in %s, for which this CPU (%s) has no fast matrix product: --dtype float32 reads "
            "prompts several times as fast",
            dtype,
            cpu.isa(),
        )


def check_request(policy: Policy, vllm_config: VllmConfig, request: Any) -> None:
    """Refuses a request in the front end, before the engine has seen it.

    Args:
        request: vLLM's ``EngineCoreRequest``; its ``max_tokens`` is resolved.

    Raises:
        VLLMValidationError: its ``kv_budget`` is no budget, or lets it grow beyond the whole cache (HTTP 400).
    """
    params = request.sampling_params
    if params is None:
        return
    if request.resumable:
        raise VLLMValidationError("KV compression does not support streaming input sessions")
    prompt_tokens = (
        len(request.prompt_token_ids) if request.prompt_token_ids is not None else len(request.prompt_embeds)
    )
    try:
        limits = policy.request_limits(params.extra_args, prompt_tokens, vllm_config.cache_config.block_size)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error
    if limits is not None and request.mm_features and vllm_config.model_config.is_mm_prefix_lm:
        raise VLLMValidationError(
            "KV compression does not support images in prompts of models that attend to them in both directions: set kv_budget to "
            "0, which switches compression off for the request"
        )
    num_blocks = vllm_config.cache_config.num_gpu_blocks
    if not num_blocks:
        return
    length = min(prompt_tokens + params.max_tokens, vllm_config.model_config.max_model_len)
    resident = length if limits is None else limits.max_resident_tokens(length)
    needed, usable = cdiv(resident, vllm_config.cache_config.block_size), num_blocks - 1  # one is vLLM's null block
    if needed > usable:
        raise VLLMValidationError(
            f"this request can come to hold {resident} tokens ({needed} pages), the whole KV cache has {usable} pages: set a "
            "smaller kv_budget or max_tokens, or give the server more --kv-cache-memory-bytes"
        )
