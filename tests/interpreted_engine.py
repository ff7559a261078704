"""Runs engines on model runner V2 with the Triton kernels, on a CPU under Triton's interpreter: JSON on stdin, JSON on
stdout.

    python -m tests.interpreted_engine < job.json

A job is {"model": folder, "filters": file, "runs": {name: {"compression": options or null, "llm": keywords, "requests":
[...]}}}. The runs of a job take place one after the other, each on an engine of its own; the requests of a run in one
batch, or, as a list of lists, batch by batch. A run with "model" has one of its own. A run with "calibration",
{"sequences": token ids, "path": file}, calibrates filters at its end. Pipeline stages are processes of their own, which
import this module too.
"""

import json
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_CI_ENV"] = "1"

import numpy as np
import torch
import triton.backends


class Driver:
    """vLLM for CPUs uses Triton only where it has a backend for them."""

    is_active = staticmethod(lambda: True)
    get_current_target = staticmethod(lambda: types.SimpleNamespace(backend="cpu"))


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=Driver)

# With MLA vLLM then chooses AMX_MLA, whose place ours takes, and leaves prompts in chunks and prefixes switched on.
torch.cpu._is_amx_tile_supported = lambda: True
torch.cuda.get_device_capability = lambda device=None: (9, 0)  # vLLM's Triton writer asks for that of its cache

from vllm import LLM, SamplingParams, _custom_ops
from vllm.config import CUDAGraphMode
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.inputs import TokensPrompt
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import CompilationTimes

from tests import states
from tests.engines import register_qwen_vl, share_group_of_experts
from tests.interpreted_runs import RESULTS, prompt_after
from tests.paged import ForbiddenReads, PeakMemory
from tests.specialisations import counted, recorded
from vllm_qfilters import kv_compression
from vllm_qfilters.attention import register
from vllm_qfilters.attention.scoring import BACKENDS, MLA_BACKENDS
from vllm_qfilters.commands.inspection.command import assemble
from vllm_qfilters.filters import calibrate
from vllm_qfilters.messages import QFiltersSchedulerOutput
from vllm_qfilters.methods.catalog import METHODS
from vllm_qfilters.worker.runner_v2 import QFiltersGPUModelRunner
from vllm_qfilters.worker.worker import CompressedWorker


class InterpretedWorker(CompressedWorker, CPUWorker):
    """QFiltersGPUWorker, but for the device."""

    def __init__(self, *args, **kwargs) -> None:
        register_triton({**BACKENDS, **MLA_BACKENDS})
        super().__init__(*args, **kwargs)

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = QFiltersGPUModelRunner(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        self.model_runner.start_compression()
        return super().compile_or_warm_up_model()


def register_triton(backends: dict) -> None:
    """Serves attention with those of ``backends`` that are in Triton, in place of those vLLM chooses on CPUs."""
    in_place_of = {
        AttentionBackendEnum.CPU_ATTN: AttentionBackendEnum.TRITON_ATTN,
        AttentionBackendEnum.AMX_MLA: AttentionBackendEnum.TRITON_MLA,
        AttentionBackendEnum.TRITON_ATTN_DIFFKV: AttentionBackendEnum.TRITON_ATTN_DIFFKV,  # a model chooses it itself
    }
    register({on_cpus: backends[in_triton] for on_cpus, in_triton in in_place_of.items()})


def concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, skip_scale=False):
    """vLLM's writer of latents, which is not built for CPUs. ``skip_scale``, from vLLM 0.33 on, is of other dtypes."""
    is_token = slot_mapping >= 0
    slots, num_tokens = slot_mapping[is_token], slot_mapping.shape[0]
    keys = torch.cat((kv_c[:num_tokens], k_pe[:num_tokens]), dim=-1)
    kv_cache[slots // kv_cache.shape[1], slots % kv_cache.shape[1]] = keys[is_token]


_custom_ops.concat_and_cache_mla = concat_and_cache_mla


def keep_async_scheduling(check_and_update_config):
    """vLLM switches it off on CPUs."""

    def check(vllm_config):
        is_async = vllm_config.scheduler_config.async_scheduling
        check_and_update_config(vllm_config)
        vllm_config.scheduler_config.async_scheduling = is_async

    return check


CpuPlatform.check_and_update_config = staticmethod(keep_async_scheduling(CpuPlatform.check_and_update_config))
# Of a repeated token, to see how queries turn: enough to tell, and the interpreter is slow.
calibrate.REPEATED_TOKENS = 64
# Pipeline stages send as with NCCL, through torch.distributed: through shared memory a stage would wait until the next
# one reads.
CpuCommunicator._all_group_ranks_share_shm_group_name = lambda communicator: False


def watch(target, method: str) -> list:
    """A list that gets an entry at every call."""
    calls, original = [], getattr(target, method)

    def wrapper(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    setattr(target, method, wrapper)
    return calls


def record_steps(runner: GPUModelRunner) -> list[dict]:
    """A list that gets an entry at every step from now on: the tokens of each sequence in it, how many sequences were
    cut before it, and the launches of all kernels, those of sampling apart."""
    execute_model, steps = runner.execute_model, []

    def recorded_step(scheduler_output, *args, **kwargs):
        with counted() as launches:
            output = execute_model(scheduler_output, *args, **kwargs)
        is_ours = isinstance(scheduler_output, QFiltersSchedulerOutput)
        cut = len(scheduler_output.compaction.compactions) if is_ours else 0
        tokens = list(scheduler_output.num_scheduled_tokens.values())
        steps.append({"tokens": tokens, "cut": cut, "launches": launches})
        return output

    runner.execute_model = recorded_step
    return steps


def watch_compactions(runner: QFiltersGPUModelRunner) -> list[int]:
    """A list that gets, at every compaction from now on, the most bytes it took at once."""
    apply, peaks = runner.compactor.apply, []

    def watched(*args, **kwargs):
        with PeakMemory() as taken:
            kept = apply(*args, **kwargs)
        peaks.append(taken.bytes)
        return kept

    runner.compactor.apply = watched
    return peaks


def contents(runner: QFiltersGPUModelRunner) -> list[torch.Tensor]:
    """Copies of all pages but vLLM's null page, which nobody reads: keys, values, token stats, and states."""
    layers = runner.compilation_config.static_forward_context.values()
    caches = [
        cache
        for layer in layers
        if hasattr(layer, "kv_cache")  # layers of experts have none
        for cache in (layer.kv_cache if isinstance(layer.kv_cache, tuple) else [layer.kv_cache])
    ]
    return [pages[1:].clone() for pages in (*caches, runner.cache.planes.transpose(0, 1))]


def check_capture(runner: QFiltersGPUModelRunner) -> int:
    """Runs what vLLM would capture in CUDA graphs, a prompt and two sequences that decode: it must see lengths of its
    own, and leave nothing behind, although the step before announced what was evicted. Returns how many it ran."""
    groups, before, captures = runner.compressed_groups, contents(runner), []
    runner.lengths._evicted["ended"] = runner.cache.block_size
    runner.lengths.start_step(["ended"])
    if runner.recorder is not None:
        runner.recorder.start_step(["ended"], [1], [7], [8])

    def run(manager, create_forward_fn, *_):
        for descriptor, lengths in (
            (BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, 6, 1), [6]),  # the largest first, as vLLM does
            (BatchExecutionDescriptor(CUDAGraphMode.FULL, 2, 2, uniform_token_count=1), [1, 1]),
        ):
            forward = create_forward_fn(descriptor, True)
            assert runner.lengths._lengths[groups.index(True), : len(lengths)].tolist() == lengths
            forward(CUDAGraphMode.NONE)
            captures.append(descriptor)

    capture, CudaGraphManager.capture = CudaGraphManager.capture, run
    runner.cudagraph_manager.needs_capture = lambda: True
    torch.accelerator.empty_cache, torch.accelerator.get_memory_info = lambda: None, lambda: (0, 0)
    runner.capture_model(profile_only=True)  # which locks no workspace
    CudaGraphManager.capture = capture
    assert all(map(torch.equal, before, contents(runner)))
    assert runner.lengths.of_step is None and (runner.recorder is None or not runner.recorder._blocks)
    runner.forget(["ended"], [])
    return len(captures)


def check_metadata(runner: QFiltersGPUModelRunner, scheduler) -> None:
    """From now on, what attention and captured graphs read must be what the scheduler thinks, in persistent buffers.

    The batch of vLLM's runner keeps counting positions.
    """
    prepare_attn, block_size = runner.prepare_attn, runner.cache_config.block_size
    index = runner.group
    (group,) = runner.attn_groups[index]
    (builder,) = group.metadata_builders
    build, expected_lengths = builder.build, []
    resident_lengths = runner.lengths._lengths[index]

    def checked_build(common_prefix_len, common_attn_metadata, *args, **kwargs):
        resident = runner.lengths.resident(common_attn_metadata, index)
        metadata = build(common_prefix_len, common_attn_metadata, *args, **kwargs)
        if expected_lengths:
            lengths = expected_lengths.pop()
            if isinstance(metadata, MLACommonMetadata):
                assert lengths_with_mla(metadata, resident_lengths) == lengths
            else:
                assert metadata.seq_lens.data_ptr() == resident_lengths.data_ptr()
                assert metadata.seq_lens[: len(lengths)].tolist() == lengths
            assert metadata.max_seq_len == max(lengths)
            assert resident.seq_lens_cpu_upper_bound[: len(lengths)].tolist() == lengths  # FlashInfer plans with these
        return metadata

    builder.build = checked_build

    def checked(input_batch):
        with ForbiddenReads():
            block_tables, slot_mappings = prepare_attn(input_batch)
        block_table = block_tables[index]
        buffers, tables = runner.input_buffers, runner.block_tables
        for found, persistent in (
            (input_batch.seq_lens, buffers.seq_lens),
            (input_batch.positions, buffers.positions),
            (block_table, tables.input_block_tables[index]),
            (slot_mappings, tables.slot_mappings),
        ):
            assert found.data_ptr() == persistent.data_ptr()
        positions, slots, lengths, ends = [], [], [], []
        for row, (req_id, num_tokens) in enumerate(
            zip(input_batch.req_ids, input_batch.num_scheduled_tokens, strict=True)
        ):
            if req_id not in scheduler.requests:  # calibration
                return block_tables, slot_mappings
            pages = [block.block_id for block in scheduler.block_manager.req_to_blocks[req_id]]
            assert block_table[row, : len(pages)].tolist() == pages
            evicted, end = (
                scheduler.block_manager.evicted.get(req_id, 0),
                input_batch.num_computed_tokens_np[row] + num_tokens,
            )
            positions += range(end - num_tokens, end)
            residents = range(end - num_tokens - evicted, end - evicted)
            slots += [pages[resident // block_size] * block_size + resident % block_size for resident in residents]
            lengths.append(end - evicted)
            ends.append(end)
        assert input_batch.positions[: len(positions)].tolist() == positions
        assert slot_mappings[index, : len(slots)].tolist() == slots
        assert bool((slot_mappings[index, len(slots) :] == -1).all())
        assert input_batch.seq_lens[: len(ends)].tolist() == ends
        assert input_batch.seq_lens_cpu_upper_bound[: len(ends)].tolist() == ends
        assert resident_lengths[: len(lengths)].tolist() == lengths and not resident_lengths[len(lengths) :].any()
        expected_lengths[:] = [lengths]
        return block_tables, slot_mappings

    runner.prepare_attn = checked


def lengths_with_mla(metadata: MLACommonMetadata, resident_lengths: torch.Tensor) -> list[int]:
    """What the sequences that decode hold, which stand first, and those that read prompts."""
    lengths = []
    if metadata.decode is not None:
        assert metadata.decode.seq_lens.data_ptr() == resident_lengths.data_ptr()
        lengths += metadata.decode.seq_lens.tolist()
    if metadata.prefill is not None:
        new, context = metadata.prefill.query_lens_cpu.tolist(), metadata.prefill.chunked_context
        held = [0] * len(new) if context is None else context.context_lens_list
        lengths += [before + tokens for before, tokens in zip(held, new, strict=True)]
    return lengths


def runs_v2(worker: CPUWorker) -> bool:
    return isinstance(worker.model_runner, GPUModelRunner)


def kept_of_requests(ranks: list[dict]) -> list:
    """What ``take_kept_tokens`` of all workers returned, put together: of each request the position of its last
    eviction, and the bits of what all layers and heads hold of the tokens before it."""
    found = []
    for req_id, (end, _) in ranks[0]["requests"].items():
        _, kept, _ = assemble([{**rank, "requests": {req_id: rank["requests"][req_id]}} for rank in ranks], end)
        found.append([end, np.packbits(kept).tobytes().hex()])
    return found


def run(
    job: dict,
    compression: dict | None,
    llm: dict,
    requests: list,
    calibration: dict | None = None,
    model: str | None = None,
) -> dict:
    """Token ids, log-probabilities and cached tokens of each request; the steps; what the engine evicted, and what it
    kept."""
    options = {}
    if compression is not None:
        filters = {"filters": job["filters"]} if METHODS[compression.get("method", "qfilters")].needs_filters else {}
        options = kv_compression(**{**filters, **compression})
        options["worker_cls"] = f"{InterpretedWorker.__module__}.{InterpretedWorker.__name__}"
    else:
        register_triton({backend: backend.value for backend in (*BACKENDS, *MLA_BACKENDS)})
    warm_up, warmed_up = QFiltersGPUModelRunner.warm_up, set()

    def recorded_warm_up(runner):
        with recorded() as launched:
            warm_up(runner)
        warmed_up.update(launched)

    QFiltersGPUModelRunner.warm_up = recorded_warm_up
    if "limit_mm_per_prompt" in llm:
        register_qwen_vl("qwen2_5_vl")
    share_group_of_experts()
    engine = LLM(model or job["model"], skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **llm, **options)
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    preempted = watch(scheduler, "_preempt_request")
    is_recorded = compression is not None and compression.get("prefix") != "resume"
    if is_recorded:
        engine.collective_rpc("record_kept_tokens")
    is_alone = engine.llm_engine.vllm_config.parallel_config.world_size == 1  # else no worker is in this process
    steps, peaks = [], []
    if is_alone:
        runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
        steps = record_steps(runner)
        if compression is not None:
            check_metadata(runner, scheduler)
            if not runner.compression.evicts_whole_pages:
                peaks = watch_compactions(runner)
    QFiltersGPUModelRunner.warm_up = warm_up
    batches = requests if isinstance(requests[0], list) else [requests]
    outputs, launched_while_serving, said = [], set(), []
    for batch in batches:
        prompts = [TokensPrompt(prompt_token_ids=prompt_after(said, request)) for request in batch]
        batch = [{name: value for name, value in request.items() if name == "max_tokens"} for request in batch]
        params = [
            SamplingParams(temperature=0, logprobs=0, ignore_eos=True, detokenize=False, **request) for request in batch
        ]
        with recorded() as launched:
            results = engine.generate(prompts, params, use_tqdm=False)
        launched_while_serving |= launched
        said = [*results[-1].prompt_token_ids, *results[-1].outputs[0].token_ids]
        for output in results:
            completion = output.outputs[0]
            outputs.append(
                {
                    "token_ids": list(completion.token_ids),
                    "logprobs": [
                        step[token].logprob
                        for token, step in zip(completion.token_ids, completion.logprobs, strict=True)
                    ],
                    "cached_tokens": output.num_cached_tokens,
                }
            )
    result = {
        "outputs": outputs,
        "v2_stages": engine.collective_rpc(runs_v2),
        "pages": engine.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "preemptions": len(preempted),
        "async_scheduling": scheduler.scheduler_config.async_scheduling,
        "steps": list(steps),
        "launches": len(launched_while_serving),
        "not_warmed_up": sorted(launched_while_serving - warmed_up),
    }
    if compression is not None:
        stats = scheduler.compression_stats
        result |= {
            "compactions": stats.compactions,
            "evicted_tokens": stats.evicted_tokens,
            "freed_pages": stats.freed_pages,
        }
        assert not scheduler.block_manager.evicted and not scheduler.block_manager.limits
    if is_recorded:
        result["kept"] = kept_of_requests(engine.collective_rpc("take_kept_tokens"))
    if compression is not None and is_alone:
        cache_bytes = sum(tensor.size for tensor in runner.kv_cache_config.kv_cache_tensors)
        result |= {"compaction_bytes": runner.compaction_bytes(cache_bytes), "compactions_took": peaks}
        result["captures"] = check_capture(runner)
    if calibration is not None:
        engine.collective_rpc("calibrate_filters", args=(calibration["sequences"], "test", calibration["path"]))
    return result


def main() -> None:
    # Workers are resolved by name, and this module is __main__.
    sys.modules["tests.interpreted_engine"] = sys.modules["__main__"]
    InterpretedWorker.__module__ = "tests.interpreted_engine"
    job = json.load(sys.stdin)
    with states.stood_in():
        print(RESULTS + json.dumps({name: run(job, **wanted) for name, wanted in job["runs"].items()}))


if __name__ == "__main__":
    main()
