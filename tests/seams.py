"""The places where this package holds on to vLLM, beside what it imports: for the tests and scripts/check_vllm.py.

Functions have their parameters by name, in order. ``DIFFERENCES`` has what the supported versions of vLLM do not share,
everything else is the same in all of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Differences:
    """What one version has in its own way.

    Attributes:
        imported: ``module:name`` of what is imported from another module in another version.
        overridden, called, attributes: as the tables below.
    """

    imported: Sequence[str] = ()
    overridden: Mapping[str, str] = dataclasses.field(default_factory=dict)
    called: Mapping[str, str] = dataclasses.field(default_factory=dict)
    attributes: Sequence[str] = ()


# Oldest first.
MLA_IMPLS = ("amx_mla:AMXMLAImpl", "cpu_mla:CPUMLAImpl", "triton_mla:TritonMLAImpl")
WRITES_LATENTS = [f"vllm.v1.attention.backends.mla.{impl}.do_kv_cache_update" for impl in MLA_IMPLS]
LATENT = "self kv_c_normed k_pe kv_cache slot_mapping kv_cache_dtype k_scale"

DIFFERENCES = {
    (0, 32): Differences(
        imported=["vllm.entrypoints.serve.utils.api_utils:cli_env_setup"],
        overridden={
            "vllm.v1.core.sched.async_scheduler:AsyncScheduler._get_local_prefix_cache_hit": "self request",
            **dict.fromkeys(WRITES_LATENTS, LATENT),
        },
        called={
            "vllm.v1.worker.gpu.block_table:BlockTables.gather_block_tables": (
                "self idx_mapping num_reqs_padded out out_ptrs"
            ),
        },
    ),
    (0, 33): Differences(
        imported=["vllm.entrypoints.common.startup:cli_env_setup"],
        overridden={
            "vllm.v1.core.sched.async_scheduler:AsyncScheduler._get_local_prefix_cache_hit": (
                "self request max_cache_hit_length"
            ),
            "vllm.v1.outputs:AsyncModelRunnerOutput.get_kv_connector_output": "self",
            **dict.fromkeys(WRITES_LATENTS, f"{LATENT} skip_scale"),
        },
        called={
            # Leaves out pages below the window of a SlidingWindowSpec, by positions: no cache of ours has such a spec.
            "vllm.v1.worker.gpu.block_table:BlockTables.gather_block_tables": (
                "self idx_mapping num_reqs_padded out out_ptrs num_computed_tokens"
            ),
        },
        # False in our backends. Under another name a model's own kernel would write keys and no token stats.
        attributes=[
            "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend.supports_kv_cache_update_bypass",
            "vllm.v1.attention.backends.flashinfer:FlashInferBackend.supports_kv_cache_update_bypass",
            "vllm.v1.attention.backends.triton_attn:TritonAttentionBackend.supports_kv_cache_update_bypass",
        ],
    ),
}


def differences(version: tuple[int, ...]) -> Differences:
    """Of the newest supported version that is no newer than ``version``, or of the oldest one."""
    known = [each for each in DIFFERENCES if each <= version[:2]]
    return DIFFERENCES[max(known, default=min(DIFFERENCES))]


# Replaced in compat.py.
PATCHED = {
    "vllm.engine.arg_utils:EngineArgs.add_cli_args": "parser",
    "vllm.engine.arg_utils:EngineArgs.from_cli_args": "cls args",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "self usage_context headless",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
        "self request_id prompt params supported_tasks arrival_time lora_request tokenization_kwargs trace_headers "
        "priority data_parallel_rank resumable session_id kv_hints"
    ),
    "vllm.v1.metrics.loggers:StatLoggerManager.__init__": (
        "self vllm_config engine_idxs custom_stat_loggers enable_default_loggers aggregate_engine_logging client_count"
    ),
    "vllm.plugins:load_endpoint_plugins": "supported_tasks",
    "vllm.config.vllm:VllmConfig.compute_hash": "self include_version",
    "vllm.v1.worker.startup_plan:compute_plan_fingerprint": "vllm_config rank world_size",
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_beam_search_params": (
        "self max_tokens default_sampling_params"
    ),
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params": (
        "self max_tokens default_sampling_params"
    ),
}

# Methods that subclasses of ours override; tests/test_compat.py finds those that are missing here.
OVERRIDDEN = {
    "vllm.model_executor.layers.attention.mla_attention:MLACommonMetadataBuilder.build": (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    "vllm.v1.attention.backends.mla.amx_mla:AMXMLABackend.get_builder_cls": "",
    "vllm.v1.attention.backends.mla.amx_mla:AMXMLABackend.get_impl_cls": "",
    "vllm.v1.attention.backends.mla.amx_mla:AMXMLAMetadataBuilder.build": (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    "vllm.v1.attention.backends.mla.cpu_mla:CPUMLABackend.get_builder_cls": "",
    "vllm.v1.attention.backends.mla.cpu_mla:CPUMLABackend.get_impl_cls": "",
    "vllm.v1.attention.backends.mla.triton_mla:TritonMLABackend.get_builder_cls": "",
    "vllm.v1.attention.backends.mla.triton_mla:TritonMLABackend.get_impl_cls": "",
    "vllm.v1.attention.backends.mla.triton_mla:TritonMLAMetadataBuilder.build": (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build": (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend.get_builder_cls": "",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.build": (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    "vllm.v1.attention.backends.flashinfer:FlashInferBackend.get_builder_cls": "",
    "vllm.v1.attention.backends.flashinfer:FlashInferMetadataBuilder.build": (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionBackend.get_builder_cls": "",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder.build": (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.get_builder_cls": "",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.get_impl_cls": "",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update": (
        "self layer key value kv_cache slot_mapping"
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": (
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend.get_impl_cls": "",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update": (
        "self layer key value kv_cache slot_mapping"
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward": (
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
    ),
    "vllm.v1.attention.backends.flashinfer:FlashInferBackend.get_impl_cls": "",
    "vllm.v1.attention.backends.flashinfer:FlashInferImpl.do_kv_cache_update": (
        "self layer key value kv_cache slot_mapping"
    ),
    "vllm.v1.attention.backends.flashinfer:FlashInferImpl.forward": (
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionBackend.get_impl_cls": "",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.do_kv_cache_update": (
        "self layer key value kv_cache slot_mapping"
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward": (
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
    ),
    "vllm.v1.attention.backends.flash_attn_diffkv:FlashAttentionDiffKVBackend.get_builder_cls": "",
    "vllm.v1.attention.backends.flash_attn_diffkv:FlashAttentionDiffKVBackend.get_impl_cls": "",
    "vllm.v1.attention.backends.flash_attn_diffkv:FlashAttentionDiffKVBackend.set_head_size_v": "cls head_size_v",
    "vllm.v1.attention.backends.flash_attn_diffkv:FlashAttentionDiffKVImpl.do_kv_cache_update": (
        "self layer key value kv_cache slot_mapping"
    ),
    "vllm.v1.attention.backends.flash_attn_diffkv:FlashAttentionDiffKVImpl.forward": (
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
    ),
    "vllm.v1.attention.backends.triton_attn_diffkv:TritonAttentionDiffKVBackend.get_builder_cls": "",
    "vllm.v1.attention.backends.triton_attn_diffkv:TritonAttentionDiffKVBackend.get_impl_cls": "",
    "vllm.v1.attention.backends.triton_attn_diffkv:TritonAttentionDiffKVBackend.set_head_size_v": "cls head_size_v",
    "vllm.v1.attention.backends.triton_attn_diffkv:TritonAttentionDiffKVImpl.do_kv_cache_update": (
        "self layer key value kv_cache slot_mapping"
    ),
    "vllm.v1.attention.backends.triton_attn_diffkv:TritonAttentionDiffKVImpl.forward": (
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
    ),
    "vllm.v1.attention.backends.triton_attn_diffkv:TritonAttentionDiffKVMetadataBuilder.build": (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler.__init__": "self *args **kwargs",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._free_blocks": "self request",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._free_request_blocks": "self request",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._reserve_prefill_lookahead": (
        "self request num_computed_tokens num_new_tokens"
    ),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule": "self scheduler_output",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_request_with_output": (
        "self request new_token_ids is_stale"
    ),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler.add_request": "self request",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler.schedule": "self throttle_prefills",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler.update_from_output": "self scheduler_output model_runner_output",
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.add_local_computed_blocks": (
        "self request_id new_computed_blocks num_local_computed_tokens num_external_computed_tokens"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks": (
        "self request_id num_tokens num_tokens_main_model"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks": (
        "self request num_tokens retention_interval replay_boundaries"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.get_num_blocks_to_allocate": (
        "self request_id num_tokens new_computed_blocks total_computed_tokens num_local_computed_tokens "
        "num_tokens_main_model apply_admission_cap prefill_end"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.pop_blocks_for_free": "self request_id",
    "vllm.v1.kv_cache_interface:FullAttentionSpec.max_memory_usage_bytes": "self vllm_config",
    "vllm.v1.kv_cache_interface:FullAttentionSpec.merge": "cls specs",
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.__init__": "self vllm_config engine_indexes",
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.log_engine_initialized": "self",
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase.record": (
        "self scheduler_stats iteration_stats mm_cache_stats engine_idx"
    ),
    "vllm.v1.outputs:AsyncModelRunnerOutput.get_output": "self",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.__init__": "self vllm_config device",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner._prepare_inputs": "self scheduler_output num_scheduled_tokens",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner._update_states": "self scheduler_output",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.execute_model": "self scheduler_output intermediate_tensors",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.get_kv_cache_spec": "self",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.initialize_kv_cache": (
        "self kv_cache_config is_profiling kv_cache_allocation_context"
    ),
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.sample_tokens": "self grammar_output",
    "vllm.v1.worker.cpu_worker:CPUWorker.__init__": (
        "self vllm_config local_rank rank distributed_init_method is_driver_worker"
    ),
    "vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model": "self",
    "vllm.v1.worker.cpu_worker:CPUWorker.init_device": "self",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.__init__": "self vllm_config device",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": (
        "self scheduler_output intermediate_tensors dummy_run skip_attn_for_dummy_run is_profile context_len "
        "valid_dummy_state_slots randomize_inputs"
    ),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.finish_requests": "self scheduler_output",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.get_kv_cache_spec": "self",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache": (
        "self kv_cache_config is_profiling kv_cache_allocation_context"
    ),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs": (
        "self scheduler_output batch_req_state batch_desc num_active_loras"
    ),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens": "self grammar_output",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.update_requests": "self scheduler_output",
    "vllm.v1.worker.gpu_worker:Worker.__init__": (
        "self vllm_config local_rank rank distributed_init_method is_driver_worker"
    ),
    "vllm.v1.worker.gpu_worker:Worker._make_model_runner": "self",
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model": "self",
    "vllm.v1.worker.gpu_worker:Worker.determine_available_memory": "self",
}

# Functions and methods called, of those a release may well change.
CALLED = {
    "vllm.config.model:ModelConfig.get_sliding_window": "self",
    "vllm.distributed.device_communicators.pynccl:PyNcclCommunicator.all_reduce": "self in_tensor out_tensor op stream",
    "vllm.entrypoints.llm:LLM.collective_rpc": "self method timeout args kwargs",
    "vllm.entrypoints.llm:LLM.enqueue": (
        "self prompts sampling_params lora_request priority use_tqdm tokenization_kwargs mm_processor_kwargs"
    ),
    "vllm.entrypoints.llm:LLM.enqueue_chat": (
        "self messages sampling_params use_tqdm lora_request priority chat_template chat_template_content_format "
        "add_generation_prompt continue_final_message tools chat_template_kwargs tokenization_kwargs "
        "mm_processor_kwargs"
    ),
    "vllm.entrypoints.llm:LLM.from_engine_args": "cls engine_args",
    "vllm.entrypoints.llm:LLM.generate": (
        "self prompts sampling_params use_tqdm lora_request priority tokenization_kwargs mm_processor_kwargs"
    ),
    "vllm.entrypoints.llm:LLM.wait_for_completion": "self use_tqdm",
    "vllm.model_executor.models.interfaces:IsHybrid.get_mamba_state_shape_from_config": "cls vllm_config",
    "vllm.model_executor.models.registry:_ModelRegistry.resolve_model_cls": "self architectures model_config",
    "vllm.model_executor.models.utils:extract_layer_index": "layer_name num_attn_module",
    "vllm.model_executor.layers.attention.mla_attention:MLAAttention.forward_impl": (
        "self q k_c_normed k_pe kv_cache attn_metadata output output_scale output_block_scale quant_group_size "
        "quant_scale_ue8m0 quant_col_major quant_tma_aligned q_dcp_replicated"
    ),
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.attach_router": "self app",
    "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.init_state": "self engine_client state args",
    "vllm.plugins:load_general_plugins": "",
    "vllm.utils.torch_utils:async_tensor_h2d": "data device dtype out",
    "vllm.v1.attention.backends.registry:register_backend": "backend class_path is_mamba",
    "vllm.v1.core.block_pool:BlockPool._insert_block_hash": "self block_hash_with_group_id block num_tokens",
    "vllm.v1.core.block_pool:BlockPool._remove_cached_block_hashes": "self block",
    "vllm.v1.core.block_pool:BlockPool.evict_blocks": "self block_ids",
    "vllm.v1.core.block_pool:BlockPool.free_blocks": "self ordered_blocks",
    "vllm.v1.core.block_pool:BlockPool.get_cached_block": "self block_hash kv_cache_group_ids",
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": "self num_blocks",
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks": "self",
    "vllm.v1.core.block_pool:BlockPool.is_block_writable": "self block",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.remove": "self block",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.prefix_cache_lookup_enabled": "self request",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.create_kv_cache_blocks": "self blocks",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.find_longest_cache_hit": (
        "self block_hashes max_cache_hit_length"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.cache_blocks": (
        "self request num_tokens retention_interval replay_boundaries"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager.get_num_blocks_to_allocate": (
        "self request_id num_tokens new_computed_blocks total_computed_tokens num_local_computed_tokens "
        "num_tokens_main_model apply_admission_cap prefill_end"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.pop_blocks_for_free": "self request_id",
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": "self request timestamp drop_stale_output",
    "vllm.v1.core.kv_cache_utils:make_block_hash_with_group_id": "block_hash group_id",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered": "cls vllm_config",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register": (
        "cls kvcache_spec_cls manager_class uniform_type_base_spec"
    ),
    "vllm.v1.metrics.buckets:histogram_buckets": "family max_model_len overrides",
    "vllm.v1.worker.block_table:BlockTable.add_row": "self block_ids row_idx",
    "vllm.v1.worker.block_table:BlockTable.clear_row": "self row_idx",
    "vllm.v1.worker.block_table:MultiGroupBlockTable.__getitem__": "self idx",
    "vllm.v1.worker.block_table:BlockTable.compute_slot_mapping": "self num_reqs query_start_loc positions",
    "vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings": (
        "self idx_mapping query_start_loc positions num_tokens_padded out"
    ),
    "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor.stage_write": "self index start x",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.capture_model": "self profile_only",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_dummy_attn": "self input_batch valid_state_slots",
    "vllm.v1.worker.utils:select_common_block_size": "kv_manager_block_size backends kv_cache_specs",
}

# Read, of objects of vLLM.
ATTRIBUTES = [
    "vllm.v1.attention.backend:CommonAttentionMetadata.seq_lens",
    "vllm.v1.attention.backend:CommonAttentionMetadata.seq_lens_cpu_upper_bound",
    "vllm.v1.attention.backend:CommonAttentionMetadata.max_seq_len",
    "vllm.v1.attention.backend:CommonAttentionMetadata._num_computed_tokens_cache",
    "vllm.v1.worker.utils:AttentionGroup.metadata_builders",
    "vllm.v1.worker.block_table:MultiGroupBlockTable.block_tables",
    "vllm.v1.worker.gpu.block_table:BlockTables.block_table_ptrs",
    "vllm.v1.worker.gpu.block_table:BlockTables.block_table_strides",
    "vllm.v1.worker.gpu.block_table:BlockTables.block_sizes_tensor",
    "vllm.v1.worker.gpu.block_table:BlockTables.slot_mapping_enabled",
    "vllm.v1.worker.gpu.block_table:BlockTables.slot_mappings",
    "vllm.v1.worker.gpu.block_table:BlockTables.cp_size",
    "vllm.config.model:ModelConfig.is_hybrid",
    "vllm.config.model:ModelConfig.is_mm_prefix_lm",
    "vllm.config.model:ModelConfig.rswa_window",
    "vllm.config.model:ModelConfig.attention_chunk_size",
    "vllm.config.model:ModelConfig.is_attention_free",
    "vllm.config.model:ModelConfig.use_mla",
    "vllm.config.model:ModelConfig.uses_alibi",
    "vllm.config:VllmConfig.additional_config",
    "vllm.model_executor.layers.attention.attention:Attention.kv_sharing_target_layer_name",
    "vllm.model_executor.layers.attention.attention:Attention.sliding_window",
    "vllm.config.cache:CacheConfig.kv_sharing_fast_prefill",
    *(
        f"vllm.model_executor.layers.attention.mla_attention:MLAAttention.{name}"
        for name in ("kv_cache_dtype", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "use_sparse")
    ),
    *(f"vllm.v1.attention.backends.mla.amx_mla:AMXMLAImpl.{name}" for name in ("_w_uk_packed", "_w_scale")),
    "vllm.v1.attention.selector:_cached_get_attn_backend",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.sliding_window",
    *(
        f"vllm.v1.attention.backends.{backend}Impl.{name}"
        for backend in (
            "cpu_attn:CPUAttentionBackend",
            "flash_attn:FlashAttention",
            "flashinfer:FlashInfer",
            "triton_attn:TritonAttention",
        )
        for name in ("scale", "logits_soft_cap", "sinks")
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.window_size",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.single_type_managers",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.coordinator",
    "vllm.v1.core.block_pool:BlockPool.free_block_queue",
    "vllm.v1.core.block_pool:BlockPool.hash_block_size",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.fake_free_list_head",
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.num_free_blocks",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock.block_hash_num_tokens",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock.next_free_block",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock.prev_free_block",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock.block_id",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock.ref_cnt",
    "vllm.v1.core.sched.output:SchedulerOutput.finished_req_ids",
    "vllm.v1.core.sched.output:SchedulerOutput.num_scheduled_tokens",
    "vllm.v1.core.sched.output:SchedulerOutput.preempted_req_ids",
    "vllm.v1.core.sched.output:SchedulerOutput.scheduled_cached_reqs",
    "vllm.v1.core.sched.scheduler:Scheduler.kv_cache_manager",
    "vllm.v1.core.sched.scheduler:Scheduler.log_stats",
    "vllm.v1.core.sched.scheduler:Scheduler.policy",
    "vllm.v1.core.sched.scheduler:Scheduler.prev_step_scheduled_req_ids",
    "vllm.v1.core.sched.scheduler:Scheduler.running",
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.block_pool",
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.block_size",
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.num_cached_block",
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.req_to_blocks",
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager.sliding_window",
    "vllm.v1.engine.async_llm:AsyncLLM.logger_manager",
    "vllm.v1.engine:EngineCoreRequest.mm_features",
    "vllm.v1.kv_cache_interface:FullAttentionSpec.page_size_padded",
    "vllm.v1.kv_cache_interface:FullAttentionSpec.unpadded_page_size_bytes",
    "vllm.v1.metrics.loggers:StatLoggerManager.engine_indexes",
    "vllm.v1.metrics.loggers:StatLoggerManager.stat_loggers",
    "vllm.v1.metrics.stats:SchedulerStats.kv_connector_stats",
    "vllm.v1.request:Request.block_hashes",
    "vllm.v1.request:Request.is_prefill_chunk",
    "vllm.v1.request:Request.max_tokens",
    "vllm.v1.request:Request.num_computed_tokens",
    "vllm.v1.request:Request.num_prompt_tokens",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.discard_request_mask",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.input_batch",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.positions",
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.requests",
    "vllm.v1.worker.gpu.block_table:BlockTables.block_tables",
    "vllm.v1.worker.gpu.block_table:BlockTables.num_blocks",
    "vllm.v1.worker.gpu.input_batch:InputBatch.idx_mapping_np",
    "vllm.v1.worker.gpu.input_batch:InputBatch.num_computed_tokens_np",
    "vllm.v1.worker.gpu.input_batch:InputBatch.num_scheduled_tokens",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.block_tables",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.input_buffers",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.req_states",
]

CONSTANTS = {"vllm.plugins:DEFAULT_PLUGINS_GROUP": "vllm.general_plugins"}
