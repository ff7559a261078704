"""The model runner on CPUs (V1): runs the model on caches that hold fewer tokens than have been computed.

Positions stay logical, they feed RoPE and sampling; slots and sequence lengths count resident tokens.
"""

from typing import Any

import numpy as np
import torch
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_qfilters.filters.format import Filters
from vllm_qfilters.kernels import IMPLEMENTATION, PagedCache, page_scores, probe_page_layout
from vllm_qfilters.kernels.layout import WriteCache
from vllm_qfilters.messages import QFiltersSchedulerOutput
from vllm_qfilters.scorers import (
    ExpectedAttentionScorer,
    KeyDiffScorer,
    KeyNormScorer,
    RandomScorer,
    RotaryFilterScorer,
    Scorer,
    StaticFilterScorer,
)
from vllm_qfilters.worker.collectives import max_over_ranks, mean_over_ranks
from vllm_qfilters.worker.compactor import Compactor
from vllm_qfilters.worker.runner import CompressedModelRunner


def cache_writer(layer: torch.nn.Module, dtype: torch.dtype) -> WriteCache:
    """How an attention layer writes its cache, for :func:`probe_page_layout`; dtype: of the model."""

    def write_cache(key, value, kv_cache, slot_mapping):
        # Into an fp8 cache vLLM writes what is left after a division by a scale, as bytes, and cuts off what does not
        # fit: with a little more than a digit that digit stays.
        key, value = 1.01 * layer._k_scale_float * key.to(dtype), 1.01 * layer._v_scale_float * value.to(dtype)
        layer.impl.do_kv_cache_update(layer, key, value, kv_cache.view(layer.kv_cache.dtype), slot_mapping)

    return write_cache


class QFiltersCPUModelRunner(CompressedModelRunner, CPUModelRunner):
    """Compacts sequence by sequence."""

    kernels = IMPLEMENTATION
    page_scores = staticmethod(page_scores)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if not get_pp_group().is_first_rank:
            # vLLM 0.32 makes these when it warms up, which it leaves out on CPUs in eager mode: later pipeline stages
            # then die.
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    def bind_cache(self) -> None:
        first, kv_caches = self.layers[0], self.kv_caches_in_their_dtype()
        write_cache = cache_writer(first, self.dtype)
        layout = probe_page_layout(write_cache, self.cache_config.block_size, first.head_size, kv_caches[0].dtype)
        self.cache = PagedCache(kv_caches, layout, self.compression.num_planes, self.key_scales())

    def start_scoring(self, filters: Filters | None) -> None:
        scorer = self._scorer(filters)
        if not self.compression.evicts_whole_pages:
            is_alone = get_tensor_model_parallel_world_size() == 1
            self.compactor = Compactor(
                scorer, self.compression.heads_keep_the_same, None if is_alone else mean_over_ranks
            )
        for layer in self.layers:
            layer.impl.scorer = scorer

    def _scorer(self, filters: Filters | None) -> Scorer:
        config, cache = self.compression, self.cache
        if config.method != "qfilters":
            scorers = {
                "streaming": Scorer,
                "knorm": KeyNormScorer,
                "keydiff": KeyDiffScorer,
                "random_once": RandomScorer,
                "random": RandomScorer,
            }
            return scorers[config.method](cache)
        if config.filter == "static":
            return StaticFilterScorer(cache, self.static_filters(filters))
        bank = self.filter_bank(filters)
        if config.filter == "rotary":
            return RotaryFilterScorer(cache, bank)
        return ExpectedAttentionScorer(
            cache, bank, self.layers[0].impl.scale, config.heads_keep_the_same, max_over_ranks
        )

    def sample_tokens(self, grammar_output: Any):
        # A prompt's chunks before its last are sampled and discarded, and vLLM 0.32 then rewinds the generator of a
        # request with a seed, which CPU generators cannot do: the worker dies. Rows to be discarded need no generator.
        generators = self.input_batch.generators
        discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
        held = {row: generators.pop(row) for row in discarded if row in generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(held)

    def _update_states(self, scheduler_output: SchedulerOutput):
        # Plans first: vLLM appends new pages at the row's end, and may zero or hand out pages that the plan gave up.
        self.forget(scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or ())
        if isinstance(scheduler_output, QFiltersSchedulerOutput):
            for row in scheduler_output.compaction.rows:
                (block_ids,) = self.requests[row.req_id].block_ids
                if not self.compression.evicts_whole_pages:  # else nothing moves
                    with self.compaction_timer.measure():
                        is_kept = self.compactor.compact(block_ids, row, self.recent_queries(row))
                    if self.kept_tokens is not None:
                        self.kept_tokens.compact(row, is_kept)
                elif self.kept_tokens is not None:
                    self.kept_tokens.take_out_pages(row, block_ids)
                block_ids[:] = row.block_ids
                batch_row = self.input_batch.req_id_to_index.get(row.req_id)
                if batch_row is not None:
                    self.input_batch.block_table.clear_row(batch_row)
                    self.input_batch.block_table.add_row((block_ids,), batch_row)
                self.evicted.add(row.req_id, row.evicted_tokens)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray):
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        num_reqs = self.input_batch.num_reqs
        if self.recorder is not None:
            computed = self.input_batch.num_computed_tokens_cpu[:num_reqs]
            prompt = self.input_batch.num_prompt_tokens[:num_reqs]
            if (computed < prompt).any():
                self.recorder.start_step(
                    self.input_batch.req_ids, num_scheduled_tokens.tolist(), computed.tolist(), prompt.tolist()
                )
            else:
                self.recorder.skip_step()
        evicted = self.evicted.rows(self.input_batch.req_ids)
        if evicted is not None:
            by_request = torch.from_numpy(evicted)
            self.seq_lens[:num_reqs] -= by_request
            self.optimistic_seq_lens_cpu[:num_reqs] -= by_request
            by_token = torch.from_numpy(np.repeat(evicted, num_scheduled_tokens))
            self.input_batch.block_table.compute_slot_mapping(
                num_reqs,
                self.query_start_loc.gpu[: num_reqs + 1],
                self.positions[: scheduler_output.total_num_scheduled_tokens] - by_token,
            )
        return prepared
