"""What page scores cost: the share of decode steps spent on them, part by part.

    python benchmarks/page_scores.py models/SmolLM2-135M-Instruct [--context 2000] [--budget 1024] [--sequences 8] [--steps 300]

One engine in page granularity decodes; the functions that score are timed where they run, within the steps whose share they are.
Prints medians and shares, and writes them with machine, versions and commit to benchmarks/results/.
"""

import argparse
import collections
import json
import os
import pathlib
import statistics
import time

from decode import ROOT, _text

from vllm_qfilters.evaluation.environment import describe_run

PARTS = {
    "keys scored at the write": ("scorer", "write"),
    "pages scored on the worker": ("page_scorer", "score_filled_pages"),
    "scores put into the output": ("page_scorer", "attach"),
    "scores expected by the manager": ("pages", "expect_scores"),
    "scores received by the manager": ("pages", "receive_scores"),
    "pages chosen and taken out": ("pages", "compact"),
}


def measure(arguments: argparse.Namespace) -> dict:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from vllm_qfilters import kv_compression

    llm = LLM(
        arguments.model,
        max_model_len=arguments.context + arguments.steps + 64,
        kv_cache_memory_bytes=2 << 30,
        enable_prefix_caching=False,
        **kv_compression("qfilters", budget=arguments.budget, granularity="page"),
    )
    core = llm.llm_engine.engine_core.engine_core
    scheduler, runner = core.scheduler, core.model_executor.driver_worker.worker.model_runner
    owners = {"scorer": runner.layers[0].impl.scorer, "page_scorer": runner.page_scorer, "pages": scheduler.pages}
    seconds: collections.Counter[str] = collections.Counter()
    for part, (owner, name) in PARTS.items():
        setattr(owners[owner], name, timed(getattr(owners[owner], name), part, seconds))

    tokens = llm.get_tokenizer()(_text()).input_ids
    params = SamplingParams(temperature=0, max_tokens=arguments.steps + 32, ignore_eos=True, detokenize=False)
    for index in range(arguments.sequences):
        start = index * 997
        prompt = TokensPrompt(prompt_token_ids=tokens[start : start + arguments.context - 17 * index])  # pages fill at other steps
        llm.llm_engine.add_request(str(index), prompt, params)
    while any(r.is_prefill_chunk or not r.num_computed_tokens for r in scheduler.requests.values()):
        llm.llm_engine.step()
    for _ in range(4):
        llm.llm_engine.step()

    seconds.clear()
    before = scheduler.compression_stats.evicted_tokens
    step_seconds = []
    for _ in range(arguments.steps):
        begin = time.perf_counter()
        llm.llm_engine.step()
        step_seconds.append(time.perf_counter() - begin)
    total = sum(step_seconds)
    return {
        "median_step_ms": round(1000 * statistics.median(step_seconds), 3),
        "mean_step_ms": round(1000 * total / len(step_seconds), 3),
        "evicted_pages": (scheduler.compression_stats.evicted_tokens - before) // scheduler.block_size,
        "block_size": scheduler.block_size,
        "ms_per_step": {part: round(1000 * seconds[part] / arguments.steps, 4) for part in PARTS},
        "percent_of_decode": {part: round(100 * seconds[part] / total, 3) for part in PARTS},
    }


def timed(function, part: str, seconds: collections.Counter):
    def wrapper(*args):
        begin = time.perf_counter()
        try:
            return function(*args)
        finally:
            seconds[part] += time.perf_counter() - begin

    return wrapper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=2000, help="tokens per sequence when decoding begins")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300, help="decode steps timed")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "page_scores.json")
    arguments = parser.parse_args()
    load = {name: getattr(arguments, name) for name in ("model", "context", "budget", "sequences", "steps")}
    result = {"machine": describe_run(), "load": load, **measure(arguments)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")

    for key, value in result["machine"].items():
        print(f"{key}: {value}")
    print(f"\ndecode step: median {result['median_step_ms']} ms, mean {result['mean_step_ms']} ms; "
          f"{result['evicted_pages']} pages of {result['block_size']} evicted")  # fmt: skip
    for part in PARTS:
        print(f"{part:34}{result['ms_per_step'][part]:>10} ms per step{result['percent_of_decode'][part]:>9} %")
    print(f"{'all':34}{sum(result['ms_per_step'].values()):>10.4f} ms per step{sum(result['percent_of_decode'].values()):>9.3f} %")


if __name__ == "__main__":
    main()
