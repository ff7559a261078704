"""Checks on this machine's GPU all that other machines cannot show, in at most ten minutes, the worst faults first.

    scripts/gpu_all.sh [--dry-run] [--minutes 10] [--llm '{"attention_backend": "TRITON_ATTN"}'] [--only identity]

Each part is a command of its own with a limit of time. The file of results is written after each, so that a run that is
cut short still counts:

identity  a budget that nobody reaches leaves the output of plain vLLM as it is, with CUDA graphs
kernels   the Triton kernels compute what PyTorch does
decode    prompts of 8k and 32k tokens are read and go on, beside plain vLLM; nothing is compiled while serving
long      the same at 128k tokens
timings   how fast the kernels are, on the shapes of Llama-3.1-8B

Weights are random, of Llama-3.1-8B's shape: speed needs no others. It takes 80 GB of the GPU's memory.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks.case import RESULTS, ROOT, check_output
from vllm_qfilters.commands.evaluation.environment import describe_run

BUILD = ROOT / "build" / "gpu_all"
LEAST_SECONDS = 10  # that a part is begun for
LAST_LINES = 40  # of what a part printed, kept if it fails

LLAMA_8B = dict(
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131072,
)
SMALL = dict(  # for dry runs
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    hidden_size=128,
    intermediate_size=256,
    vocab_size=512,
    max_position_embeddings=4096,
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A command that is run and timed.

    Attributes:
        name: of the part.
        command: to run, from the root of the checkout.
        seconds: it may take.
        results: the JSON file that it writes; None: its status is the result.
    """

    name: str
    command: list[str]
    seconds: int
    results: pathlib.Path | None = None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_all.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="all parts may take; default %(default)g")
    parser.add_argument("--llm", type=json.loads, default={}, help="further arguments of vLLM's LLM, as JSON")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts")
    parser.add_argument("--output", type=pathlib.Path, help="file of results; default benchmarks/results/gpu_all.json")
    parser.add_argument("--dry-run", action="store_true", help="small, on whatever vLLM runs on here: no number counts")
    arguments = parser.parse_args()
    check_output(parser, arguments)
    output = arguments.output or (BUILD if arguments.dry_run else RESULTS) / "gpu_all.json"
    BUILD.mkdir(parents=True, exist_ok=True)
    parts = dry_parts(arguments.llm) if arguments.dry_run else gpu_parts(arguments.llm)
    unknown = set(arguments.only or ()) - {part.name for part in parts}
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose from {', '.join(p.name for p in parts)}")
    end = time.monotonic() + 60 * arguments.minutes
    result: dict[str, Any] = {"case": "gpu_all", "dry_run": arguments.dry_run, "run": describe_run(), "parts": {}}
    for part in parts:
        if arguments.only and part.name not in arguments.only:
            continue
        print(f"{part.name} ...", file=sys.stderr, flush=True)
        result["parts"][part.name] = outcome = run(part, min(part.seconds, end - time.monotonic()))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{part.name}: {outcome['status']} after {outcome['seconds']} s", file=sys.stderr, flush=True)
        if outcome["status"] != "passed":
            print("\n".join(outcome["last_lines"]), file=sys.stderr, flush=True)
    print(f"Results in {output}")
    return 0 if all(outcome["status"] == "passed" for outcome in result["parts"].values()) else 1


def gpu_parts(llm: dict[str, Any]) -> list[Part]:
    model = write_config("llama-8b", LLAMA_8B)
    few_layers = write_config("llama-8b-4-layers", {**LLAMA_8B, "num_hidden_layers": 4})
    dummy = {"load_format": "dummy", "skip_tokenizer_init": True, "jit_monitor_mode": "error", **llm}
    decode = shlex.split("--budget 2048 --methods qfilters --no-limit --rounds 1 --kv-cache-memory-bytes 0")
    return [
        benchmark("identity", few_layers, 110, ["--kv-cache-memory-bytes", str(4 << 30)], dummy),
        Part("kernels", [str(ROOT / "scripts" / "gpu_check.sh"), "--tests"], 120),
        benchmark("decode", model, 200, [*decode, "--contexts", "8192", "32768", "--sequences", "8"], dummy),
        benchmark("decode", model, 200, [*decode, "--contexts", "130000", "--sequences", "2"], dummy, "long"),
        Part("timings", [sys.executable, "benchmarks/gpu_kernels.py", *to("timings")], 90, BUILD / "timings.json"),
    ]


def dry_parts(llm: dict[str, Any]) -> list[Part]:
    model = write_config("small", SMALL)
    dummy = {"load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": True, "block_size": 32, **llm}
    cache = ["--kv-cache-memory-bytes", str(1 << 26), "--dry-run"]
    decode = shlex.split("--budget 256 --methods qfilters --no-limit --rounds 1 --steps 20 --sequences 2")
    decode += ["--options", json.dumps({"interval": 32, "chunk": 256}), *cache]
    timings = [sys.executable, "benchmarks/gpu_kernels.py", "--dry-run", *to("timings")]
    return [
        benchmark("identity", model, 600, cache, dummy),
        Part("kernels", [str(ROOT / "scripts" / "gpu_check.sh"), "--tests", "--dry-run"], 1200),
        benchmark("decode", model, 600, [*decode, "--contexts", "600"], dummy),
        benchmark("decode", model, 600, [*decode, "--contexts", "1200"], dummy, "long"),
        Part("timings", timings, 600, BUILD / "timings.json"),
    ]


def benchmark(case: str, model: pathlib.Path, seconds: int, options: list[str], llm: dict[str, Any], name="") -> Part:
    name = name or case
    command = [sys.executable, "-m", "benchmarks", case, str(model), *options, "--llm", json.dumps(llm), *to(name)]
    return Part(name, command, seconds, BUILD / f"{name}.json")


def to(name: str) -> list[str]:
    return ["--output", str(BUILD / f"{name}.json")]


def write_config(name: str, shape: dict[str, int]) -> pathlib.Path:
    """Makes the folder of a Llama that has a configuration, and no weights."""
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def run(part: Part, seconds: float) -> dict[str, Any]:
    """Runs a part for so many seconds at most, and says how it ended, as JSON."""
    if seconds < LEAST_SECONDS:
        return {"status": "not started, no time left", "seconds": 0, "last_lines": []}
    if part.results is not None:
        part.results.unlink(missing_ok=True)
    log = BUILD / f"{part.name}.log"
    begin, before = time.monotonic(), memory_used()
    with open(log, "w", encoding="utf-8") as file, MostMemory() as memory:
        # A group of its own, so that engines of engines end with it.
        child = subprocess.Popen(part.command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            status = "passed" if child.wait(seconds) == 0 else f"failed with status {child.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            stop(child)
    outcome: dict[str, Any] = {
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "command": part.command,
        "memory_mib": {"before": before, "most": memory.most, "after": memory_used()},
        "compression": [line for line in log.read_text().splitlines() if "KV compression" in line][:20],
        "last_lines": [] if status == "passed" else log.read_text().splitlines()[-LAST_LINES:],
    }
    if part.results is not None and part.results.is_file():
        outcome["results"] = json.loads(part.results.read_text())
    return outcome


def stop(child: subprocess.Popen) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()


class MostMemory:
    """Looks every second how much of the GPU's memory is in use, while the block runs: ``most`` is in MiB."""

    def __enter__(self) -> "MostMemory":
        self.most = memory_used()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ends.set()
        self._thread.join()

    def _look(self) -> None:
        while self.most is not None and not self._ends.wait(1):
            self.most = max(self.most, memory_used() or 0)


def memory_used() -> int | None:
    """Of the first GPU, in MiB; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    return int(done.stdout.split()[0]) if done.returncode == 0 and done.stdout.strip() else None


if __name__ == "__main__":
    sys.exit(main())
