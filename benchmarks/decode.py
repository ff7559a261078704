"""Decode speed and memory at long context: plain vLLM, ours, and the limit, side by side in one run.

    python benchmarks/decode.py models/SmolLM2-135M-Instruct [--context 7000] [--budget 1024] [--sequences 8] [--rounds 2]

Three engines take turns, each in a process of its own: plain vLLM on ``context`` tokens per sequence, the same load with KV
compression, and plain vLLM on ``budget`` tokens per sequence, which no compression can beat. Prints medians and ratios, and
writes them with machine, versions and commit to benchmarks/results/.
"""

import argparse
import json
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import time

from vllm_qfilters.evaluation.environment import describe_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CASES = ("plain", "compressed", "limit")


def measure(job: dict) -> dict:
    """Runs one engine in this process: prefills all sequences, then times single decode steps."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from vllm_qfilters import kv_compression

    is_compressed = job["case"] == "compressed"
    context = job["budget"] - 1 if job["case"] == "limit" else job["context"]
    extra = kv_compression("qfilters", budget=job["budget"], **job["options"]) if is_compressed else {}
    llm = LLM(
        job["model"],
        max_model_len=job["context"] + job["steps"] + 64,
        kv_cache_memory_bytes=job["kv_cache_memory_bytes"] or None,
        enable_prefix_caching=False,
        max_num_batched_tokens=2048,
        **job["llm"],
        **extra,
    )
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    pool = scheduler.kv_cache_manager.block_pool
    if job["llm"].get("skip_tokenizer_init"):
        numbers = random.Random(0)
        tokens = [numbers.randrange(llm.model_config.get_vocab_size()) for _ in range(context + job["sequences"] * 997)]
    else:
        tokens = llm.get_tokenizer()(_text()).input_ids
    params = SamplingParams(temperature=0, max_tokens=job["steps"] + 16, ignore_eos=True, detokenize=False)
    for index in range(job["sequences"]):
        start = index * 997
        engine.add_request(str(index), TokensPrompt(prompt_token_ids=tokens[start : start + context]), params)

    begin = time.perf_counter()
    pages_while_prefilling = 0
    while any(r.is_prefill_chunk or not r.num_computed_tokens for r in scheduler.requests.values()):
        engine.step()
        pages_while_prefilling = max(pages_while_prefilling, *(len(blocks) for blocks in manager.req_to_blocks.values()))
    prefill_seconds = time.perf_counter() - begin
    for _ in range(4):
        engine.step()
    step_seconds, pages = [], 0
    for _ in range(job["steps"]):
        begin = time.perf_counter()
        engine.step()
        step_seconds.append(time.perf_counter() - begin)
        pages = max(pages, *(len(blocks) for blocks in manager.req_to_blocks.values()))
    return {
        "step_ms": 1000 * statistics.median(step_seconds),
        "mean_step_ms": 1000 * statistics.fmean(step_seconds),
        "prefill_s": prefill_seconds,
        "pages_per_sequence": pages,
        "pages_while_prefilling": pages_while_prefilling,
        "block_size": manager.block_size,
        "cache_pages": pool.num_gpu_blocks,
        "evicted_tokens": scheduler.compression_stats.evicted_tokens if is_compressed else 0,
    }


def _text() -> str:
    from pydoc_data import topics

    return "\n".join(topics.topics.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=7000, help="tokens per sequence when decoding begins")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=160, help="decode steps timed per engine and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=2 << 30, help="0: vLLM decides")
    parser.add_argument("--llm", type=json.loads, default={}, help="further arguments of vLLM's LLM, as JSON")
    parser.add_argument("--options", type=json.loads, default={}, help="further KV compression options, as JSON")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "decode.json")
    parser.add_argument("--dry-run", action="store_true", help="the numbers mean nothing: the output says so")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    check_output(parser, arguments)
    job = {key: value for key, value in vars(arguments).items() if key not in ("output", "dry_run", "child", "rounds")}
    if arguments.child:
        print(json.dumps(measure({**job, "case": arguments.child})))
        return

    rounds = []
    for number in range(arguments.rounds):
        for case in CASES:
            print(f"round {number + 1} of {arguments.rounds}: {case} ...", file=sys.stderr, flush=True)
            command = [sys.executable, *sys.argv, "--child", case]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{case} failed:\n{done.stderr[-3000:]}")
            rounds.append({"case": case, **json.loads(done.stdout.splitlines()[-1])})

    by_case = {case: [r for r in rounds if r["case"] == case] for case in CASES}
    result = {"dry_run": arguments.dry_run, "machine": describe_run(), "load": job, "rounds": rounds, "ratios": ratios(by_case)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result, by_case)


def check_output(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Keeps what a dry run writes out of the results."""
    if arguments.dry_run and arguments.output is not None and arguments.output.resolve().is_relative_to(RESULTS):
        parser.error(f"a dry run measures nothing: give it an --output elsewhere than {RESULTS}")


def ratios(by_case: dict[str, list[dict]]) -> dict[str, list[float]]:
    """Round by round, since the machine's speed drifts between rounds."""
    rounds = list(zip(*by_case.values(), strict=True))
    return {
        "decode_speedup_over_plain": [round(p["mean_step_ms"] / c["mean_step_ms"], 2) for p, c, _ in rounds],
        "share_of_limit": [round(limit["mean_step_ms"] / c["mean_step_ms"], 2) for _, c, limit in rounds],
        "prefill_speedup_over_plain": [round(p["prefill_s"] / c["prefill_s"], 2) for p, c, _ in rounds],
        "pages_saved": [round(p["pages_per_sequence"] / c["pages_per_sequence"], 2) for p, c, _ in rounds],
    }


def print_table(result: dict, by_case: dict[str, list[dict]]) -> None:
    for key, value in result["machine"].items():
        print(f"{key}: {value}")
    print(f"\n{'':12}{'ms per step (median, mean)':>30}{'prefill s':>12}{'pages/sequence':>16}{'while prefilling':>18}")
    for case, rows in by_case.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key != "case"}
        steps = f"{middle['step_ms']:.1f}, {middle['mean_step_ms']:.1f}"
        print(f"{case:12}{steps:>30}{middle['prefill_s']:>12.1f}{middle['pages_per_sequence']:>16.0f}{middle['pages_while_prefilling']:>18.0f}")
    print()
    for name, values in result["ratios"].items():
        print(f"{name.replace('_', ' ')}: {', '.join(map(str, values))}")


if __name__ == "__main__":
    main()
