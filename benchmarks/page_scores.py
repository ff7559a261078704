"""Measures what page scores cost: the share of decode steps that is spent on them, part by part.

    python -m benchmarks page_scores models/SmolLM2-135M-Instruct [--context 2000] [--budget 1024] [--sequences 8]
    [--steps 300]

One engine in page granularity decodes; the functions that score are timed where they run, within the steps whose share
they are.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.case import Case, Numbers
from benchmarks.engine import Engine

PARTS = {
    "keys scored at the write": ("layers", "write_stats"),
    "pages scored on the worker": ("page_scorer", "score_filled_pages"),
    "scores put into the output": ("page_scorer", "attach"),
    "scores expected by the manager": ("pages", "expect_scores"),
    "scores received by the manager": ("pages", "receive_scores"),
    "pages chosen and taken out": ("pages", "plan_eviction"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rounds=1)
    parser.add_argument("--context", type=int, default=2000, help="tokens per sequence when decoding begins")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300, help="decode steps timed")


def measure(job: dict[str, Any]) -> Numbers:
    engine = Engine(
        job,
        "qfilters",
        {"granularity": "page"},
        max_model_len=job["context"] + job["steps"] + 64,
        enable_prefix_caching=False,
    )
    runner = engine.runner
    owners = {
        "layers": [layer.impl for layer in runner.layers],
        "page_scorer": [runner.page_scorer],
        "pages": [engine.manager],
    }
    for part, (owner, name) in PARTS.items():
        for each in owners[owner]:
            engine.time_calls(each, name, part)
    for index, prompt in enumerate(engine.prompts(job["sequences"], job["context"])):
        engine.add(str(index), prompt[17 * index :], job["steps"] + 32)  # pages fill at other steps
    engine.read_prompts()
    for _ in range(4):
        engine.step()

    engine.seconds.clear()
    before = engine.evicted_tokens
    step_seconds = []
    for _ in range(job["steps"]):
        begin = time.perf_counter()
        engine.step()
        step_seconds.append(time.perf_counter() - begin)
    total = sum(step_seconds)
    return {
        "median_step_ms": 1000 * statistics.median(step_seconds),
        "mean_step_ms": 1000 * total / len(step_seconds),
        "evicted_pages": (engine.evicted_tokens - before) // engine.manager.block_size,
        "block_size": engine.manager.block_size,
        "all_ms": 1000 * engine.seconds.total() / job["steps"],
        "ms_per_step": {part: round(1000 * engine.seconds[part] / job["steps"], 4) for part in PARTS},
        "percent_of_decode": {part: round(100 * engine.seconds[part] / total, 3) for part in PARTS},
    }


def shares(of_round: Mapping[str, Numbers]) -> dict[str, float]:
    percent = of_round["page granularity"]["percent_of_decode"]
    return {"percent of decode steps, all": sum(percent.values()), **percent}


CASE = Case(
    name="page_scores",
    description=__doc__,
    add_options=add_options,
    variants=lambda arguments: {"page granularity": {}},
    measure=measure,
    columns={
        "median_step_ms": "ms per step (median)",
        "mean_step_ms": "(mean)",
        "all_ms": "ms on page scores",
        "evicted_pages": "pages evicted",
    },
    ratios=shares,
)
main = CASE.main
