"""The generated part of docs/peers.md: other engines that were measured beside vLLM and ours."""

import statistics
from collections.abc import Sequence

from scripts.pages.markdown import NOT_MEASURED, number, table
from scripts.pages.results import File, Values, anchor, by_variant

_CASES = ("openvino", "llama_cpp", "kvpress")
_COLUMNS = {
    "prefill_s": "s to read all",
    "mean_step_ms": "ms per step",
    "most_tokens_while_reading": "tokens held at most, reading",
    "held_tokens": "in the end",
    "peak_rss_gib": "memory GiB",
    "found": "hidden numbers found",
}


def peers(files: Sequence[File]) -> str:
    """A table per file: of every engine the median of the rounds."""
    found = [_table(file) for case in _CASES for file in files if file.values.get("case") == case]
    return "\n\n".join(found) or NOT_MEASURED


def _table(file: File) -> str:
    measured = by_variant(file.rounds)
    columns = [key for key in _COLUMNS if any(key in rounds[0] for rounds in measured.values())]
    rows = [[variant, *(_median(rounds, key) for key in columns)] for variant, rounds in measured.items()]
    options, run = file.values["options"], file.runs[0]
    shape = f"{options['sequences']} prompts of {number(options['context'])} tokens, budget {number(options['budget'])}"
    title = f"{file.model}, {shape}"
    rounds = "a single round" if len(file.rounds) == 1 else f"median of {len(file.rounds)} rounds"
    origin = ", ".join(filter(None, [run["cpu"], run.get("isa"), f"vLLM {run['vllm']}", rounds]))
    link = f"[{file.path.name}](results.md#{anchor(file)})"
    return "\n\n".join(
        [table([title, *(_COLUMNS[key] for key in columns)], rows), f"{origin}, commit {run['commit']}: {link}."]
    )


def _median(rounds: Sequence[Values], key: str) -> str:
    numbers = [of_round[key] for of_round in rounds if of_round.get(key) is not None]
    if not numbers:
        return ""
    median = statistics.median(numbers)
    return number(int(median) if median == int(median) else median)
