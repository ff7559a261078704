"""Measures prompts that share long prefixes, as agents send them: at every turn an agent sends the system prompt of its
kind and all that was said.

    python -m benchmarks agents models/SmolLM2-135M-Instruct [--kinds 2] [--agents 8] [--turns 4] [--shared 1500]

Plain vLLM and ours run with the prefix cache and without it: compression that needs the prefix cache off would lose
what lies between. With ``resume``, a turn goes on from what the last one held at its end. The agents of a turn run at
once; the next turn begins when all have finished. With as many kinds as agents each has a long history of its own.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.case import Case, Numbers, bar_panels
from benchmarks.engine import Engine
from benchmarks.throughput import bytes_per_token

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"method": None},
    "layer": {"method": "qfilters"},
    "page": {"method": "qfilters", "granularity": "page"},
}
OFF = ", prefix cache off"
VARIANTS = {
    name + ("" if caches else OFF): {**job, "enable_prefix_caching": caches}
    for name, job in KINDS.items()
    for caches in (True, False)
} | {
    f"{name}, resume": {**KINDS[name], "prefix": "resume", "enable_prefix_caching": True} for name in ("layer", "page")
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kinds", type=int, default=2, help="different shared prefixes")
    parser.add_argument("--agents", type=int, default=8, help="in all")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--shared", type=int, default=1500, help="tokens of a shared prefix; default %(default)s")
    parser.add_argument("--said", type=int, default=100, help="new tokens per turn; default %(default)s")
    parser.add_argument("--output-tokens", type=int, default=60, help="answered per turn; default %(default)s")
    parser.add_argument(
        "--cache",
        type=float,
        help="share of what plain vLLM holds of all histories; in place of --kv-cache-memory-bytes",
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    cache = {}
    if arguments.cache is not None:
        said = arguments.turns * (arguments.said + arguments.output_tokens)
        tokens = arguments.kinds * arguments.shared + arguments.agents * said
        cache = {"kv_cache_memory_bytes": int(tokens * bytes_per_token(arguments) * arguments.cache)}
    return {name: {**VARIANTS[name], **cache} for name in arguments.variants}


def measure(job: dict[str, Any]) -> Numbers:
    length = job["shared"] + job["turns"] * (job["said"] + job["output_tokens"])
    engine = Engine(
        job,
        job["method"],
        {name: job[name] for name in ("granularity", "prefix") if name in job},
        max_model_len=length,
        enable_prefix_caching=job["enable_prefix_caching"],
    )
    prefixes = engine.prompts(job["kinds"], job["shared"])
    said = engine.prompts(job["agents"], job["turns"] * job["said"])
    histories = [list(prefixes[agent % job["kinds"]]) for agent in range(job["agents"])]
    first_token, prompt_tokens, cached_tokens, total = [], 0, 0, 0.0
    for turn in range(job["turns"]):
        for agent, history in enumerate(histories):
            history += said[agent][turn * job["said"] :][: job["said"]]
            engine.add(f"{turn}-{agent}", history, job["output_tokens"])
            prompt_tokens += len(history)
        begin, seen = time.perf_counter(), set()
        while engine.engine.has_unfinished_requests():
            for output in engine.step():
                if output.request_id not in seen:
                    seen.add(output.request_id)
                    first_token.append(time.perf_counter() - begin)
                if output.finished:
                    histories[int(output.request_id.split("-")[1])] += output.outputs[0].token_ids
                    cached_tokens += output.num_cached_tokens
        total += time.perf_counter() - begin
    return {
        "seconds": total,
        "turns_per_s": job["agents"] * job["turns"] / total,
        "median_ttft_s": statistics.median(first_token),
        "cached_percent": 100 * cached_tokens / prompt_tokens,
        "evicted_tokens": engine.evicted_tokens,
        "preemptions": engine.preemptions,
    }


def ratios(of_round: Mapping[str, Numbers]) -> dict[str, float]:
    found = {}
    for name in KINDS:
        if name in of_round and name + OFF in of_round:
            with_cache, without = of_round[name]["turns_per_s"], of_round[name + OFF]["turns_per_s"]
            found[f"{name}: with the prefix cache over without"] = with_cache / without
    for name, numbers in of_round.items():
        if "plain" in of_round and name != "plain" and not name.endswith(OFF):
            speedup = numbers["turns_per_s"] / of_round["plain"]["turns_per_s"]
            found[f"{name}: over plain, both with the prefix cache"] = speedup
    return found


def draw(figure: Any, numbers: Mapping[str, Sequence[Numbers]]) -> None:
    titles = {"turns_per_s": "turns per second", "median_ttft_s": "median s to the first token"}
    titles["cached_percent"] = "percent of prompt tokens from the prefix cache"
    bar_panels(figure, numbers, titles)


CASE = Case(
    name="agents",
    description=__doc__,
    add_options=add_options,
    variants=variants,
    measure=measure,
    columns={
        "turns_per_s": "turns/s",
        "median_ttft_s": "median ttft s",
        "cached_percent": "% cached",
        "evicted_tokens": "evicted",
        "preemptions": "preemptions",
    },
    ratios=ratios,
    draw=draw,
)
main = CASE.main
