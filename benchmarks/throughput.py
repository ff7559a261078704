"""Measures requests per second and concurrency where the cache holds 1/8 of what the load would need.

    python -m benchmarks throughput models/SmolLM2-135M-Instruct [--requests 32] [--prompt 3000] [--output-tokens 500]

All requests arrive at once. Plain vLLM queues and preempts; with KV compression, by Q-Filters or as StreamingLLM does
it on the same engine, more sequences fit at once. The cache has the same bytes for all: compressed pages are a little
larger.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.case import Case, Numbers, bars
from benchmarks.engine import Engine


def add_options(parser: argparse.ArgumentParser) -> None:
    add_load_options(parser, requests=32, output_tokens=500)
    parser.add_argument("--cache", type=float, default=1 / 8, help="share of what the load would need; default 1/8")
    parser.add_argument("--methods", nargs="+", default=["qfilters", "streaming"])


def add_load_options(parser: argparse.ArgumentParser, requests: int, output_tokens: int) -> None:
    """Adds the options that :func:`serve` and :func:`cache_bytes` read, with these defaults."""
    parser.add_argument("--requests", type=int, default=requests)
    parser.add_argument("--prompt", type=int, default=3000, help="tokens; default %(default)s")
    parser.add_argument("--output-tokens", type=int, default=output_tokens, help="per request; default %(default)s")
    parser.add_argument("--max-num-seqs", type=int, default=64)


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    cache = {"kv_cache_memory_bytes": cache_bytes(arguments, arguments.cache)}
    return {
        name: {"method": method, **cache} for name, method in [("plain", None), *((m, m) for m in arguments.methods)]
    }


def cache_bytes(arguments: argparse.Namespace, share: float) -> int:
    """Reckons the bytes that hold a share of what plain vLLM needs for all requests at once."""
    tokens = arguments.requests * (arguments.prompt + arguments.output_tokens)
    return int(tokens * bytes_per_token(arguments) * share)


def bytes_per_token(arguments: argparse.Namespace) -> int:
    """Reckons the bytes that the keys and values of a token take in all layers, uncompressed."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(arguments.model)
    config.update(arguments.llm.get("hf_overrides", {}))
    dtype = str(config.dtype).removeprefix("torch.") if arguments.llm["dtype"] == "auto" else arguments.llm["dtype"]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * (4 if dtype == "float32" else 2)


def measure(job: dict[str, Any]) -> Numbers:
    numbers, _ = serve(job, {})
    return numbers


def serve(job: dict[str, Any], options: dict[str, Any]) -> tuple[Numbers, list[list[int]]]:
    """Serves all requests of a load that arrives at once.

    Args:
        job: ``requests``, ``prompt``, ``output_tokens``, ``max_num_seqs``, ``method``, and what the engine takes.
        options: of KV compression, beside the job's.

    Returns:
        The numbers, and the answers as token ids, in the order of the requests.
    """
    length = job["prompt"] + job["output_tokens"]
    engine = Engine(job, job["method"], options, max_model_len=length, max_num_seqs=job["max_num_seqs"])
    for index, prompt in enumerate(engine.prompts(job["requests"], job["prompt"])):
        engine.add(str(index), prompt, job["output_tokens"])
    begin = time.perf_counter()
    first_token: dict[str, float] = {}
    running, answers = [], {}
    while engine.engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - begin
        running.append((round(now, 3), len(engine.scheduler.running)))
        for output in outputs:
            first_token.setdefault(output.request_id, now)
            if output.finished:
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
    tokens = sum(map(len, answers.values()))
    assert tokens == job["requests"] * job["output_tokens"]
    running_seconds = sum((end - start) * count for (start, count), (end, _) in itertools.pairwise(running))
    numbers = {
        "seconds": now,
        "requests_per_s": job["requests"] / now,
        "output_tokens_per_s": tokens / now,
        "most_running": max(count for _, count in running),
        "mean_running": running_seconds / now,
        "median_ttft_s": statistics.median(first_token.values()),
        "preemptions": engine.preemptions,
        "evicted_tokens": engine.evicted_tokens,
        "cache_pages": engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1,
        "running": running[:: max(1, len(running) // 500)],
    }
    return numbers, [answers[index] for index in range(job["requests"])]


def ratios(of_round: Mapping[str, Numbers]) -> dict[str, float]:
    plain = of_round["plain"]
    found = {}
    for method, numbers in of_round.items():
        if method != "plain":
            found[f"{method}: requests per second over plain"] = numbers["requests_per_s"] / plain["requests_per_s"]
            found[f"{method}: running at once over plain"] = numbers["mean_running"] / plain["mean_running"]
            found[f"{method}: time to the first token, plain's over its"] = (
                plain["median_ttft_s"] / numbers["median_ttft_s"]
            )
    return found


def draw(figure: Any, numbers: Mapping[str, Sequence[Numbers]]) -> None:
    figure.set_size_inches(15, 4.5)
    left, middle, right = figure.subplots(1, 3)
    bars(left, numbers, "requests_per_s", "requests per second")
    bars(middle, numbers, "median_ttft_s", "median s to the first token")
    for variant, rounds in numbers.items():
        right.step(*zip(*rounds[0]["running"], strict=True), label=f"{variant}, {rounds[0]['preemptions']} preemptions")
    right.set_title("sequences running at once", fontsize="medium")
    right.set_xlabel("s")
    right.grid(alpha=0.3)
    right.legend(fontsize="small")


CASE = Case(
    name="throughput",
    description=__doc__,
    add_options=add_options,
    variants=variants,
    measure=measure,
    columns={
        "requests_per_s": "requests/s",
        "output_tokens_per_s": "output tokens/s",
        "most_running": "most running",
        "mean_running": "mean running",
        "median_ttft_s": "median ttft s",
        "preemptions": "preemptions",
        "cache_pages": "cache pages",
    },
    ratios=ratios,
    draw=draw,
)
main = CASE.main
