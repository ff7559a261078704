# ruff: noqa: E402 (the environment and the path must be set before Triton and this package are imported)
"""Measures the Triton kernels on a GPU, on the shapes of Llama-3.1-8B: median time, GB/s, and percent of the bandwidth
of a copy.

    python benchmarks/gpu_kernels.py [--sequences 16] [--dry-run]

Beside each stands what it is to be compared with: the same write without scores, the write and then the scores in
PyTorch, and the PyTorch reference; and what compaction is for: decode attention of xformers, where it is installed,
over whole caches and over compacted ones. Needs PyTorch and Triton alone. Prints a table and writes it, with card,
driver, versions and commit, to benchmarks/results/. ``--dry-run`` runs small shapes once under Triton's interpreter on
a CPU: its times mean nothing, and are only written where ``--output`` says.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
IS_DRY_RUN = "--dry-run" in sys.argv
if IS_DRY_RUN:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
sys.path.append(str(ROOT))  # for benchmarks/ and tests/paged_attention.py

import torch
import triton

from benchmarks.case import RESULTS, check_output
from vllm_qfilters.commands.evaluation.environment import describe_run
from vllm_qfilters.kernels import REFERENCE_OPS
from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.ops import Observation, Softmax, TokenStat
from vllm_qfilters.kernels.triton.compaction import compact
from vllm_qfilters.kernels.triton.distinctness import distinctness
from vllm_qfilters.kernels.triton.observation import observe
from vllm_qfilters.kernels.triton.score_pages import page_scores
from vllm_qfilters.kernels.triton.score_resident import score_resident
from vllm_qfilters.kernels.triton.selection import gather_scores, mean_standardised, select_kept
from vllm_qfilters.kernels.triton.write_and_score import write_and_score
from vllm_qfilters.plan import RequestCompaction

DEVICE = "cpu" if IS_DRY_RUN else "cuda"
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE, DTYPE = 32, 32, 8, 128, 16, torch.bfloat16
RESIDENT, EVICTED, SINKS, WINDOW = 2048, 128, 4, 1024
RANK, OBSERVED = 8, 32
CONTEXT, BUDGET, ATTENTION_BLOCK = 32768, 2048, 64  # of the decode attention; xformers is at its best with pages of 64
STEPS = (1, 64, 2048, 8192)  # tokens written at once
if IS_DRY_RUN:
    NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, RESIDENT, EVICTED, WINDOW, STEPS = 2, 4, 2, 16, 128, 16, 32, (1, 5)
    CONTEXT, BUDGET, DTYPE = 512, 128, torch.float16  # Triton 3.7's interpreter cannot multiply bfloat16


def make_cache(num_blocks: int, num_layers: int = NUM_LAYERS, block_size: int = BLOCK_SIZE) -> StridedCache:
    """Makes a cache as FLASH_ATTN gets it: token by token, layers outermost, scores behind each page."""
    content = 2 * HEAD_SIZE
    page = NUM_KV_HEADS * block_size * (content + 4 // DTYPE.itemsize)
    buffer = torch.zeros(num_layers * num_blocks * page, dtype=DTYPE, device=DEVICE)
    shape = (num_layers, num_blocks, NUM_KV_HEADS, block_size, content)
    strides = (num_blocks * page, page, content, NUM_KV_HEADS * content, 1)
    cache = StridedCache(buffer.as_strided(shape, strides).unbind())
    cache.key_values.normal_()
    cache.scores.normal_()
    return cache


def median_ms(call: Callable[[], object]) -> float:
    if IS_DRY_RUN:
        begin = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - begin)
    return triton.testing.do_bench(call, warmup=50, rep=300, return_mode="median")


def write_cases() -> dict[str, tuple[Callable[[], object], int]]:
    """Writes one layer's keys and values of a step, parts of one qkv tensor, to scattered slots."""
    num_blocks = max(STEPS) // BLOCK_SIZE + 1
    cache = make_cache(num_blocks, num_layers=1)
    view, planes, plane = cache.key_values[0], cache.planes[0], cache.scores[0]
    filters = torch.randn(NUM_KV_HEADS, HEAD_SIZE, device=DEVICE)
    cases = {}
    for num_tokens in STEPS:
        qkv = torch.randn(num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE, device=DEVICE, dtype=DTYPE)
        key, value = qkv[:, NUM_HEADS * HEAD_SIZE :].view(num_tokens, 2, NUM_KV_HEADS, HEAD_SIZE).unbind(1)
        slots = torch.randperm(num_blocks * BLOCK_SIZE, device=DEVICE)[:num_tokens]
        num_bytes = 2 * 2 * key.numel() * DTYPE.itemsize

        def fused(key=key, value=value, slots=slots):
            write_and_score(key, value, view, planes, slots, TokenStat.PROJECTION, filters)

        def write(key=key, value=value, slots=slots):
            write_and_score(key, value, view, planes, slots, TokenStat.NONE)

        def unfused(key=key, value=value, slots=slots):
            write_and_score(key, value, view, planes, slots, TokenStat.NONE)
            plane[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = (key.float() * filters).sum(-1)

        def pytorch(key=key, value=value, slots=slots):
            REFERENCE_OPS.write(TokenStat.PROJECTION, key, value, view, planes, slots, filters)

        for name, call in (
            ("fused", fused),
            ("write alone", write),
            ("write, then PyTorch", unfused),
            ("PyTorch", pytorch),
        ):
            cases[f"write and score {num_tokens} tokens, one layer: {name}"] = (call, num_bytes)
    return cases


def make_batch(num_sequences: int, resident: int, evicted: int, window: int, block_size: int) -> CompactionBatch:
    """Compacts sequences that are scattered over a cache of just their pages, each of which loses its share."""
    num_pages = resident // block_size
    pages = torch.randperm(num_sequences * num_pages).view(num_sequences, num_pages)
    first_out = (resident - evicted - window) // block_size
    compactions = []
    for row in pages.tolist():
        new_pages = row[:first_out] + row[first_out + evicted // block_size :]
        compactions.append(RequestCompaction("", resident, resident, evicted, SINKS, window, tuple(new_pages)))
    return CompactionBatch.make(compactions, range(num_sequences), pages.to(DEVICE, torch.int32))


def compaction_cases(num_sequences: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Compacts all layers of several sequences, each of which loses its share."""
    cache = make_cache(num_sequences * RESIDENT // BLOCK_SIZE)
    batch = make_batch(num_sequences, RESIDENT, EVICTED, WINDOW, BLOCK_SIZE)
    block_table = batch.block_table

    scores = gather_scores(cache.scores, batch)
    is_kept = select_kept(scores, batch, NUM_LAYERS, NUM_KV_HEADS)
    filters = torch.randn(1, NUM_LAYERS, NUM_HEADS, HEAD_SIZE, device=DEVICE)
    factors = torch.randn(1, NUM_LAYERS, NUM_HEADS, RANK, HEAD_SIZE, device=DEVICE)
    queries = torch.randn(NUM_LAYERS, NUM_HEADS, OBSERVED, HEAD_SIZE, device=DEVICE, dtype=DTYPE)
    observations = [Observation(index, queries, 0, is_question=True) for index in range(num_sequences)]
    full_pages = block_table.flatten()[: 8 * num_sequences].long()
    mean, deviation = (torch.ones(NUM_LAYERS, NUM_KV_HEADS, device=DEVICE) for _ in range(2))
    num_heads, num_tokens = NUM_LAYERS * NUM_KV_HEADS, num_sequences * RESIDENT
    # Of the tokens between sinks and window almost all lie behind the first that is evicted.
    num_moved = num_sequences * (RESIDENT - EVICTED - SINKS - WINDOW)
    row_bytes = 2 * HEAD_SIZE * DTYPE.itemsize + 4

    def observe_queries():
        observe(cache, batch, observations, cache.scores, Softmax(HEAD_SIZE**-0.5), 7, (6, 12), shared_by_heads=True)

    def whole():
        again = CompactionBatch.make(batch.compactions, batch.table_rows, block_table)
        scores = mean_standardised(gather_scores(cache.scores, again), again, NUM_LAYERS, NUM_KV_HEADS)
        compact(cache, again, select_kept(scores, again, NUM_LAYERS, 1), 1)

    def compact_pytorch():
        for index, compaction in enumerate(batch.compactions):
            new_pages = torch.tensor(compaction.block_ids, device=DEVICE)
            kept = batch_is_kept[index]
            REFERENCE_OPS.functions.compact(cache, block_table[index].long(), new_pages, kept, WINDOW)

    batch_is_kept = [part.bool() for part in batch.split(is_kept, NUM_LAYERS, NUM_KV_HEADS)]
    of = f"{num_sequences} x {RESIDENT} tokens, {NUM_LAYERS} layers"
    key_bytes = num_heads * num_tokens * HEAD_SIZE * DTYPE.itemsize
    moved_bytes = num_heads * (2 * num_moved * row_bytes + num_tokens)
    score_bytes = NUM_LAYERS * NUM_HEADS * num_tokens * 4
    page_bytes = full_pages.numel() * num_heads * BLOCK_SIZE * 4
    return {
        f"score resident keys, {of}": (lambda: score_resident(cache, batch, filters), key_bytes + score_bytes),
        f"score resident keys, rank {RANK}, {of}": (
            lambda: score_resident(cache, batch, filters, factors),
            key_bytes + score_bytes,
        ),
        f"attention of the last {OBSERVED} queries, {of}": (observe_queries, 2 * key_bytes),
        f"how distinct values are, {of}": (lambda: distinctness(cache, batch, True, 7), 2 * key_bytes),
        f"gather scores, {of}": (lambda: gather_scores(cache.scores, batch), 2 * 4 * num_heads * num_tokens),
        f"scores of {full_pages.numel()} pages": (
            lambda: page_scores(cache.scores, full_pages, mean, deviation),
            page_bytes,
        ),
        f"select, {of}": (lambda: select_kept(scores, batch, NUM_LAYERS, NUM_KV_HEADS), 5 * num_heads * num_tokens),
        f"compact to {RESIDENT - EVICTED}, {of}": (lambda: compact(cache, batch, is_kept, NUM_KV_HEADS), moved_bytes),
        f"compact to {RESIDENT - EVICTED}, {of}: PyTorch": (compact_pytorch, moved_bytes),
        f"whole compaction, heads together, {of}": (whole, num_heads * 2 * num_moved * row_bytes),
    }


def attention_cases(num_sequences: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Runs one layer's decode attention with xformers: what every step costs before and after a compaction."""
    from tests.paged_attention import attend, keys_and_values, paged_bias

    group = NUM_HEADS // NUM_KV_HEADS
    cache = make_cache(num_sequences * CONTEXT // ATTENTION_BLOCK, num_layers=1, block_size=ATTENTION_BLOCK)
    batch = make_batch(num_sequences, CONTEXT, CONTEXT - BUDGET, min(WINDOW, BUDGET // 2), ATTENTION_BLOCK)
    query = torch.randn(1, num_sequences, NUM_KV_HEADS, group, HEAD_SIZE, device=DEVICE, dtype=DTYPE)
    before, after = (batch.block_table.tolist(), CONTEXT), ([list(row.block_ids) for row in batch.compactions], BUDGET)
    key, value = keys_and_values(cache.key_values[0], group)
    scores = gather_scores(cache.scores, batch)
    compact(cache, batch, select_kept(scores, batch, 1, NUM_KV_HEADS), NUM_KV_HEADS)
    compacted_key, compacted_value = keys_and_values(cache.key_values[0], group)
    cases = {}
    for name, (pages, length), tensors in (
        ("whole", before, (key, value)),
        ("compacted", after, (compacted_key, compacted_value)),
    ):
        bias = paged_bias(pages, [length] * num_sequences, 1, ATTENTION_BLOCK, torch.device(DEVICE))
        num_bytes = num_sequences * length * NUM_KV_HEADS * 2 * HEAD_SIZE * DTYPE.itemsize
        cases[f"xformers decode attention, {num_sequences} x {length} tokens, one layer: {name}"] = (
            lambda tensors=tensors, bias=bias: attend(query, *tensors, bias),
            num_bytes,
        )
    return cases


def copy_bandwidth() -> float:
    """Measures the GB/s that a copy of 1 GiB reads and writes."""
    source = torch.empty(1 << (20 if IS_DRY_RUN else 30), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sequences", type=int, default=2 if IS_DRY_RUN else 16, help="compacted at once (268 MB each)"
    )
    parser.add_argument("--dry-run", action="store_true", help="small shapes, once, without a GPU")
    parser.add_argument("--output", type=pathlib.Path, default=None if IS_DRY_RUN else RESULTS / "gpu_kernels.json")
    arguments = parser.parse_args()
    check_output(parser, arguments)
    torch.manual_seed(0)
    copied = copy_bandwidth()
    result = {
        "dry_run": IS_DRY_RUN,
        "run": describe_run(),
        "copy_GB_per_s": round(copied, 1),
        "cases": {},
        "skipped": {},
    }
    for key, value in (result["run"] | {"copy GB/s": result["copy_GB_per_s"]}).items():
        print(f"{key}: {value}")
    print(f"\n{'':76}{'ms':>10}{'GB/s':>10}{'% of copy':>12}")
    groups = [write_cases, lambda: compaction_cases(arguments.sequences), lambda: attention_cases(arguments.sequences)]
    if importlib.util.find_spec("xformers") is None:
        result["skipped"]["xformers decode attention"] = "xformers is not installed"
        groups.pop()
    for make_cases in groups:
        for name, (call, num_bytes) in make_cases().items():
            ms = median_ms(call)
            row = {"ms": round(ms, 4), "GB_per_s": round(num_bytes / ms / 1e6, 1)}
            row["percent_of_copy"] = round(100 * row["GB_per_s"] / copied, 1)
            result["cases"][name] = row
            print(f"{name:76}{row['ms']:>10}{row['GB_per_s']:>10}{row['percent_of_copy']:>12}")
    for name, reason in result["skipped"].items():
        print(f"{name}: skipped, {reason}")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
