"""The model runner on GPUs (V2): runs the model on caches that hold fewer tokens than have been computed.

Positions stay logical, they feed RoPE and sampling; slots and the lengths attention sees count resident tokens. What
captured CUDA graphs read is written where they read it.
"""

import functools
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.attention import MLAAttention
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import BatchReqState, GPUModelRunner

from vllm_qfilters.attention.latent import LatentAttention
from vllm_qfilters.attention.queries import query_bytes
from vllm_qfilters.attention.scoring import BACKENDS, MLA_BACKENDS, ScoringAttention
from vllm_qfilters.core.spec import PLANE_BYTES, QFiltersSpec
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.triton import TritonOps
from vllm_qfilters.plan import RequestCompaction
from vllm_qfilters.worker.caches import layers_by_cache, num_query_heads
from vllm_qfilters.worker.compactor import workspace_bytes
from vllm_qfilters.worker.lengths import DeviceResidentLengths
from vllm_qfilters.worker.runner import CompressedModelRunner
from vllm_qfilters.worker.specs import check_cuda_graphs


class QFiltersGPUModelRunner(CompressedModelRunner, GPUModelRunner):
    """Compacts with the Triton kernels."""

    ops = TritonOps()

    @property
    def positions(self) -> torch.Tensor:
        """Begins with the positions of the step's tokens."""
        return self.input_buffers.positions

    def compaction_bytes(self, cache_bytes: int) -> int:
        """Most memory that compaction, and token stats that are not in pages, take beside a cache of ``cache_bytes``.
        Before the cache exists."""
        specs = {name: spec for name, spec in self.get_kv_cache_spec().items() if isinstance(spec, QFiltersSpec)}
        attending = layers_by_cache(self.compilation_config.static_forward_context)
        num_heads = max(num_query_heads(attending[name]) for name in specs)
        name, spec = next(iter(specs.items()))
        layer = attending[name][0]
        cached_tokens = cache_bytes // (len(specs) * spec.page_size_bytes) * spec.block_size
        longest = self.compression.max_compacted_tokens(self.model_config.max_model_len, spec.block_size)
        planes = 0
        if isinstance(layer, MLAAttention):
            planes = cached_tokens * len(specs) * self.compression.num_planes * PLANE_BYTES
        if self.compression.evicts_whole_pages:
            return planes
        return planes + workspace_bytes(
            num_layers=len(specs),
            num_heads=num_heads if self.compression.expects_attention else layer.num_kv_heads,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            num_sequences=self.scheduler_config.max_num_seqs,
            longest_sequence=min(longest, cached_tokens),
            cached_tokens=cached_tokens,
            query_bytes=query_bytes(
                self.compression.observed_queries, num_heads, layer.head_size, self.model_config.dtype
            ),
        )

    def bind_cache(self) -> None:
        for layer in self.layers:
            if not isinstance(layer.impl, ScoringAttention | LatentAttention):
                supported = MLA_BACKENDS if self.has_latents else BACKENDS
                raise ValueError(
                    f"KV compression does not work with attention backend {layer.get_attn_backend().get_name()}: use "
                    f"--attention-backend with one of {', '.join(backend.name for backend in supported)}"
                )
        check_cuda_graphs(self.compression, self.cudagraph_manager.cudagraph_mode)
        self.cache = StridedCache(
            self.kv_caches_in_their_dtype(),
            self.compression.num_planes,
            self.key_scales(),
            value_size=0 if self.has_latents else self.layers[0].head_size_v,
            planes=self.separate_planes(),
            latent_size=self.latent_size,
        )
        self.lengths = DeviceResidentLengths(self.compressed_groups, self.max_num_reqs, self.device)
        self.block_tables.compute_slot_mappings = functools.partial(
            self.lengths.compute_slot_mappings, self.block_tables
        )

    def warm_up(self) -> None:
        super().warm_up()
        nobody = torch.empty(0, dtype=torch.int64, device=self.device)
        self.block_tables.compute_slot_mappings(nobody, self.input_buffers.query_start_loc, self.positions, 0)

    def tables_of(self, compactions):
        table_rows = [self.req_states.req_id_to_index[compaction.req_id] for compaction in compactions]
        return table_rows, self.block_tables.block_tables[self.group].gpu

    def replace_pages(self, compaction: RequestCompaction) -> None:
        index = self.req_states.req_id_to_index[compaction.req_id]
        self.block_tables.block_tables[self.group].stage_write(index, 0, list(compaction.block_ids))
        self.block_tables.num_blocks.np[self.group, index] = len(compaction.block_ids)

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        self.forget(scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or ())
        super().finish_requests(scheduler_output)

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        self.apply_plan(scheduler_output)
        super().update_requests(scheduler_output)

    def prepare_inputs(
        self,
        scheduler_output: SchedulerOutput,
        batch_req_state: BatchReqState,
        batch_desc: BatchExecutionDescriptor,
        num_active_loras: int,
    ) -> InputBatch:
        input_batch = super().prepare_inputs(scheduler_output, batch_req_state, batch_desc, num_active_loras)
        self.lengths.start_step(input_batch.req_ids)
        if batch_desc.cg_mode != CUDAGraphMode.FULL:
            prompt = self.req_states.prompt_len.np[input_batch.idx_mapping_np]
            computed = input_batch.num_computed_tokens_np
            self.record_queries(input_batch.req_ids, input_batch.num_scheduled_tokens, computed, prompt)
        elif self.recorder is not None:
            # A replayed graph shows no queries. It is only a prompt's last token, if anything, that is computed in one.
            self.recorder.skip_step()
        return input_batch

    def prepare_dummy_attn(self, *args: Any, **kwargs: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        self._skip_step()
        return super().prepare_dummy_attn(*args, **kwargs)

    def capture_model(self, *args: Any, **kwargs: Any) -> int:
        # Steps before have left what they announced; graphs are captured of steps that announce nothing.
        self._skip_step()
        return super().capture_model(*args, **kwargs)

    def _skip_step(self) -> None:
        self.lengths.skip_step()
        if self.recorder is not None:
            self.recorder.skip_step()
