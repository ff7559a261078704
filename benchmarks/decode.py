"""Time per token, time to the first token, and pages, against context: plain vLLM, ours, StreamingLLM, and the limit.

    python -m benchmarks decode models/SmolLM2-135M-Instruct [--contexts 1000 2000 4000 7000] [--budget 1024] [--sequences 8]

Every engine runs all contexts. The limit is plain vLLM at ``budget`` tokens of context, which no compression can beat. The time
to the first token is that of a sequence alone.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.case import Case, Numbers
from benchmarks.engine import Engine


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", type=int, nargs="+", default=[1000, 2000, 4000, 7000], help="tokens when decoding begins")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=160, help="decode steps timed, per context")
    parser.add_argument("--methods", nargs="+", default=["qfilters", "streaming"])


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    compressed = {method: {"method": method} for method in arguments.methods}
    return {"plain": {"method": None}, **compressed, "limit": {"method": None, "contexts": [arguments.budget - 1]}}


def measure(job: dict[str, Any]) -> Numbers:
    engine = Engine(
        job,
        job["method"],
        {},
        max_model_len=max(job["contexts"]) + job["steps"] + 256,
        enable_prefix_caching=False,
    )
    by_context = {str(context): measure_context(engine, job, context) for context in job["contexts"]}
    return {
        **by_context[str(max(job["contexts"]))],
        "contexts": by_context,
        "block_size": engine.manager.block_size,
        "cache_pages": engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
    }


def measure_context(engine: Engine, job: dict[str, Any], context: int) -> dict[str, Any]:
    first, *others = engine.prompts(job["sequences"], context)
    evicted, pages_while_prefilling = engine.evicted_tokens, 0

    def run_prefill() -> float:
        nonlocal pages_while_prefilling
        begin = time.perf_counter()
        while any(r.is_prefill_chunk or not r.num_computed_tokens for r in engine.scheduler.requests.values()):
            engine.step()
            pages_while_prefilling = max(pages_while_prefilling, engine.pages())
        return time.perf_counter() - begin

    max_tokens = job["steps"] + 200  # the first sequence decodes while the others are read
    engine.add(f"{context}-first", first, max_tokens)
    ttft = run_prefill()
    for index, prompt in enumerate(others):
        engine.add(f"{context}-{index}", prompt, max_tokens)
    prefill = run_prefill()
    for _ in range(4):
        engine.step()
    seconds, pages = [], 0
    for _ in range(job["steps"]):
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
        pages = max(pages, engine.pages())
    evicted = engine.evicted_tokens - evicted
    engine.drop_everything()
    return {
        "step_ms": 1000 * statistics.median(seconds),
        "mean_step_ms": 1000 * statistics.fmean(seconds),
        "ttft_s": ttft,
        "prefill_s": ttft + prefill,
        "pages_per_sequence": pages,
        "pages_while_prefilling": pages_while_prefilling,
        "evicted_tokens": evicted,
    }


def ratios(of_round: Mapping[str, Numbers]) -> dict[str, float]:
    plain, limit = of_round["plain"], of_round["limit"]
    found = {}
    for method, numbers in of_round.items():
        if method in ("plain", "limit"):
            continue
        found[f"{method}: decode speedup over plain"] = plain["mean_step_ms"] / numbers["mean_step_ms"]
        found[f"{method}: share of the limit"] = limit["mean_step_ms"] / numbers["mean_step_ms"]
        found[f"{method}: prefill speedup over plain"] = plain["prefill_s"] / numbers["prefill_s"]
        found[f"{method}: pages saved, times"] = plain["pages_per_sequence"] / numbers["pages_per_sequence"]
    return found


def draw(figure: Any, numbers: Mapping[str, Sequence[Numbers]]) -> None:
    figure.set_size_inches(15, 4.5)
    titles = {
        "mean_step_ms": "ms per decode step of all sequences",
        "ttft_s": "s to the first token of one sequence",
        "pages_per_sequence": "pages per sequence while decoding",
    }
    for panel, (key, title) in zip(figure.subplots(1, len(titles)), titles.items()):
        for variant, rounds in numbers.items():
            points = {int(c): statistics.median(r["contexts"][c][key] for r in rounds) for c in rounds[0]["contexts"]}
            if variant == "limit":
                panel.axhline(*points.values(), color="black", linestyle="--", linewidth=1, label="plain at the budget")
            else:
                panel.plot(points.keys(), points.values(), marker="o", label=variant)
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("context (tokens)")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")


CASE = Case(
    name="decode",
    description=__doc__,
    add_options=add_options,
    variants=variants,
    measure=measure,
    columns={
        "step_ms": "ms per step (median)",
        "mean_step_ms": "(mean)",
        "ttft_s": "ttft s",
        "prefill_s": "prefill s",
        "pages_per_sequence": "pages/sequence",
        "pages_while_prefilling": "while prefilling",
    },
    ratios=ratios,
    draw=draw,
)
main = CASE.main
