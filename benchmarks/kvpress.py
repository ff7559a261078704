"""Measures Hugging Face transformers with kvpress at the same budget, beside plain vLLM and ours: the same prompts, in
one batch.

    python -m venv peer && peer/bin/pip install kvpress==0.5.5
    python -m benchmarks kvpress models/SmolLM2-135M-Instruct --python peer/bin/python [--context 4000] [--budget 1024]

kvpress prunes a prompt once, after it was attended whole, to ``budget`` tokens; what is generated then comes on top.
Ours attends whole as well (``prefill: full``) and keeps the budget while it generates. Neither frees memory for other
requests in transformers: seconds are compared, and tokens held. kvpress needs an older transformers than vLLM, hence an
environment of its own; variants it has not got the packages for are left out.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.case import Case, NotMeasured, Numbers, bar_panels
from benchmarks.engine import Engine, text_tokens

PRESSES = {"ExpectedAttentionPress": "kvpress, expected attention", "StreamingLLMPress": "kvpress, StreamingLLM"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--python", help="of an environment with kvpress; default this one")
    parser.add_argument("--steps", type=int, default=100, help="tokens generated per sequence, and timed")


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    return {
        "vLLM": {"method": None, "python": None},
        "ours": {"method": "qfilters", "python": None},
        "ours, StreamingLLM": {"method": "streaming", "python": None},
        "transformers": {"press": None, "python": arguments.python},
        **{name: {"press": press, "python": arguments.python} for press, name in PRESSES.items()},
    }


def measure(job: dict[str, Any]) -> Numbers:
    return measure_vllm(job) if "method" in job else measure_transformers(job)


def measure_vllm(job: dict[str, Any]) -> Numbers:
    engine = Engine(
        job,
        job["method"],
        {"prefill": "full"},
        max_model_len=job["context"] + job["steps"] + 64,
        enable_prefix_caching=False,
    )
    for index, prompt in enumerate(engine.prompts(job["sequences"], job["context"])):
        engine.add(str(index), prompt, job["steps"] + 60)
    prefill, _ = engine.read_prompts()
    seconds = []
    for _ in range(job["steps"]):
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
    held = max(r.num_computed_tokens for r in engine.scheduler.running)
    if job["method"] is not None:
        held = max(engine.manager.resident_tokens(r) for r in engine.scheduler.running)
    return _numbers(prefill, seconds, held)


def measure_transformers(job: dict[str, Any]) -> Numbers:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    press = contextlib.nullcontext()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["llm"]["dtype"]).eval()
    if job["press"] is not None:
        try:
            import kvpress
        except ImportError as error:
            raise NotMeasured(f"kvpress is not there with all it needs ({error}): pip install kvpress") from None
        press = getattr(kvpress, job["press"])(compression_ratio=1 - job["budget"] / job["context"])(model)
    stride = 997
    tokens = text_tokens(AutoTokenizer.from_pretrained(job["model"]), job["context"] + job["sequences"] * stride)
    prompts = torch.tensor([tokens[index * stride :][: job["context"]] for index in range(job["sequences"])])
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        begin = time.perf_counter()
        with press:
            output = model(prompts, past_key_values=cache, logits_to_keep=1)
        prefill = time.perf_counter() - begin
        seconds = []
        for position in range(job["context"], job["context"] + job["steps"]):
            begin = time.perf_counter()
            chosen = output.logits[:, -1:].argmax(-1)
            positions = torch.full((job["sequences"], 1), position)
            output = model(chosen, past_key_values=cache, position_ids=positions)
            seconds.append(time.perf_counter() - begin)
    return _numbers(prefill, seconds, cache.get_seq_length())


def _numbers(prefill: float, seconds: Sequence[float], held_tokens: int) -> Numbers:
    return {
        "prefill_s": prefill,
        "step_ms": 1000 * statistics.median(seconds),
        "mean_step_ms": 1000 * statistics.fmean(seconds),
        "held_tokens": held_tokens,
    }


def ratios(of_round: Mapping[str, Numbers]) -> dict[str, float]:
    found = {}
    for name, numbers in of_round.items():
        if name != "ours":
            found[f"decode, {name} over ours"] = numbers["mean_step_ms"] / of_round["ours"]["mean_step_ms"]
            found[f"prefill, {name} over ours"] = numbers["prefill_s"] / of_round["ours"]["prefill_s"]
    return found


def draw(figure: Any, numbers: Mapping[str, Sequence[Numbers]]) -> None:
    titles = {"prefill_s": "s to read all prompts", "mean_step_ms": "ms per decode step", "held_tokens": "tokens held"}
    bar_panels(figure, numbers, titles)


CASE = Case(
    name="kvpress",
    description=__doc__,
    add_options=add_options,
    variants=variants,
    measure=measure,
    columns={
        "prefill_s": "prefill s",
        "step_ms": "ms per step (median)",
        "mean_step_ms": "(mean)",
        "held_tokens": "tokens held",
    },
    ratios=ratios,
    draw=draw,
)
main = CASE.main
