"""The model runner on GPUs (V2): runs the model on caches that hold fewer tokens than have been computed.

Positions stay logical, they feed RoPE and sampling; slots and sequence lengths count resident tokens. What captured
CUDA graphs read is written where they read it.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import BatchReqState, GPUModelRunner

from vllm_qfilters.attention.scoring import BACKENDS, ScoringAttention
from vllm_qfilters.batch_scorers import (
    BatchExpectedAttentionScorer,
    BatchKeyDiffScorer,
    BatchRotaryFilterScorer,
    BatchScorer,
)
from vllm_qfilters.filters.format import Filters
from vllm_qfilters.kernels.batch import Compaction
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.triton.score_pages import page_scores
from vllm_qfilters.kernels.triton.write_and_score import Score, write_and_score
from vllm_qfilters.messages import QFiltersSchedulerOutput
from vllm_qfilters.worker.batch_compactor import BatchCompactor, workspace_bytes
from vllm_qfilters.worker.collectives import max_over_ranks, mean_over_ranks
from vllm_qfilters.worker.runner import CompressedModelRunner
from vllm_qfilters.worker.specs import check_cuda_graphs


class QFiltersGPUModelRunner(CompressedModelRunner, GPUModelRunner):
    """Compacts all sequences of a plan at once."""

    kernels = "Triton"
    page_scores = staticmethod(page_scores)

    # Lengths of the step's sequences in positions, on the device and on the host, while the batch holds resident ones.
    _logical_lengths: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def positions(self) -> torch.Tensor:
        """Begins with the positions of the step's tokens."""
        return self.input_buffers.positions

    def compaction_bytes(self, cache_bytes: int) -> int:
        """Most memory that compaction takes beside a cache of ``cache_bytes``. Before the cache exists."""
        if self.compression.evicts_whole_pages:
            return 0
        specs = self.get_kv_cache_spec()
        name, spec = next(iter(specs.items()))
        layer = self.compilation_config.static_forward_context[name]
        cached_tokens = cache_bytes // (len(specs) * spec.page_size_bytes) * spec.block_size
        return workspace_bytes(
            num_layers=len(specs),
            num_heads=layer.num_heads if self.compression.expects_attention else layer.num_kv_heads,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            num_sequences=self.scheduler_config.max_num_seqs,
            longest_sequence=min(self.model_config.max_model_len, cached_tokens),  # a request may set any budget
            cached_tokens=cached_tokens,
            prompt_bytes=0 if self.recorder is None else self.recorder.prompt_bytes,
        )

    def bind_cache(self) -> None:
        for layer in self.layers:
            if not isinstance(layer.impl, ScoringAttention):
                raise ValueError(
                    f"KV compression does not work with attention backend {layer.get_attn_backend().get_name()}: use "
                    f"--attention-backend with one of {', '.join(backend.name for backend in BACKENDS)}"
                )
        check_cuda_graphs(self.compression, self.cudagraph_manager.cudagraph_mode)
        self.cache = StridedCache(self.kv_caches_in_their_dtype(), self.compression.num_planes)

    def start_scoring(self, filters: Filters | None) -> None:
        scorer = self._scorer(filters)
        if not self.compression.evicts_whole_pages:
            self.compactor = BatchCompactor(scorer, self.compression.heads_keep_the_same, mean_over_ranks)
            self.compactor.warm_up()
        for index, layer in enumerate(self.layers):
            layer.impl.planes = self.cache.planes[index]
            if scorer.written != Score.NONE:
                layer.impl.write_and_score = functools.partial(
                    write_and_score,
                    score=scorer.written,
                    filters=None if scorer.filters is None else scorer.filters[index],
                    seed=index,
                )

    def _scorer(self, filters: Filters | None) -> BatchScorer:
        config, cache = self.compression, self.cache
        if config.method == "keydiff":
            return BatchKeyDiffScorer(cache)
        if config.method != "qfilters":
            written = {
                "streaming": Score.NONE,
                "knorm": Score.NEGATIVE_NORM,
                "random_once": Score.RANDOM,
                "random": Score.RANDOM,
            }[config.method]
            return BatchScorer(cache, written)
        if config.filter == "static":
            static = self.static_filters(filters).to(self.device, torch.float32).contiguous()
            return BatchScorer(cache, Score.PROJECTION, static)
        bank = self.filter_bank(filters)
        key_scales = self.key_scales()
        if config.filter == "rotary":
            return BatchRotaryFilterScorer(cache, bank, key_scales)
        scale, is_shared = self.layers[0].impl.scale, config.heads_keep_the_same
        return BatchExpectedAttentionScorer(cache, bank, key_scales, scale, is_shared, max_over_ranks)

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        self.forget(scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or ())
        super().finish_requests(scheduler_output)

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        # Plans first: vLLM appends new pages at the row's end, and may zero or hand out pages that the plan gave up.
        if isinstance(scheduler_output, QFiltersSchedulerOutput) and scheduler_output.compaction.rows:
            rows = scheduler_output.compaction.rows
            indices = [self.req_states.req_id_to_index[row.req_id] for row in rows]
            if not self.compression.evicts_whole_pages:  # else nothing moves
                compactions = [
                    Compaction(
                        old_row=index,
                        position=row.position,
                        resident_tokens=row.resident_tokens,
                        evicted_tokens=row.evicted_tokens,
                        sinks=row.sinks,
                        window=row.window,
                        new_pages=row.block_ids,
                        copied_pages=row.copied_pages,
                        shared_pages_out=row.shared_pages_out,
                        distinct_tokens=row.distinct_tokens,
                    )
                    for index, row in zip(indices, rows, strict=True)
                ]
                recent_queries = [self.recent_queries(row) for row in rows]
                with self.compaction_timer.measure():
                    kept = self.compactor.compact(compactions, self.block_tables.block_tables[0].gpu, recent_queries)
                if self.kept_tokens is not None:
                    for row, is_kept in zip(rows, kept, strict=True):
                        self.kept_tokens.compact(row, is_kept)
            elif self.kept_tokens is not None:
                for index, row in zip(indices, rows, strict=True):
                    num_pages = cdiv(row.resident_tokens, self.cache_config.block_size)
                    old_block_ids = self.block_tables.block_tables[0].gpu[index, :num_pages].tolist()
                    self.kept_tokens.take_out_pages(row, old_block_ids)
            for index, row in zip(indices, rows, strict=True):
                self.block_tables.append_block_ids(index, (list(row.block_ids),), overwrite=True)
                self.evicted.add(row.req_id, row.evicted_tokens)
        super().update_requests(scheduler_output)

    def prepare_inputs(
        self,
        scheduler_output: SchedulerOutput,
        batch_req_state: BatchReqState,
        batch_desc: BatchExecutionDescriptor,
        num_active_loras: int,
    ) -> InputBatch:
        input_batch = super().prepare_inputs(scheduler_output, batch_req_state, batch_desc, num_active_loras)
        if self.recorder is not None:
            computed, prompt = (
                input_batch.num_computed_tokens_np,
                self.req_states.prompt_len.np[input_batch.idx_mapping_np],
            )
            # A replayed graph shows no queries. It is only a prompt's last token, if anything, that is computed in one.
            if batch_desc.cg_mode != CUDAGraphMode.FULL and (computed < prompt).any():
                self.recorder.start_step(
                    input_batch.req_ids, input_batch.num_scheduled_tokens.tolist(), computed.tolist(), prompt.tolist()
                )
            else:
                self.recorder.skip_step()
        return input_batch

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        evicted = self.evicted.rows(input_batch.req_ids)
        self._logical_lengths = None
        if evicted is None:
            return super().prepare_attn(input_batch)
        self._logical_lengths = (input_batch.seq_lens.clone(), input_batch.seq_lens_cpu_upper_bound.clone())
        input_batch.seq_lens[: input_batch.num_reqs] -= async_tensor_h2d(evicted, self.device)
        input_batch.seq_lens_cpu_upper_bound[: input_batch.num_reqs] -= torch.from_numpy(evicted)
        by_token = np.repeat(evicted, input_batch.num_scheduled_tokens)
        places = input_batch.positions.clone()
        places[: input_batch.num_tokens] -= async_tensor_h2d(by_token, self.device)
        return super().prepare_attn(dataclasses.replace(input_batch, positions=places))

    def prepare_dummy_attn(self, *args: Any, **kwargs: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        if self.recorder is not None:
            self.recorder.skip_step()
        return super().prepare_dummy_attn(*args, **kwargs)

    def sample(self, hidden_states: torch.Tensor, input_batch: InputBatch, grammar_output: Any):
        # Sampling compares lengths with those of prompts.
        if self._logical_lengths is not None:
            seq_lens, upper_bound = self._logical_lengths
            input_batch = dataclasses.replace(input_batch, seq_lens=seq_lens, seq_lens_cpu_upper_bound=upper_bound)
        return super().sample(hidden_states, input_batch, grammar_output)
