"""The model runner on GPUs (V2): runs the model on caches that hold fewer tokens than have been computed.

Positions stay logical, they feed RoPE and sampling; slots and sequence lengths count resident tokens. What captured CUDA graphs
read is written where they read it.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_qfilters.attention.gpu import BACKENDS, ScoringAttention
from vllm_qfilters.kernels.batch import Compaction
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.write_and_score import Score, write_and_score
from vllm_qfilters.plan import QFiltersSchedulerOutput
from vllm_qfilters.worker.batch_compactor import BatchCompactor
from vllm_qfilters.worker.model_runner import CompressedModelRunner

_SCORES = {"qfilters": Score.PROJECTION, "knorm": Score.NEGATIVE_NORM, "random": Score.RANDOM}


class QFiltersGPUModelRunner(CompressedModelRunner, GPUModelRunner):
    """Compacts all sequences of a plan at once."""

    kernels = "Triton"

    # Lengths of the step's sequences in positions, on the device and on the host, while the batch holds resident ones.
    _logical_lengths: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def positions(self) -> torch.Tensor:
        """Begins with the positions of the step's tokens."""
        return self.input_buffers.positions

    def bind_cache(self) -> None:
        for layer in self.layers:
            if not isinstance(layer.impl, ScoringAttention):
                raise ValueError(
                    f"KV compression does not work with attention backend {layer.get_attn_backend().get_name()}: use "
                    f"--attention-backend with one of {', '.join(backend.name for backend in BACKENDS)}"
                )
        cache = StridedCache([layer.kv_cache for layer in self.layers])
        self.compactor = BatchCompactor(cache, shared_by_heads=self.compression.granularity == "layer")

    def start_scoring(self, layer_index: int, filters: torch.Tensor | None) -> None:
        impl = self.layers[layer_index].impl
        impl.score_plane = self.compactor.cache.scores[layer_index]
        if self.compression.method in _SCORES:
            impl.write_and_score = functools.partial(
                write_and_score,
                score=_SCORES[self.compression.method],
                filters=None if filters is None else filters.to(self.device, torch.float32).contiguous(),
                seed=layer_index,
            )

    def start_compression(self) -> None:
        super().start_compression()
        self.compactor.warm_up()

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        self.evicted.forget(scheduler_output.finished_req_ids)
        self.evicted.forget(scheduler_output.preempted_req_ids or ())
        super().finish_requests(scheduler_output)

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        # Plans first: vLLM appends new pages at the row's end, and may zero or hand out pages that the plan gave up.
        if isinstance(scheduler_output, QFiltersSchedulerOutput) and scheduler_output.compaction.rows:
            rows = scheduler_output.compaction.rows
            indices = [self.req_states.req_id_to_index[row.req_id] for row in rows]
            compactions = [
                Compaction(
                    index, row.resident_tokens, row.evicted_tokens, row.sinks, row.window, row.block_ids, row.copied_pages
                )
                for index, row in zip(indices, rows, strict=True)
            ]
            self.compactor.compact(compactions, self.block_tables.block_tables[0].gpu)
            for index, row in zip(indices, rows, strict=True):
                self.block_tables.append_block_ids(index, (list(row.block_ids),), overwrite=True)
                self.evicted.add(row.req_id, row.evicted_tokens)
        super().update_requests(scheduler_output)

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

    def sample(self, hidden_states: torch.Tensor, input_batch: InputBatch, grammar_output: Any):
        # Sampling compares lengths with those of prompts.
        if self._logical_lengths is not None:
            seq_lens, upper_bound = self._logical_lengths
            input_batch = dataclasses.replace(input_batch, seq_lens=seq_lens, seq_lens_cpu_upper_bound=upper_bound)
        return super().sample(hidden_states, input_batch, grammar_output)
