"""Measures ``evict: pressure`` beside plain vLLM and ``evict: always``, with room for the whole load and with less.

    python -m benchmarks elastic models/SmolLM2-135M-Instruct [--shares 1.25 0.5 0.125] [--requests 16]

All requests arrive at once. A share of 1 is what plain vLLM needs for all of them at once; the cache has the same bytes
for all three, and compressed pages are a little larger, hence the room of 1.25. The status is 1 where ``pressure``
evicted nothing and its answers are not plain vLLM's, token for token, or where it preempted and ``always`` did not.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import throughput
from benchmarks.case import Case, Numbers, median
from vllm_qfilters.config import EVICT_ALWAYS, EVICT_PRESSURE

PLAIN = "plain"
KINDS = (PLAIN, EVICT_ALWAYS, EVICT_PRESSURE)


def add_options(parser: argparse.ArgumentParser) -> None:
    throughput.add_load_options(parser, requests=16, output_tokens=300)
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[1.25, 0.5, 0.125],
        help="of what plain vLLM needs; default 1.25 0.5 0.125",
    )
    parser.add_argument("--method", default="qfilters")


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    return {
        _name(kind, share): {
            "method": None if kind == PLAIN else arguments.method,
            "compression": {} if kind == PLAIN else {"evict": kind},
            "kv_cache_memory_bytes": throughput.cache_bytes(arguments, share),
        }
        for share in arguments.shares
        for kind in KINDS
    }


def _name(kind: str, share: float | str) -> str:
    return f"{kind}, cache {float(share):g}"


def _shares(of_round: Mapping[str, Numbers]) -> list[str]:
    return list(dict.fromkeys(variant.rpartition(" ")[2] for variant in of_round))


def measure(job: dict[str, Any]) -> Numbers:
    numbers, answers = throughput.serve(job, job["compression"])
    return {**numbers, "answers_sha256": hashlib.sha256(json.dumps(answers).encode()).hexdigest()}


def ratios(of_round: Mapping[str, Numbers]) -> dict[str, float]:
    found = {}
    for share in _shares(of_round):
        speeds = {kind: of_round[_name(kind, share)]["requests_per_s"] for kind in KINDS}
        for other in (PLAIN, EVICT_ALWAYS):
            found[f"cache {share}: requests per second of pressure over {other}"] = (
                speeds[EVICT_PRESSURE] / speeds[other]
            )
    return found


def problems(of_round: Mapping[str, Numbers]) -> list[str]:
    found = []
    for share in _shares(of_round):
        plain, always, pressure = (of_round[_name(kind, share)] for kind in KINDS)
        if not pressure["evicted_tokens"] and pressure["answers_sha256"] != plain["answers_sha256"]:
            found.append(f"cache {share}: nothing was evicted under pressure, and the answers are not plain vLLM's")
        if pressure["preemptions"] and not always["preemptions"]:
            found.append(f"cache {share}: {pressure['preemptions']} preemptions where evict always has none")
    return found


def draw(figure: Any, numbers: Mapping[str, Sequence[Numbers]]) -> None:
    figure.set_size_inches(15, 4.5)
    shares = _shares(numbers)
    titles = {
        "requests_per_s": "requests per second",
        "preemptions": "preemptions",
        "evicted_tokens": "evicted tokens",
    }
    for panel, (key, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for place, kind in enumerate(KINDS):
            at = [index + 0.27 * (place - 1) for index in range(len(shares))]
            rounds = [numbers[_name(kind, share)] for share in shares]
            label = "plain vLLM" if kind == PLAIN else f"evict: {kind}"
            panel.bar(at, [median(of_share, key) for of_share in rounds], width=0.25, label=label, color=f"C{place}")
            for x, of_share in zip(at, rounds, strict=True):
                panel.plot([x] * len(of_share), [of_round[key] for of_round in of_share], "k.")
        panel.set_xticks(range(len(shares)), shares)
        panel.set_xlabel("cache, as a share of what plain vLLM needs")
        panel.set_title(title, fontsize="medium")
        panel.grid(axis="y", alpha=0.3)
        panel.legend(fontsize="small")


CASE = Case(
    name="elastic",
    description=__doc__,
    add_options=add_options,
    variants=variants,
    measure=measure,
    columns={
        "requests_per_s": "requests/s",
        "output_tokens_per_s": "output tokens/s",
        "mean_running": "mean running",
        "median_ttft_s": "median ttft s",
        "preemptions": "preemptions",
        "evicted_tokens": "evicted tokens",
        "cache_pages": "cache pages",
    },
    ratios=ratios,
    draw=draw,
    problems=problems,
)
main = CASE.main
