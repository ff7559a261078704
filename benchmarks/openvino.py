"""Measures OpenVINO GenAI, which evicts on CPUs too, beside plain vLLM and ours: same prompts, budget and precision.

    python -m venv peer && peer/bin/pip install openvino-genai==2026.4.1.0 optimum-intel==2.2.0 transformers==5.5.4 \\
        torch==2.13.0
    peer/bin/pip uninstall -y torchvision
    python -m benchmarks openvino models/SmolLM2-135M-Instruct --python peer/bin/python [--context 4000] [--budget 1024]

Its continuous batching (``CacheEvictionConfig``) keeps ``--start`` and ``--recent`` tokens and the best of the rest,
all within the budget, in blocks of 32, by accumulated attention (NORM_SUM) or by ADAPTIVE_RKV. It evicts nothing while
a prompt is read: a prompt needs room for all of its tokens, and is seen whole. Ours with ``prefill: full`` does so too.
A sequence is read alone, then all of them; then every sequence decodes. Hidden numbers (the task passkey of
``vllm-qfilters eval``) tell what is left to answer from. The model is exported to build/openvino/ once. Variants whose
packages are not there are left out.
"""

import argparse
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.case import ROOT, Case, NotMeasured, Numbers, bar_panels
from benchmarks.engine import Engine, text_tokens
from vllm_qfilters.commands.evaluation.needles import Needle, PromptFrame, is_answered, passkey

EXPORTED = ROOT / "build" / "openvino"  # git ignores build/
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
BLOCK_SIZE = 32  # of OpenVINO's CPU plugin
ANSWER_TOKENS = 12
EVICTING = {"OpenVINO, NORM_SUM": "NORM_SUM", "OpenVINO, ADAPTIVE_RKV": "ADAPTIVE_RKV"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=4000, help="tokens of a prompt; default %(default)s")
    parser.add_argument("--sequences", type=int, default=4, help="at once; default %(default)s")
    parser.add_argument("--steps", type=int, default=128, help="tokens generated per sequence, and timed")
    parser.add_argument("--needles", type=int, default=6, help="prompts that hide a number; default %(default)s")
    parser.add_argument("--start", type=int, default=32, help="tokens OpenVINO always keeps first; default 32")
    parser.add_argument("--recent", type=int, default=128, help="tokens OpenVINO always keeps last; default 128")
    parser.add_argument("--python", help="of an environment with openvino-genai; default this one")


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    return {
        "vLLM": {"method": None, "compression": {}, "python": None},
        "ours": {"method": "qfilters", "compression": {}, "python": None},
        "ours, prefill full": {"method": "qfilters", "compression": {"prefill": "full"}, "python": None},
        "ours, StreamingLLM": {"method": "streaming", "compression": {}, "python": None},
        "OpenVINO": {"aggregation": None, "python": arguments.python},
        **{name: {"aggregation": mode, "python": arguments.python} for name, mode in EVICTING.items()},
    }


def measure(job: dict[str, Any]) -> Numbers:
    return measure_vllm(job) if "method" in job else measure_openvino(job)


def measure_vllm(job: dict[str, Any]) -> Numbers:
    engine = Engine(
        job,
        job["method"],
        job["compression"],
        max_model_len=job["context"] + job["steps"] + 8,
        enable_prefix_caching=False,
    )
    tokenizer = engine.llm.get_tokenizer()
    first, *others = engine.prompts(job["sequences"], job["context"])
    engine.add("alone", first, max_tokens=1 + job["steps"])
    ttft, _ = engine.read_prompts()
    engine.drop_everything()
    for index, prompt in enumerate((first, *others)):
        engine.add(str(index), prompt, max_tokens=job["steps"] + 4 * job["sequences"])
    prefill, pages = engine.read_prompts()
    seconds = []
    for _ in range(job["steps"]):
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
    held = engine.pages() * engine.manager.block_size
    engine.drop_everything()
    found = 0
    for number, needle in enumerate(needles(job, tokenizer)):
        engine.add(f"needle-{number}", needle.token_ids, ANSWER_TOKENS)
        outputs: list[Any] = []
        while engine.engine.has_unfinished_requests():
            outputs = engine.step() or outputs
        found += is_answered(tokenizer.decode(outputs[0].outputs[0].token_ids), needle.answer)
    return _numbers(job, ttft, prefill, seconds, pages * engine.manager.block_size, held, found)


def measure_openvino(job: dict[str, Any]) -> Numbers:
    try:
        import numpy
        import openvino
        import openvino_genai as genai
        from transformers import AutoTokenizer
    except ImportError as error:
        raise NotMeasured(f"OpenVINO GenAI is not there ({error}): see --help, then --python") from None
    precision = PRECISIONS[job["llm"]["dtype"]]
    num_blocks = (job["sequences"] + 1) * -(-(job["context"] + job["steps"]) // BLOCK_SIZE)
    scheduling = genai.SchedulerConfig()
    scheduling.num_kv_blocks, scheduling.max_num_batched_tokens = num_blocks, 2048
    scheduling.max_num_seqs, scheduling.enable_prefix_caching = max(job["sequences"], 2), False
    if job["aggregation"] is not None:
        mode = getattr(genai.AggregationMode, job["aggregation"])
        scheduling.use_cache_eviction = True
        scheduling.cache_eviction_config = genai.CacheEvictionConfig(job["start"], job["recent"], job["budget"], mode)
    pipeline = genai.ContinuousBatchingPipeline(
        str(exported(job["model"])),
        scheduling,
        "CPU",
        {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision},
    )
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    numbers = iter(range(10**9))

    def add(prompt: Sequence[int], max_tokens: int) -> Any:
        generation = genai.GenerationConfig()
        generation.max_new_tokens, generation.ignore_eos, generation.do_sample = max_tokens, True, False
        return pipeline.add_request(
            next(numbers), openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)), generation
        )

    def held_tokens() -> float:
        return pipeline.get_metrics().cache_usage / 100 * num_blocks * BLOCK_SIZE

    def read(handles: Sequence[Any]) -> tuple[float, float]:
        begin, most = time.perf_counter(), 0.0
        while not all(handle.can_read() for handle in handles):
            pipeline.step()
            most = max(most, held_tokens())
        return time.perf_counter() - begin, most / len(handles)

    stride = 997  # as of Engine.prompts
    tokens = text_tokens(tokenizer, job["context"] + job["sequences"] * stride)
    prompts = [tokens[index * stride :][: job["context"]] for index in range(job["sequences"])]
    ttft, _ = read([add(prompts[0], 2)])
    while pipeline.has_non_finished_requests():
        pipeline.step()
    # The first sequence decodes while the last is read.
    handles = [add(prompt, job["steps"] + 4 * job["sequences"]) for prompt in prompts]  # a request ends with its handle
    reading, most = read(handles)
    seconds = []
    for _ in range(job["steps"]):
        begin = time.perf_counter()
        pipeline.step()
        seconds.append(time.perf_counter() - begin)
    held = held_tokens() / job["sequences"]
    while pipeline.has_non_finished_requests():
        pipeline.step()
    found = 0
    for needle in needles(job, tokenizer):
        handle = add(needle.token_ids, ANSWER_TOKENS)
        while pipeline.has_non_finished_requests():
            pipeline.step()
        found += is_answered(tokenizer.decode(handle.read_all()[0].generated_ids), needle.answer)
    return _numbers(job, ttft, reading, seconds, most, held, found)


def exported(model: str) -> pathlib.Path:
    """Returns the folder of a model as OpenVINO reads it, in float32; exports it if it is not there."""
    folder = EXPORTED / pathlib.Path(model).name
    if not (folder / "openvino_model.bin").exists():
        command = [str(pathlib.Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "--model", model]
        command += ["--task", "text-generation-with-past", "--weight-format", "fp32", str(folder)]
        subprocess.run(command, check=True)
    return folder


def needles(job: dict[str, Any], tokenizer: Any) -> list[Needle]:
    """Returns the same prompts for every variant, with numbers at depths from the beginning to the end."""
    rng, frame = random.Random(0), PromptFrame(tokenizer)
    filler = text_tokens(tokenizer, 4 * job["context"])
    depths = [index / max(1, job["needles"] - 1) for index in range(job["needles"])]
    return [passkey(frame, filler, job["context"], depth, rng) for depth in depths]


def _numbers(
    job: dict[str, Any],
    ttft: float,
    prefill: float,
    seconds: Sequence[float],
    read_tokens: float,
    held_tokens: float,
    found: int,
) -> Numbers:
    return {
        "ttft_s": ttft,
        "prefill_s": prefill,
        "step_ms": 1000 * statistics.median(seconds),
        "mean_step_ms": 1000 * statistics.fmean(seconds),
        "tokens_per_s": job["sequences"] / statistics.fmean(seconds),
        "most_tokens_while_reading": read_tokens,
        "held_tokens": held_tokens,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20),
        "found": found,
    }


def ratios(of_round: Mapping[str, Numbers]) -> dict[str, float]:
    found, ours = {}, of_round["ours"]
    for name, numbers in of_round.items():
        if name != "ours":
            found[f"decode, ours over {name}"] = ours["tokens_per_s"] / numbers["tokens_per_s"]
            found[f"prompts read, ours over {name}"] = numbers["prefill_s"] / ours["prefill_s"]
    return found


def draw(figure: Any, numbers: Mapping[str, Sequence[Numbers]]) -> None:
    titles = {
        "prefill_s": "s to read all prompts",
        "tokens_per_s": "tokens per second, all sequences",
        "held_tokens": "tokens held per sequence",
        "found": "hidden numbers found",
    }
    bar_panels(figure, numbers, titles)


CASE = Case(
    name="openvino",
    description=__doc__,
    add_options=add_options,
    variants=variants,
    measure=measure,
    columns={
        "ttft_s": "ttft s",
        "prefill_s": "prefill s",
        "step_ms": "ms per step (median)",
        "mean_step_ms": "(mean)",
        "tokens_per_s": "tokens/s",
        "most_tokens_while_reading": "tokens while reading",
        "held_tokens": "held",
        "peak_rss_gib": "RSS GiB",
        "found": "found",
    },
    ratios=ratios,
    draw=draw,
)
main = CASE.main
