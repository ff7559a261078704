"""What KV compression does not work with yet: refused by name, at start or at the request, saying what to change."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import vllm
from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_qfilters import cpu
from vllm_qfilters.budget import cdiv
from vllm_qfilters.config import (
    EVICT_PRESSURE,
    FP8_CACHE_DTYPES,
    REQUEST_BUDGET_KEY,
    REQUEST_EVICT_KEY,
    KVCompressionConfig,
)
from vllm_qfilters.filters.format import ModelIdentity, kv_shapes
from vllm_qfilters.filters.load import AUTO, given_file
from vllm_qfilters.frontend.engine_args import CPU_WORKER_CLS, GPU_WORKER_CLS
from vllm_qfilters.frontend.versions import base_model_gets_last_adapter
from vllm_qfilters.methods.catalog import METHODS
from vllm_qfilters.policy import Policy

logger = init_logger("vllm.kv_compression")  # below "vllm", whose handlers print it

# Keys of a request's extra arguments that begin like ours and are vLLM's.
_KEYS_OF_VLLM = frozenset({"kv_transfer_params", "kv_cache_report_mode"})
# Of vLLM 0.33: one goes by the name of the backend, which is that of vLLM's own, the other always does.
WRITES_ITS_CACHE = frozenset({"BeamForCausalLM", "FlintForCausalLM"})
# Of vLLM 0.32 and 0.33, by what their configurations do not say of them.
NOT_SUPPORTED = {
    "BailingMoeV2_5ForCausalLM": "models that keep states of lightning attention beside attention",
    "HrmTextForCausalLM": "models whose prompts attend in both directions",
    "IQuestLoopCoderForCausalLM": "models whose layers run again with a KV cache and a sliding window of their own",
    "JambaForCausalLM": "models that keep states of Mamba 1 beside attention",
    "Step1ForCausalLM": "models with ALiBi",
}
HAS_NARROW_VALUES = frozenset({"MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM", "MiMoV2OmniForCausalLM"})
BUDGET_BESIDE_STATES = 8192  # tokens: what such models lose with less is in docs/budget.md
# Options that a request cannot set, but for those whose names others may use for arguments of their own.
_OPTIONS_OF_SERVERS = frozenset(field.name for field in dataclasses.fields(KVCompressionConfig) if "_" in field.name)
_ALIKE = 0.8  # of 1: "budget" is as like "kv_budget", "token_budget" is not


@dataclasses.dataclass(frozen=True)
class Start:
    """What an engine is about to be started with. The messages of :data:`REFUSALS` are formatted with it."""

    policy: Policy
    config: VllmConfig

    @property
    def model(self) -> ModelConfig:
        return self.config.model_config

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel_config

    @property
    def cache(self) -> CacheConfig:
        return self.config.cache_config

    @property
    def speculative(self) -> SpeculativeConfig | None:
        return self.config.speculative_config

    @property
    def is_on_cpu(self) -> bool:
        return self.parallel.worker_cls == CPU_WORKER_CLS

    @property
    def has_fp8_caches(self) -> bool:
        if self.model.use_mla:
            return False
        if self.is_on_cpu:
            return cpu.has_fp8_caches()
        return bool(current_platform.is_cuda() and current_platform.has_device_capability(89))

    @property
    def why_no_fp8_caches(self) -> str:
        if self.model.use_mla:
            return " with MLA"
        if not self.is_on_cpu or self.has_fp8_caches:
            return ""
        return f" on this CPU ({cpu.isa()}): fp8 caches need AVX-512 or AMX"

    @property
    def cache_dtypes(self) -> str:
        return "auto or fp8" if self.has_fp8_caches else "auto"

    @property
    def has_unsupported_cache_dtype(self) -> bool:
        dtype = self.cache.cache_dtype
        return is_quantized_kv_cache(dtype) and not (self.has_fp8_caches and dtype in FP8_CACHE_DTYPES)

    @property
    def latent_methods(self) -> str:
        return ", ".join(name for name, entry in METHODS.items() if entry.reads_latents)


class Refusal(NamedTuple):
    """``applies`` to a start that cannot work; ``message`` says with what, and what to change."""

    applies: Callable[[Start], bool]
    message: str


def _is(architecture: str) -> Callable[[Start], bool]:
    return lambda start: bool(start.model.architecture == architecture)


def _has_other_kv_heads_in_some_layers(start: Start) -> bool:
    """Of those that are compressed."""
    return len(kv_shapes(start.model.hf_text_config, with_windows=not start.policy.beside.window)) > 1


# Of models by their configuration alone.
MODEL_REFUSALS = (
    Refusal(
        lambda start: start.model.runner_type == "pooling", "pooling models, which keep no KV cache while decoding"
    ),
    Refusal(lambda start: start.model.is_encoder_decoder, "encoder-decoder models"),
    Refusal(lambda start: start.model.is_attention_free, "models without attention (Mamba), which keep no KV cache"),
    Refusal(
        lambda start: start.model.uses_alibi,
        "ALiBi, which takes a token's place in the cache for its position (Bloom, MPT)",
    ),
    Refusal(
        lambda start: start.model.attention_chunk_size is not None,
        "models with layers that attend to chunks of the sequence (Llama 4)",
    ),
    Refusal(
        lambda start: getattr(start.model.hf_text_config, "param_sink_number", 0) > 0,
        "models that put sinks of their own into the KV cache (openPangu Pro MoE V2)",
    ),
    Refusal(
        lambda start: start.model.use_mla and start.model.is_hybrid,
        "MLA (latent attention) models that have states beside their attention (Kimi-Linear, Ling 2.6)",
    ),
    Refusal(
        lambda start: start.model.use_mla and hasattr(start.model.hf_text_config, "index_topk"),
        "MLA (latent attention) models whose attention goes by a sparse indexer (DeepSeek V3.2 and V4, GLM-5)",
    ),
    Refusal(
        lambda start: bool(getattr(start.model.hf_text_config, "sparse_attention_config", None)),
        "models some of whose layers attend to what an indexer chooses (MiniMax M3)",
    ),
    Refusal(
        lambda start: start.model.use_mla and not start.policy.entry.reads_latents,
        "method '{start.policy.method}' with MLA (latent attention) models, whose cache has no keys and values of "
        "heads; choose among {start.latent_methods}",
    ),
    Refusal(
        lambda start: start.model.architecture in WRITES_ITS_CACHE,
        "models that write keys and values themselves, past vLLM's attention backends (Beam, Flint): {start.model."
        "architecture}",
    ),
    *(Refusal(_is(architecture), f"{what}: {architecture}") for architecture, what in NOT_SUPPORTED.items()),
    Refusal(
        lambda start: start.model.rswa_window is not None,
        "models whose generated tokens alone attend to a sliding window (R-SWA)",
    ),
    Refusal(
        lambda start: start.model.is_hybrid and start.policy.beside.window > 0,
        "models that keep states beside attention and have sliding windows (Inkling)",
    ),
    Refusal(
        lambda start: start.policy.beside.splits_attention,
        "models of which many more layers attend than keep a state, so that vLLM has several KV cache groups of them",
    ),
    Refusal(
        _has_other_kv_heads_in_some_layers,
        "models whose layers differ in the number or the size of their KV heads, unless those of full attention agree "
        "and are in a KV cache group of their own; drop --disable-hybrid-kv-cache-manager and use "
        "--pipeline-parallel-size 1",
    ),
)
REFUSALS = (
    *MODEL_REFUSALS,
    Refusal(
        lambda start: (
            start.model.use_mla
            and current_platform.is_cuda()
            and start.config.attention_config.backend is not AttentionBackendEnum.TRITON_MLA
        ),
        "MLA (latent attention) models on GPUs with the attention backend that vLLM chooses there; use "
        "--attention-backend TRITON_MLA",
    ),
    Refusal(
        lambda start: start.is_on_cpu and start.model.architecture in HAS_NARROW_VALUES,
        "models whose values are narrower than keys (MiMo-V2) on CPUs, where vLLM has no attention for them",
    ),
    Refusal(
        lambda start: start.cache.kv_sharing_fast_prefill,
        "prompts that stop before the layers without a KV cache of their own; drop --kv-sharing-fast-prefill",
    ),
    Refusal(lambda start: start.config.kv_transfer_config is not None, "KV connectors; drop --kv-transfer-config"),
    Refusal(
        lambda start: start.config.ec_transfer_config is not None,
        "encoder-cache connectors; drop --ec-transfer-config",
    ),
    Refusal(
        lambda start: (
            start.config.kv_events_config is not None and start.config.kv_events_config.enable_kv_cache_events
        ),
        "KV cache events; drop --kv-events-config",
    ),
    Refusal(
        lambda start: start.speculative is not None and not start.is_on_cpu,
        "speculative decoding on GPUs yet; drop --speculative-config",
    ),
    Refusal(
        lambda start: start.speculative is not None and start.speculative.method != "ngram",
        "speculative decoding by models that draft and other methods; use ngram",
    ),
    Refusal(
        lambda start: start.speculative is not None and start.parallel.pipeline_parallel_size > 1,
        "speculative decoding with pipeline parallelism; drop --speculative-config or use --pipeline-parallel-size 1",
    ),
    Refusal(
        lambda start: start.model.is_hybrid and start.speculative is not None,
        "speculative decoding of models that keep states beside attention; drop --speculative-config",
    ),
    Refusal(
        lambda start: start.model.is_hybrid and start.parallel.pipeline_parallel_size > 1,
        "pipeline parallelism of models that keep states beside attention; use --pipeline-parallel-size 1",
    ),
    Refusal(
        lambda start: start.model.is_hybrid and start.config.scheduler_config.disable_hybrid_kv_cache_manager is True,
        "models that keep states beside attention in one KV cache group; drop --disable-hybrid-kv-cache-manager",
    ),
    Refusal(
        lambda start: start.model.is_hybrid and start.cache.prefix_match_unit is not None,
        "prefix cache hits within a page; drop --prefix-match-unit",
    ),
    Refusal(
        lambda start: start.model.is_hybrid and start.policy.evict == EVICT_PRESSURE,
        "evict='pressure' of models that keep states beside attention; use evict='always'",
    ),
    Refusal(
        lambda start: start.parallel.pipeline_parallel_size > 1 and start.policy.evicts_whole_pages,
        "pipeline parallelism with granularity 'page'; choose granularity 'layer' or 'head'",
    ),
    Refusal(
        lambda start: start.has_unsupported_cache_dtype,
        "--kv-cache-dtype {start.cache.cache_dtype}{start.why_no_fp8_caches}; use {start.cache_dtypes}",
    ),
    Refusal(
        lambda start: (
            start.parallel.decode_context_parallel_size > 1 or start.parallel.prefill_context_parallel_size > 1
        ),
        "context parallelism; use --decode-context-parallel-size 1",
    ),
    Refusal(
        lambda start: start.is_on_cpu and start.config.use_v2_model_runner,
        "model runner V2 on CPUs; unset VLLM_USE_V2_MODEL_RUNNER",
    ),
    Refusal(
        lambda start: start.parallel.worker_cls == GPU_WORKER_CLS and not start.config.use_v2_model_runner,
        "model runner V1 on GPUs; unset VLLM_USE_V2_MODEL_RUNNER and drop what vLLM's log says V2 does not support",
    ),
    Refusal(
        lambda start: start.parallel.data_parallel_size > 1 and start.model.is_moe,
        "data parallelism of mixture-of-experts models, whose engines step together; use --data-parallel-size 1",
    ),
    Refusal(
        lambda start: start.model.use_mla and start.config.compilation_config.pass_config.fuse_rope_kvcache_cat_mla,
        "the compiler pass that fuses RoPE and the write of keys with MLA, which would leave no token stats; set "
        "--compilation-config.pass_config.fuse_rope_kvcache_cat_mla to false",
    ),
    Refusal(lambda start: start.parallel.use_ubatching, "microbatches; drop --enable-dbo"),
    Refusal(
        lambda start: start.policy.resumes and not start.cache.enable_prefix_caching,
        "prefix='resume' without vLLM's prefix caching; drop --no-enable-prefix-caching",
    ),
    Refusal(
        lambda start: start.policy.resumes and start.policy.beside.number > 0,
        "prefix='resume' of models with sliding windows or states in KV cache groups of their own, of which it keeps "
        "nothing; use prefix='exact'",
    ),
    Refusal(
        lambda start: start.policy.endpoint and start.parallel._api_process_count > 1,
        "endpoint=True with several API servers, which share the statistics between them; use --api-server-count 1",
    ),
    Refusal(
        lambda start: start.model.original_max_model_len == -1,
        "--max-model-len auto, which looks for the longest context the cache holds uncompressed; give a number",
    ),
)


def check_supported(policy: Policy, vllm_config: VllmConfig) -> None:
    """Refuses engine configurations in the front end, before any process is started.

    Raises:
        ValueError: names the feature and what to change; also for filters that are given and do not fit.
    """
    refuse(Start(policy, vllm_config), REFUSALS)
    policy.check_block_size(vllm_config.cache_config.block_size)
    model = vllm_config.model_config
    if policy.filters is not None and policy.filters != AUTO:
        given_file(policy.filters, ModelIdentity.from_model_config(model), policy.rank)
    if policy.beside.num_states and isinstance(policy.budget, int) and policy.budget < BUDGET_BESIDE_STATES:
        logger.warning(
            "KV compression: where layers keep states beside attention, few others can look up what is evicted: budget "
            "%d is below the %d tokens that docs/budget.md advises for such models",
            policy.budget,
            BUDGET_BESIDE_STATES,
        )
    if isinstance(policy.budget, int) and policy.budget >= model.max_model_len:
        logger.warning(
            "KV compression: budget %d is not below max_model_len %d: nothing will be evicted, except from requests "
            "that set a smaller kv_budget",
            policy.budget,
            model.max_model_len,
        )


def refuse(start: Start, refusals: Iterable[Refusal]) -> None:
    """Raises ValueError for the first refusal that applies. One that cannot be evaluated hides no other: what it raised
    is raised if none applies."""
    failure: Exception | None = None
    for refusal in refusals:
        try:
            applies = refusal.applies(start)
        except Exception as error:
            failure = failure or error
            continue
        if applies:
            raise ValueError(f"KV compression does not support {refusal.message.format(start=start)}")
    if failure is not None:
        raise failure


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
            "--dtype auto serves this model in %s, for which this CPU (%s) has no fast matrix product: --dtype float32 "
            "reads prompts several times as fast",
            dtype,
            cpu.isa(),
        )


def warn_of_base_requests_with_adapters(vllm_config: VllmConfig) -> None:
    """Says how many slots adapters need on CPUs where the base model is the adapter in the last one."""
    on_cpu = vllm_config.parallel_config.worker_cls == CPU_WORKER_CLS
    if vllm_config.lora_config is not None and on_cpu and base_model_gets_last_adapter(vllm.__version_tuple__):
        logger.warning(
            "--enable-lora on CPUs: vLLM answers requests for the base model with the adapter in the last of its "
            "--max-loras %d slots, if there is one: give one slot more than adapters that run at once",
            vllm_config.lora_config.max_loras,
        )


def check_request(policy: Policy, vllm_config: VllmConfig, request: Any) -> None:
    """Refuses a request in the front end, before the engine has seen it.

    Args:
        request: vLLM's ``EngineCoreRequest``; its ``max_tokens`` is resolved.

    Raises:
        VLLMValidationError: its ``kv_budget`` is misspelt or no budget, or lets it grow beyond the whole cache (HTTP
            400).
    """
    params = request.sampling_params
    if params is None:
        return
    if request.resumable:
        raise VLLMValidationError("KV compression does not support streaming input sessions")
    for key in params.extra_args or ():
        if _is_misspelt(key):
            raise VLLMValidationError(
                f"unknown extra argument {key!r}: the budget of a request is given as {REQUEST_BUDGET_KEY!r}, e.g. "
                f'"vllm_xargs": {{"{REQUEST_BUDGET_KEY}": 1024}}, when it evicts as {REQUEST_EVICT_KEY!r}; other '
                "options of KV compression are for the server to set"
            )
    prompt_tokens = (
        len(request.prompt_token_ids) if request.prompt_token_ids is not None else len(request.prompt_embeds)
    )
    block_size = vllm_config.cache_config.block_size
    try:
        limits = policy.request_limits(params.extra_args, prompt_tokens, block_size)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error
    if limits is not None and request.mm_features:
        _check_media(request, limits.budget, prompt_tokens, vllm_config.model_config)
    num_blocks = vllm_config.cache_config.num_gpu_blocks
    if not num_blocks:
        return
    length = min(prompt_tokens + params.max_tokens, vllm_config.model_config.max_model_len)
    resident = length if limits is None else limits.max_resident_tokens(length)
    needed, usable = cdiv(resident, block_size), num_blocks - 1  # one is vLLM's null block
    if policy.beside.number:
        needed += policy.beside.pages(length, vllm_config.max_in_flight_tokens, block_size)
    if needed > usable:
        raise VLLMValidationError(
            f"this request can come to hold {resident} tokens ({needed} pages), the whole KV cache has {usable} pages: "
            "set a smaller kv_budget or max_tokens, or give the server more --kv-cache-memory-bytes"
        )


def _check_media(request: Any, budget: int, prompt_tokens: int, model: ModelConfig) -> None:
    """Refuses images and the like in the prompt of a request that is compressed, where they are not supported."""
    switch_off = "set kv_budget to 0, which switches compression off for the request, where allow_kv_budget_off lets it"
    if model.is_mm_prefix_lm:
        raise VLLMValidationError(
            "KV compression does not support images in prompts of models that attend to them in both directions: "
            + switch_off
        )
    # Embeddings in place of tokens stand at the positions of text.
    has_media = any(feature.modality != "prompt_embeds" for feature in request.mm_features)
    length = min(prompt_tokens + request.sampling_params.max_tokens, model.max_model_len)
    if model.uses_mrope and has_media and length > budget:
        raise VLLMValidationError(
            "KV compression does not support images, videos and audio in prompts of models with M-RoPE, whose "
            f"positions then fall behind the number of tokens: this request can come to {length} tokens, up to its "
            f"budget of {budget} none is evicted; set a smaller max_tokens, or {switch_off}"
        )


def _is_misspelt(key: str) -> bool:
    """Whether a key of a request's extra arguments is none that anybody reads, and looks like ours."""
    if key in (REQUEST_BUDGET_KEY, REQUEST_EVICT_KEY) or key in _KEYS_OF_VLLM:
        return False
    lower = key.lower()
    is_alike = bool(difflib.get_close_matches(lower, [REQUEST_BUDGET_KEY], cutoff=_ALIKE))
    return lower.startswith("kv") or is_alike or lower in _OPTIONS_OF_SERVERS
