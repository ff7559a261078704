"""Measures the time per call of the C++ operators, of the PyTorch reference, and of memory, on the shapes of the demo
model, SmolLM2-135M.

    python -m benchmarks operators [--calls 300] [--threads 1]

Operators and reference take turns, call by call. The command prints medians, ratios, and what an operator reads and
writes per second in percent of what a copy of 256 MB does, and writes them with machine, versions, commit and command
to benchmarks/results/. Decode steps write so little that a call costs more than its bytes; where an operator's data fit
into the processor's cache, it can be faster than memory. tests/test_csrc.py tests that both compute the same.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks.case import RESULTS
from vllm_qfilters import kernels
from vllm_qfilters.commands.evaluation.environment import describe_run
from vllm_qfilters.kernels import PagedCache, cpp, probe_page_layout, reference

NUM_LAYERS, NUM_QUERY_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 30, 9, 3, 64, 128
NUM_HEADS = NUM_LAYERS * NUM_KV_HEADS  # KV heads of all layers
NUM_PLANES = 1
RESIDENT, KEPT, SINKS, WINDOW = 1024, 896, 4, 128
DTYPE = torch.bfloat16
RANK = 8
OLD_PAGES = torch.tensor([9, 4, 13, 0, 7, 11, 2, 5])


class Case(NamedTuple):
    """A case holds the two implementations of one call, and the bytes it has to read and write."""

    operator: Callable[[], object]
    reference: Callable[[], object]
    num_bytes: int


def case_of(name: str, arguments: tuple, num_bytes: int) -> Case:
    operator, slow = getattr(cpp, name), getattr(reference, name)
    return Case(lambda: operator(*arguments), lambda: slow(*arguments), num_bytes)


def make_cache() -> PagedCache:
    """Makes a cache of random numbers, laid out as vLLM lays it out on this CPU."""
    page_elements = NUM_KV_HEADS * BLOCK_SIZE * (2 * HEAD_SIZE + NUM_PLANES * 4 // DTYPE.itemsize)
    shape = (NUM_LAYERS, 16, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    head_elements = 2 * BLOCK_SIZE * HEAD_SIZE
    strides = (16 * page_elements, page_elements, head_elements, 2 * HEAD_SIZE, 1)
    buffer = torch.zeros(NUM_LAYERS * 16 * page_elements, dtype=DTYPE)
    isa = _get_attn_isa(DTYPE, BLOCK_SIZE, HEAD_SIZE)

    def write_cache(key, value, kv_cache, slot_mapping):
        keys, values = kv_cache.view(1, 1, 2 * BLOCK_SIZE, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, slot_mapping, isa)

    layout = probe_page_layout(write_cache, BLOCK_SIZE, HEAD_SIZE, DTYPE)
    cache = PagedCache(buffer.as_strided(shape, strides).unbind(), layout, NUM_PLANES)
    cache.pages.normal_()
    cache.planes.normal_()
    return cache


def write_case(cache: PagedCache, num_tokens: int) -> Case:
    """Writes one layer's keys and values; the keys are a part of qkv."""
    qkv = torch.randn(num_tokens, (NUM_QUERY_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE).to(DTYPE)
    first = NUM_QUERY_HEADS * HEAD_SIZE
    key = qkv[:, first : first + NUM_KV_HEADS * HEAD_SIZE].view(num_tokens, NUM_KV_HEADS, HEAD_SIZE)
    filters, slots = torch.randn(NUM_KV_HEADS, HEAD_SIZE), torch.arange(num_tokens) % (16 * BLOCK_SIZE)
    num_bytes = key.nbytes + filters.nbytes + slots.nbytes + 4 * num_tokens * NUM_KV_HEADS
    return case_of("score_and_store", (key, filters, cache.scores[0], slots), num_bytes)


def norm_case(cache: PagedCache) -> Case:
    num_bytes = NUM_HEADS * RESIDENT * (HEAD_SIZE * DTYPE.itemsize + 4)
    return case_of("value_norms", (cache, OLD_PAGES, RESIDENT), num_bytes)


def page_case(cache: PagedCache, num_pages: int) -> Case:
    statistics = (torch.randn(NUM_LAYERS, NUM_KV_HEADS), torch.rand(NUM_LAYERS, NUM_KV_HEADS) + 0.1)
    num_bytes = 4 * num_pages * NUM_HEADS * BLOCK_SIZE
    return case_of("page_scores", (cache.scores, OLD_PAGES[:num_pages], *statistics), num_bytes)


def attention_case(cache: PagedCache) -> Case:
    means, factors = torch.randn(NUM_LAYERS, NUM_QUERY_HEADS, 1 + RANK, HEAD_SIZE).split((1, RANK), dim=2)
    means, factors = means.squeeze(2).contiguous(), factors.contiguous()
    num_bytes = means.nbytes + factors.nbytes + NUM_HEADS * RESIDENT * (HEAD_SIZE * DTYPE.itemsize + 4)
    return case_of("expected_attention", (cache, OLD_PAGES, RESIDENT, means, factors), num_bytes)


def distinctness_case(cache: PagedCache) -> Case:
    num_bytes = NUM_HEADS * RESIDENT * (2 * HEAD_SIZE * DTYPE.itemsize + 4)  # two reads of the values
    return case_of("distinctness", (cache, OLD_PAGES, RESIDENT, True, 7), num_bytes)


def select_case(shared_by_heads: bool) -> Case:
    scores = torch.randn(NUM_LAYERS, NUM_KV_HEADS, RESIDENT)
    return case_of("select_kept", (scores, KEPT, SINKS, WINDOW, shared_by_heads), scores.nbytes + scores.numel())


def compact_case(cache: PagedCache) -> Case:
    """No page is shared with other sequences, so none is copied."""
    is_kept = reference.select_kept(torch.randn(NUM_LAYERS, NUM_KV_HEADS, RESIDENT), KEPT, SINKS, WINDOW, False)
    first_out, after_out = reference.taken_out(RESIDENT, RESIDENT - KEPT, WINDOW, BLOCK_SIZE)
    new_pages = torch.cat((OLD_PAGES[: first_out // BLOCK_SIZE], OLD_PAGES[after_out // BLOCK_SIZE :]))
    num_moved = reference.moves(is_kept, first_out, after_out)[0].numel()
    num_bytes = is_kept.nbytes + 2 * num_moved * (2 * HEAD_SIZE * DTYPE.itemsize + 4 * NUM_PLANES)
    return case_of("compact", (cache, OLD_PAGES, new_pages, is_kept, WINDOW), num_bytes)


def copy_bandwidth() -> float:
    """Measures the GB/s that a copy of 256 MB reads and writes."""
    source = torch.ones(1 << 28, dtype=torch.uint8)
    target = torch.empty_like(source)
    (taken,) = median_us([lambda: target.copy_(source)], 10)
    return 2 * source.nbytes / taken / 1e3


def median_us(calls: list[Callable[[], None]], count: int) -> list[float]:
    seconds = [[] for _ in calls]
    for number in range(count + 5):
        for call, taken in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            call()
            if number >= 5:
                taken.append(time.perf_counter() - begin)
    return [1e6 * statistics.median(taken) for taken in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300, help="timed calls of each implementation")
    parser.add_argument(
        "--threads", type=int, default=1, help="with more, both wait for whatever else runs on the machine"
    )
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "operators.json")
    arguments = parser.parse_args()
    if kernels.IMPLEMENTATION != "C++":
        sys.exit(f"{cpp.LIBRARY} is not built")

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cache = make_cache()
    cases = {
        "score_and_store, 1 token, one layer": write_case(cache, 1),
        "score_and_store, 8 tokens, one layer": write_case(cache, 8),
        "score_and_store, 2048 tokens, one layer": write_case(cache, 2048),
        "value_norms, all layers": norm_case(cache),
        "page_scores, 1 page, all layers": page_case(cache, 1),
        "page_scores, 8 pages, all layers": page_case(cache, 8),
        f"expected_attention, rank {RANK}, all layers": attention_case(cache),
        "distinctness, all layers": distinctness_case(cache),
        "select_kept, by head, all layers": select_case(shared_by_heads=False),
        "select_kept, shared by heads, all layers": select_case(shared_by_heads=True),
        f"compact, {RESIDENT} to {KEPT} tokens, all layers": compact_case(cache),
    }
    bandwidth = copy_bandwidth()
    result = {
        "machine": {**describe_run(), "threads": arguments.threads},
        "copy_GB_per_s": round(bandwidth, 2),
        "us_per_call": {},
    }
    for name, case in cases.items():
        fast, slow = median_us([case.operator, case.reference], arguments.calls)
        result["us_per_call"][name] = {
            "C++": round(fast, 1),
            "PyTorch": round(slow, 1),
            "ratio": round(slow / fast, 1),
            "bytes": case.num_bytes,
            "percent_of_copy": round(100 * case.num_bytes / fast / 1e3 / bandwidth, 1),
        }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")

    for key, value in (result["machine"] | {"copy GB/s": result["copy_GB_per_s"]}).items():
        print(f"{key}: {value}")
    print(f"\n{'us per call (median)':46}{'C++':>10}{'PyTorch':>10}{'ratio':>8}{'% of copy':>11}")
    for name, row in result["us_per_call"].items():
        print(f"{name:46}{row['C++']:>10}{row['PyTorch']:>10}{row['ratio']:>8}{row['percent_of_copy']:>11}")


if __name__ == "__main__":
    main()
