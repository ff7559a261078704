"""Time per call of the C++ operators and of the PyTorch reference, on the shapes of SmolLM2-135M.

    python benchmarks/operators.py [--calls 300] [--threads 1]

The two take turns, call by call. Prints medians and ratios, and writes them with machine, versions and commit to
benchmarks/results/. tests/test_csrc.py tests that both compute the same.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
from decode import ROOT
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_qfilters import kernels
from vllm_qfilters.evaluation.environment import describe_run
from vllm_qfilters.kernels import PagedCache, cpu, probe_page_layout, reference

NUM_LAYERS, NUM_QUERY_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 30, 9, 3, 64, 128
RESIDENT, KEPT, SINKS, WINDOW = 1024, 896, 4, 128
DTYPE = torch.bfloat16
RANK = 8
OLD_PAGES = torch.tensor([9, 4, 13, 0, 7, 11, 2, 5])


def make_cache() -> PagedCache:
    """A cache of random numbers, laid out as vLLM lays it out on this CPU."""
    num_planes = 2
    page_elements = NUM_KV_HEADS * BLOCK_SIZE * (2 * HEAD_SIZE + num_planes * 4 // DTYPE.itemsize)
    shape = (NUM_LAYERS, 16, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    head_elements = 2 * BLOCK_SIZE * HEAD_SIZE
    strides = (16 * page_elements, page_elements, head_elements, 2 * HEAD_SIZE, 1)
    buffer = torch.zeros(NUM_LAYERS * 16 * page_elements, dtype=DTYPE)
    isa = _get_attn_isa(DTYPE, BLOCK_SIZE, HEAD_SIZE)

    def write_cache(key, value, kv_cache, slot_mapping):
        keys, values = kv_cache.view(1, 1, 2 * BLOCK_SIZE, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, slot_mapping, isa)

    layout = probe_page_layout(write_cache, BLOCK_SIZE, HEAD_SIZE, DTYPE)
    cache = PagedCache(buffer.as_strided(shape, strides).unbind(), layout, num_planes)
    cache.pages.normal_()
    cache.planes.normal_()
    return cache


def write_calls(cache: PagedCache, num_tokens: int) -> list[Callable[[], None]]:
    """One layer's write, keys being a part of qkv."""
    qkv = torch.randn(num_tokens, (NUM_QUERY_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE).to(DTYPE)
    first = NUM_QUERY_HEADS * HEAD_SIZE
    key = qkv[:, first : first + NUM_KV_HEADS * HEAD_SIZE].view(num_tokens, NUM_KV_HEADS, HEAD_SIZE)
    filters, slots = torch.randn(NUM_KV_HEADS, HEAD_SIZE), torch.arange(num_tokens) % (16 * BLOCK_SIZE)
    return [lambda name=name: name.score_and_store(key, filters, cache.scores[0], slots) for name in (cpu, reference)]


def norm_calls(cache: PagedCache, num_tokens: int) -> list[Callable[[], None]]:
    value, slots = torch.randn(num_tokens, NUM_KV_HEADS, HEAD_SIZE).to(DTYPE), torch.arange(num_tokens) % (16 * BLOCK_SIZE)
    return [lambda name=name: name.store_value_norms(value, cache.planes[0], slots) for name in (cpu, reference)]


def attention_calls(cache: PagedCache) -> list[Callable[[], None]]:
    means, factors = torch.randn(NUM_LAYERS, NUM_QUERY_HEADS, 1 + RANK, HEAD_SIZE).split((1, RANK), dim=2)
    statistics = (means.squeeze(2).contiguous(), factors.contiguous())
    return [lambda name=name: name.expected_attention(cache, OLD_PAGES, RESIDENT, *statistics) for name in (cpu, reference)]


def select_calls(cache: PagedCache, shared_by_heads: bool) -> list[Callable[[], None]]:
    scores = torch.randn(NUM_LAYERS, NUM_KV_HEADS, RESIDENT)
    return [lambda name=name: name.select_kept(scores, KEPT, SINKS, WINDOW, shared_by_heads) for name in (cpu, reference)]


def compact_calls(cache: PagedCache) -> list[Callable[[], None]]:
    """No page is shared with other sequences: none is copied."""
    is_kept = reference.select_kept(torch.randn(NUM_LAYERS, NUM_KV_HEADS, RESIDENT), KEPT, SINKS, WINDOW, False)
    first_out = (KEPT - WINDOW) // BLOCK_SIZE
    new_pages = torch.cat((OLD_PAGES[:first_out], OLD_PAGES[first_out + 1 :]))
    return [lambda name=name: name.compact(cache, OLD_PAGES, new_pages, is_kept, SINKS, WINDOW) for name in (cpu, reference)]


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
    parser.add_argument("--threads", type=int, default=1, help="with more, both wait for whatever else runs on the machine")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "operators.json")
    arguments = parser.parse_args()
    if kernels.IMPLEMENTATION != "C++":
        sys.exit(f"{cpu.LIBRARY} is not built")

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cache = make_cache()
    cases = {
        "static scores of 1 token, one layer": write_calls(cache, 1),
        "static scores of 8 tokens, one layer": write_calls(cache, 8),
        "static scores of 2048 tokens, one layer": write_calls(cache, 2048),
        "value norms of 1 token, one layer": norm_calls(cache, 1),
        "value norms of 8 tokens, one layer": norm_calls(cache, 8),
        "value norms of 2048 tokens, one layer": norm_calls(cache, 2048),
        f"expected attention, rank {RANK}, all layers": attention_calls(cache),
        "selection by head, all layers": select_calls(cache, shared_by_heads=False),
        "selection shared by heads, all layers": select_calls(cache, shared_by_heads=True),
        "compaction of 1024 to 896 tokens, all layers": compact_calls(cache),
    }
    result = {"machine": {**describe_run(), "threads": arguments.threads}, "us_per_call": {}}
    for name, calls in cases.items():
        fast, slow = median_us(calls, arguments.calls)
        result["us_per_call"][name] = {"C++": round(fast, 1), "PyTorch": round(slow, 1), "ratio": round(slow / fast, 1)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")

    for key, value in result["machine"].items():
        print(f"{key}: {value}")
    print(f"\n{'us per call (median)':46}{'C++':>10}{'PyTorch':>10}{'ratio':>8}")
    for name, row in result["us_per_call"].items():
        print(f"{name:46}{row['C++']:>10}{row['PyTorch']:>10}{row['ratio']:>8}")


if __name__ == "__main__":
    main()
