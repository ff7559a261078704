"""Measures OpenVINO GenAI, which evicts on CPUs too, beside plain vLLM and ours: same prompts, budget and precision.

    python -m venv peer && peer/bin/pip install openvino-genai==2026.4.1.0 optimum-intel==2.2.0 transformers==5.5.4 \\
        torch==2.13.0
    peer/bin/pip uninstall -y torchvision
    python -m benchmarks openvino models/SmolLM2-135M-Instruct --python peer/bin/python [--context 4000] [--budget 1024]

Its continuous batching (``CacheEvictionConfig``) keeps ``--start`` and ``--recent`` tokens and the best of the rest,
all within the budget, in blocks of 32, by accumulated attention (NORM_SUM) or by ADAPTIVE_RKV. It evicts nothing while
a prompt is read: a prompt needs room for all of its tokens, and is seen whole. Ours with ``prefill: full`` does so too.
The model is exported to build/openvino/ once, in float32; weights and cache have the precision that vLLM's have.
Variants whose packages are not there are left out. OpenVINO needs two cores or more.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import peers
from benchmarks.case import ROOT, NotMeasured, Numbers

EXPORTED = ROOT / "build" / "openvino"  # git ignores build/
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
BLOCK_SIZE = 32  # of OpenVINO's CPU plugin
EVICTING = {"OpenVINO, NORM_SUM": "NORM_SUM", "OpenVINO, ADAPTIVE_RKV": "ADAPTIVE_RKV"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--start", type=int, default=32, help="tokens OpenVINO always keeps first; default 32")
    parser.add_argument("--recent", type=int, default=128, help="tokens OpenVINO always keeps last; default 128")
    parser.add_argument("--python", help="of an environment with openvino-genai; default this one")


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    return {
        "OpenVINO": {"aggregation": None, "python": arguments.python},
        **{name: {"aggregation": mode, "python": arguments.python} for name, mode in EVICTING.items()},
    }


def measure(job: dict[str, Any]) -> Numbers:
    try:
        import numpy
        import openvino
        import openvino_genai as genai
        from transformers import AutoTokenizer
    except ImportError as error:
        raise NotMeasured(f"OpenVINO GenAI is not there ({error}): see --help, then --python") from None
    if len(os.sched_getaffinity(0)) < 2:
        raise NotMeasured("OpenVINO GenAI needs two cores or more")  # with one its process dies
    precision = peers.named_precision(job, PRECISIONS)
    num_blocks = (job["sequences"] + 1) * -(-(job["context"] + peers.most_tokens(job)) // BLOCK_SIZE)
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
    names = iter(range(10**9))

    def add(prompt: Sequence[int], max_tokens: int) -> Any:
        generation = genai.GenerationConfig()
        generation.max_new_tokens, generation.ignore_eos, generation.do_sample = max_tokens, True, False
        return pipeline.add_request(next(names), openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)), generation)

    def held_tokens() -> float:
        return pipeline.get_metrics().cache_usage / 100 * num_blocks * BLOCK_SIZE

    def step() -> None:
        try:
            pipeline.step()
        except RuntimeError as error:  # ADAPTIVE_RKV of 2026.4.1.0, at its first eviction
            raise NotMeasured(f"OpenVINO GenAI failed: {str(error).strip().splitlines()[-1]}") from error

    def read(handles: Sequence[Any]) -> tuple[float, float]:
        begin, most = time.perf_counter(), 0.0
        while not all(handle.can_read() for handle in handles):
            step()
            most = max(most, held_tokens())
        return time.perf_counter() - begin, most / len(handles)

    def answer(prompt: Sequence[int]) -> list[int]:
        handle = add(prompt, peers.ANSWER_TOKENS)
        finish()
        return handle.read_all()[0].generated_ids

    def finish() -> None:
        while pipeline.has_non_finished_requests():
            step()

    prompts = peers.prompts(job, tokenizer)
    answer(prompts[0][: peers.WARM_UP_TOKENS])
    alone = add(prompts[0], 2)  # a request ends with its handle
    ttft, _ = read([alone])
    finish()
    # The first sequence decodes while the last is read.
    handles = [add(prompt, peers.most_tokens(job)) for prompt in prompts]
    reading, most = read(handles)
    seconds = []
    for _ in range(job["steps"]):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    held = held_tokens() / job["sequences"]
    finish()
    found = peers.count_found(job, tokenizer, answer)
    return peers.numbers(job, ttft, reading, seconds, most, held, found)


def exported(model: str) -> pathlib.Path:
    """Returns the folder of a model as OpenVINO reads it, in float32; exports it if it is not there."""
    folder = EXPORTED / pathlib.Path(model).name
    if not (folder / "openvino_model.bin").exists():
        command = [str(pathlib.Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "--model", model]
        command += ["--task", "text-generation-with-past", "--weight-format", "fp32", str(folder)]
        subprocess.run(command, check=True)
    return folder


CASE = peers.peer_case("openvino", __doc__, add_options, variants, measure)
main = CASE.main
