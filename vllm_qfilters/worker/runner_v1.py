"""The model runner on CPUs (V1): runs the model on caches that hold fewer tokens than have been computed.

Positions stay logical, they feed RoPE and sampling; slots and the lengths attention sees count resident tokens.
"""

import functools
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention import MLAAttention
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_qfilters.attention.latent import write_keys
from vllm_qfilters.kernels import CPU_OPS, PagedCache, probe_page_layout
from vllm_qfilters.kernels.layout import WriteCache
from vllm_qfilters.plan import RequestCompaction
from vllm_qfilters.worker.lengths import ResidentLengths
from vllm_qfilters.worker.runner import CompressedModelRunner


def cache_writer(layer: torch.nn.Module, dtype: torch.dtype) -> WriteCache:
    """How an attention layer writes its cache, for :func:`probe_page_layout`; dtype: of the model."""
    if isinstance(layer, MLAAttention):
        return lambda key, value, kv_cache, slot_mapping: write_keys(layer, key, kv_cache, slot_mapping)

    def write_cache(key, value, kv_cache, slot_mapping):
        # Into an fp8 cache vLLM writes what is left after a division by a scale, as bytes, and cuts off what does not
        # fit: with a little more than a digit that digit stays.
        key, value = 1.01 * layer._k_scale_float * key.to(dtype), 1.01 * layer._v_scale_float * value.to(dtype)
        layer.impl.do_kv_cache_update(layer, key, value, kv_cache.view(layer.kv_cache.dtype), slot_mapping)

    return write_cache


class QFiltersCPUModelRunner(CompressedModelRunner, CPUModelRunner):
    """Compacts with the operators of csrc/."""

    ops = CPU_OPS
    attends_to_narrow_values = False

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if not get_pp_group().is_first_rank:
            # vLLM (0.32, 0.33) makes these when it warms up, which it leaves out on CPUs in eager mode: later pipeline
            # stages then die.
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    def bind_cache(self) -> None:
        first, kv_caches = self.layers[0], self.kv_caches_in_their_dtype()
        write_cache = cache_writer(first, self.dtype)
        layout = probe_page_layout(
            write_cache,
            self.cache_config.block_size,
            first.head_size,
            kv_caches[0].dtype,
            value_size=0 if self.has_latents else None,
        )
        self.cache = PagedCache(
            kv_caches,
            layout,
            self.compression.num_planes,
            self.key_scales(),
            self.separate_planes(),
            self.latent_size,
        )
        self.lengths = ResidentLengths(self.compressed_groups)
        self._shift_slots()

    def tables_of(self, compactions):
        tables = [torch.tensor(self.requests[c.req_id].block_ids[self.group], dtype=torch.int32) for c in compactions]
        return list(range(len(tables))), torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)

    def replace_pages(self, compaction: RequestCompaction) -> None:
        block_ids = self.requests[compaction.req_id].block_ids[self.group]
        block_ids[:] = compaction.block_ids
        row = self.input_batch.req_id_to_index.get(compaction.req_id)
        if row is not None:
            table = self.input_batch.block_table[self.group]
            table.clear_row(row)
            table.add_row(block_ids, row)

    def sample_tokens(self, grammar_output: Any):
        # A prompt's chunks before its last are sampled and discarded, and vLLM (0.32, 0.33) then rewinds the generator
        # of a request with a seed, which CPU generators cannot do: the worker dies. Rows to be discarded need none.
        generators = self.input_batch.generators
        discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
        held = {row: generators.pop(row) for row in discarded if row in generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(held)

    def _update_states(self, scheduler_output: SchedulerOutput):
        self.forget(scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or ())
        self.apply_plan(scheduler_output)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray):
        batch = self.input_batch
        self.lengths.start_step(batch.req_ids)
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        computed, prompt = batch.num_computed_tokens_cpu[: batch.num_reqs], batch.num_prompt_tokens[: batch.num_reqs]
        self.record_queries(batch.req_ids, num_scheduled_tokens, computed, prompt)
        return prepared

    def _dummy_run(self, *args: Any, **kwargs: Any):
        self.lengths.skip_step()
        return super()._dummy_run(*args, **kwargs)

    def _shift_slots(self) -> None:
        """Has the slots of the step's tokens computed from their places among the resident ones."""
        for table, is_compressed in zip(
            self.input_batch.block_table.block_tables, self.lengths.compressed, strict=True
        ):
            if is_compressed:
                table.compute_slot_mapping = functools.partial(self._slots, table.compute_slot_mapping)

    def _slots(self, compute_slot_mapping, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor):
        compute_slot_mapping(num_reqs, query_start_loc, self.lengths.shifted(positions, query_start_loc))
