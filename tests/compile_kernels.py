"""Compiles every Triton kernel ahead of time for GPUs this machine does not have, as the launchers launch them.

    python -m tests.compile_kernels 80 90

Prints JSON: per compute capability and kernel, the most registers, bytes of shared memory and bytes spilled of any
case.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.paged import Eviction, Geometry, Sequences
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.ops import Observation, Softmax, TokenStat, Turns
from vllm_qfilters.kernels.triton.compaction import compact, copy_pages
from vllm_qfilters.kernels.triton.distinctness import distinctness
from vllm_qfilters.kernels.triton.observation import observe
from vllm_qfilters.kernels.triton.score_pages import page_scores
from vllm_qfilters.kernels.triton.score_resident import mean_softmax, score_resident
from vllm_qfilters.kernels.triton.selection import gather_scores, mean_standardised, select_kept
from vllm_qfilters.kernels.triton.slots import compute_slots_and_lengths
from vllm_qfilters.kernels.triton.value_norms import value_norms
from vllm_qfilters.kernels.triton.write_and_score import write_and_score

GEOMETRIES = [
    Geometry(2, 8, 8, 16, 128, torch.bfloat16, "LBNHC"),
    Geometry(2, 8, 8, 128, 64, torch.float16, "LBHNC"),
    Geometry(2, 8, 3, 16, 80, torch.bfloat16, "BLHNC"),
    Geometry(2, 4, 4, 256, 256, torch.bfloat16, "LBNHC"),
    Geometry(2, 4, 4, 16, 96, torch.float32, "LBNHC"),
]


class CompileOnlyDriver:
    """Stands for a GPU of a compute capability; nothing can be launched on it."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_all(has_fp8: bool) -> None:
    for geometry in GEOMETRIES:
        bs = geometry.block_size
        sequences = Sequences([Eviction(6 * bs, bs, 4, bs), Eviction(9 * bs, 2 * bs, 4, bs)], geometry, seed=0)
        cache, batch = sequences.cache, sequences.batch
        heads, size = geometry.num_kv_heads, geometry.head_size
        for num_tokens in (1, 64, 8192):
            key = torch.zeros(num_tokens, heads, size, dtype=geometry.dtype)
            slots = torch.zeros(num_tokens, dtype=torch.int64)
            for score in TokenStat:
                write_and_score(key, key, sequences.views[0], cache.planes[0], slots, score, torch.zeros(heads, size))
            if has_fp8 and geometry.dtype == torch.bfloat16:
                for dtype, score in (
                    (torch.float8_e4m3fn, TokenStat.PROJECTION),
                    (torch.float8_e5m2, TokenStat.NEGATIVE_KEY_NORM),
                ):
                    view, scale = sequences.views[0].view(torch.uint8).view(dtype)[..., : 2 * size], torch.ones(1)
                    write_and_score(
                        key, key, view, cache.planes[0], slots, score, torch.zeros(heads, size),
                        key_scale=scale, value_scale=scale,
                    )  # fmt: skip
        copy_pages(cache, batch)
        scores = gather_scores(cache.scores, batch)
        shared = mean_standardised(scores, batch, cache.num_layers, heads)
        compact(cache, batch, select_kept(shared, batch, cache.num_layers, 1), 1)
        compact(cache, batch, select_kept(scores, batch, cache.num_layers, heads), heads)
        filters = torch.zeros(1, cache.num_layers, heads * 4, size)
        score_resident(cache, batch, filters)
        cos = torch.zeros(batch.num_sequences, 1, size).expand(-1, cache.num_layers, -1)
        turns = Turns(cos, cos, torch.zeros(1, size, dtype=torch.int64))
        factors = torch.zeros(1, *filters.shape[1:3], 8, size)
        logits = score_resident(cache, batch, filters, factors, torch.ones(cache.num_layers), turns)
        score_resident(cache, batch, filters[:, :, :heads].contiguous(), turns=turns)
        if has_fp8 and geometry.dtype == torch.bfloat16:
            narrow = Sequences(sequences.evictions, dataclasses.replace(geometry, dtype=torch.float8_e4m3fn), seed=0)
            score_resident(narrow.cache, narrow.batch, filters, factors, torch.ones(cache.num_layers), turns)
            distinctness(narrow.cache, narrow.batch, True, 7)
            value_norms(narrow.cache, narrow.batch)
            queries = torch.zeros(cache.num_layers, heads * 4, 32, size, dtype=geometry.dtype)
            observations, scales = [Observation(0, queries, 0, is_question=True)], torch.ones(cache.num_layers)
            observe(
                narrow.cache,
                narrow.batch,
                observations,
                narrow.cache.scores,
                Softmax(0.1),
                7,
                (6, 12),
                True,
                key_scales=scales,
            )
        queries = torch.zeros(cache.num_layers, heads * 4, 32, size, dtype=geometry.dtype)
        observe(
            cache,
            batch,
            [Observation(0, queries, 0, is_question=True)],
            cache.scores,
            Softmax(0.1),
            7,
            (6, 12),
            shared_by_heads=True,
        )
        for of_values, pool in ((False, 7), (True, 7), (True, 15)):
            distinctness(cache, batch, of_values, pool)
        value_norms(cache, batch)
        mean_softmax(logits, batch, cache.num_layers, heads, 4)
        sizes, sinks = torch.ones(cache.num_layers, dtype=torch.int64), torch.zeros(cache.num_layers, heads * 4)
        softmax = Softmax(0.1, soft_cap=50.0, sinks=sinks, group_sizes=sizes)
        score_resident(cache, batch, filters, factors, None, turns, softmax.soft_cap)
        mean_softmax(logits, batch, cache.num_layers, heads, 4, softmax)
        observe(cache, batch, [Observation(0, queries, 0)], cache.scores, softmax, 7, (6, 12), shared_by_heads=True)
        requests = torch.zeros(5, dtype=torch.int64)
        compute_slots_and_lengths(
            requests, torch.zeros(6, dtype=torch.int32), torch.zeros(9, dtype=torch.int64),
            torch.zeros(5, dtype=torch.int32), torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.uint64),
            torch.zeros(1, dtype=torch.int64), torch.full((1,), bs, dtype=torch.int32), torch.ones(1, dtype=torch.bool),
            torch.zeros(1, 64, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int32),
        )  # fmt: skip
        page_scores(cache.scores, torch.zeros(3, dtype=torch.int64), torch.zeros(2, heads), torch.ones(2, heads))


def launch_latents() -> None:
    """On a cache as DeepSeek-V3 has it, with all its query heads on one GPU."""
    size, latent, heads = 576, 512, 128
    geometry = Geometry(2, 8, 1, 64, size, torch.bfloat16, num_planes=0, value_size=0)
    sequences = Sequences([Eviction(6 * 64, 64, 4, 64), Eviction(9 * 64, 128, 4, 64)], geometry, seed=0)
    batch, num_blocks = sequences.batch, sequences.cache.num_blocks
    planes = torch.zeros(2, num_blocks, 2, 1, 64)
    cache = StridedCache(sequences.views, 2, value_size=0, planes=planes, latent_size=latent)
    for num_tokens in (1, 8192):
        key, slots = torch.zeros(num_tokens, 1, size, dtype=geometry.dtype), torch.zeros(num_tokens, dtype=torch.int64)
        for stat in (TokenStat.PROJECTION, TokenStat.RANDOM):
            write_and_score(key, key[..., :latent], None, planes[0], slots, stat, torch.zeros(1, size))
    copy_pages(cache, batch)
    filters, factors = torch.zeros(1, 2, heads, size), torch.zeros(1, 2, heads, 8, size)
    cos = torch.zeros(batch.num_sequences, 1, size).expand(-1, 2, -1)
    turns = Turns(cos, cos, torch.zeros(1, size, dtype=torch.int64))
    mean_softmax(score_resident(cache, batch, filters, factors, None, turns), batch, 2, 1, heads)
    queries = torch.zeros(2, heads, 32, size, dtype=geometry.dtype)
    observations = [Observation(0, queries, 0, is_question=True)]
    observe(cache, batch, observations, cache.scores, Softmax(0.1), 7, (6, 12), shared_by_heads=True)
    value_norms(cache, batch)
    scores = distinctness(cache, batch, True, 7)
    compact(cache, batch, select_kept(scores, batch, 2, 1), 1)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, bytes of shared memory per block and bytes of stack per thread, from the compiled
    kernel.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        cuobjdump = os.path.join(os.path.dirname(compiler.__file__), "bin", "cuobjdump")
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "shared": found["SHARED"], "spilled": found["STACK"] + found["LOCAL"]}


def main() -> None:
    launch = JITFunction.run
    report: dict[str, dict[str, dict[str, int]]] = {}

    def compile_only(self, *args, **kwargs):
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        used = resources(kernel.asm["cubin"])
        used["shared"] = max(used["shared"], kernel.metadata.shared)  # dynamic shared memory is not in the file
        most = report[str(driver.active.target.arch)].setdefault(self.__name__, {"cases": 0, **dict.fromkeys(used, 0)})
        most["cases"] += 1
        most.update({name: max(most[name], value) for name, value in used.items()})

    JITFunction.run = compile_only
    for capability in map(int, sys.argv[1:]):
        driver.set_active(CompileOnlyDriver(capability))
        report[str(capability)] = {}
        launch_all(has_fp8=capability >= 89)
        launch_latents()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
