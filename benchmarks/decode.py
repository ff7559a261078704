"""Measures time per token, time to the first token, and pages, against context.

    python -m benchmarks decode models/SmolLM2-135M-Instruct [--contexts 7000] [--budget 512 1024 2048] [--sequences 8]
    [--methods qfilters streaming] [--no-limit]

Plain vLLM, ours and StreamingLLM on the same engine run all contexts. The limit of a budget is plain vLLM where
contexts are as long as the budget halfway through the steps timed: no compression can beat it. A sequence is read and
decodes alone before the others come. Where as many steps are timed as tokens are evicted in one go (``interval``),
every sequence that is as long as its budget is compacted once in them.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.case import Case, Numbers
from benchmarks.engine import Engine


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=int, nargs="+", default=[1024], help="tokens; default 1024")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[1000, 2000, 4000, 7000], help="tokens when decoding begins"
    )
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=160, help="decode steps timed, per context")
    parser.add_argument("--methods", nargs="+", default=["qfilters", "streaming"])
    parser.add_argument("--limit", action=argparse.BooleanOptionalAction, default=True, help="measure the limits too")


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    found = {"plain": {"method": None}}
    for budget in arguments.budget:
        found |= {f"{method} {budget}": {"method": method, "budget": budget} for method in arguments.methods}
        if arguments.limit:
            found[f"limit {budget}"] = {"method": None, "contexts": [budget - arguments.steps // 2]}
    return found


def measure(job: dict[str, Any]) -> Numbers:
    engine = Engine(
        job,
        job["method"],
        {},
        max_model_len=max(job["contexts"]) + 3 * job["steps"] + 256,
        enable_prefix_caching=False,
    )
    for layer in getattr(engine.runner, "layers", []):
        # On GPUs the token stats are written by the kernel that writes keys and values.
        if layer.impl.write_stats is not None and not engine.runner.ops.warm_up_tokens:
            engine.time_calls(layer.impl, "write_stats", "token stats")
    by_context = {str(context): measure_context(engine, job, context) for context in job["contexts"]}
    return {
        **by_context[str(max(job["contexts"]))],
        "contexts": by_context,
        "block_size": engine.manager.block_size,
        "cache_pages": engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
    }


def measure_context(engine: Engine, job: dict[str, Any], context: int) -> dict[str, Any]:
    steps, evicted = job["steps"], engine.evicted_tokens
    first, *others = engine.prompts(job["sequences"], context)
    engine.add("first", first, max_tokens=steps + 100)
    ttft, _ = engine.read_prompts()
    decoding_alone = decode(engine, steps)
    engine.drop_everything()
    for index, prompt in enumerate((first, *others)):
        # The first ones decode while the last are read.
        engine.add(f"{context}-{index}", prompt, max_tokens=3 * steps + 100)
    prefill, pages_while_prefilling = engine.read_prompts()
    decoding = decode(engine, steps)
    evicted = engine.evicted_tokens - evicted
    engine.drop_everything()
    return {
        **decoding,
        **{f"alone_{name}": number for name, number in decoding_alone.items()},
        "ttft_s": ttft,
        "prefill_s": prefill,
        "pages_while_prefilling": pages_while_prefilling,
        "evicted_tokens": evicted,
    }


def decode(engine: Engine, steps: int) -> dict[str, float]:
    """Times ``steps`` steps after some that warm up."""
    for _ in range(4):
        engine.step()
    seconds, pages, compacting = [], 0, engine.compaction_seconds
    engine.seconds.clear()
    for _ in range(steps):
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
        pages = max(pages, engine.pages())
    compressing = engine.compaction_seconds - compacting + engine.seconds.total()
    return {
        "step_ms": 1000 * statistics.median(seconds),
        "mean_step_ms": 1000 * statistics.fmean(seconds),
        "compression_percent": 100 * compressing / sum(seconds),
        "pages_per_sequence": pages,
    }


def ratios(of_round: Mapping[str, Numbers]) -> dict[str, float]:
    plain, found = of_round["plain"], {}
    for variant, numbers in of_round.items():
        method, _, budget = variant.partition(" ")
        if method in ("plain", "limit"):
            continue
        limit = of_round.get(f"limit {budget}")
        for key, name in (("mean_step_ms", "decode"), ("alone_mean_step_ms", "decode of one sequence")):
            found[f"{variant}: {name} speedup over plain"] = plain[key] / numbers[key]
            if limit is not None:
                found[f"{variant}: {name}, share of the limit"] = limit[key] / numbers[key]
        found[f"{variant}: prefill speedup over plain"] = plain["prefill_s"] / numbers["prefill_s"]
        found[f"{variant}: time to the first token, plain to this"] = plain["ttft_s"] / numbers["ttft_s"]
        found[f"{variant}: pages saved, times"] = plain["pages_per_sequence"] / numbers["pages_per_sequence"]
    return found


def draw(figure: Any, numbers: Mapping[str, Sequence[Numbers]]) -> None:
    figure.set_size_inches(15, 4.5)
    titles = {
        "mean_step_ms": "ms per decode step of all sequences",
        "ttft_s": "s to the first token of one sequence",
        "pages_per_sequence": "pages per sequence while decoding",
    }
    for panel, (key, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for variant, rounds in numbers.items():
            points = {int(c): statistics.median(r["contexts"][c][key] for r in rounds) for c in rounds[0]["contexts"]}
            if variant.startswith("limit"):
                label = variant.replace("limit", "plain at")
                panel.axhline(*points.values(), color="black", linestyle="--", linewidth=1, label=label)
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
        "compression_percent": "compression %",
        "alone_mean_step_ms": "one sequence",
        "ttft_s": "ttft s",
        "prefill_s": "prefill s",
        "pages_per_sequence": "pages/sequence",
        "pages_while_prefilling": "while prefilling",
    },
    ratios=ratios,
    draw=draw,
)
main = CASE.main
