"""Measures the next turn of a long conversation: seconds to its first token, and how much of the history is read again.

    python -m benchmarks follow_up models/SmolLM2-135M-Instruct [--history 6000] [--message 200] [--budget 2048]

The first turn is answered, then the second turn is sent with the whole history and a new message, with the prefix cache
on. Plain vLLM finds nearly all of the history in the prefix cache. A sequence that evicts while its prompt is read
(``prefill: chunked``, the default) starts behind the compressed prefix that the first turn's prompt left. With
``prefill: full`` a prompt is cut after it was read, and all of it is found. Either way the answer was written in
another context than it is read in, and is read again. With ``prefix: resume`` the second turn goes on from what the
first one held at its end. Conversations follow each other, alone on the engine.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.case import Case, Numbers, bar_panels
from benchmarks.engine import Engine


class Turn(NamedTuple):
    """A turn is a prompt that was answered.

    Attributes:
        ttft_s: seconds from the request to its first token.
        answer: token ids.
        cached_tokens: tokens of the prompt that came from the prefix cache.
    """

    ttft_s: float
    answer: list[int]
    cached_tokens: int


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=int, default=2048, help="tokens; default %(default)s")
    parser.add_argument(
        "--history", type=int, default=6000, help="tokens before the second turn, first answer included; default 6000"
    )
    parser.add_argument("--message", type=int, default=200, help="new tokens of the second turn; default %(default)s")
    parser.add_argument("--output-tokens", type=int, default=50, help="answered per turn; default %(default)s")
    parser.add_argument("--conversations", type=int, default=3, help="one after the other; default %(default)s")
    parser.add_argument("--methods", nargs="+", default=["qfilters", "streaming"])


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"plain": {"method": None, "compression": {}}}
    found |= {method: {"method": method, "compression": {}} for method in arguments.methods}
    if "qfilters" in arguments.methods:
        found["qfilters, prefill full"] = {"method": "qfilters", "compression": {"prefill": "full"}}
        found["qfilters, prefix resume"] = {"method": "qfilters", "compression": {"prefix": "resume"}}
    return found


def measure(job: dict[str, Any]) -> Numbers:
    engine = Engine(
        job,
        job["method"],
        job["compression"],
        max_model_len=job["history"] + job["message"] + job["output_tokens"],
        enable_prefix_caching=True,
    )
    asked = job["history"] - job["output_tokens"]
    first_turns, second_turns = [], []
    for number, text in enumerate(engine.prompts(job["conversations"], asked + job["message"])):
        first = take_turn(engine, f"{number}-first", text[:asked], job["output_tokens"])
        history = [*text[:asked], *first.answer]
        second = take_turn(engine, f"{number}-second", [*history, *text[asked:]], job["output_tokens"])
        first_turns.append(first)
        second_turns.append(second)
    cached = min(turn.cached_tokens for turn in second_turns)
    return {
        "first_ttft_s": statistics.median(turn.ttft_s for turn in first_turns),
        "second_ttft_s": statistics.median(turn.ttft_s for turn in second_turns),
        "second_prompt_tokens": job["history"] + job["message"],
        "read_tokens": job["history"] + job["message"] - cached,
        "read_again_tokens": job["history"] - cached,
        "evicted_tokens": engine.evicted_tokens,
        "all_first_ttft_s": [turn.ttft_s for turn in first_turns],
        "all_second_ttft_s": [turn.ttft_s for turn in second_turns],
    }


def take_turn(engine: Engine, name: str, prompt: list[int], output_tokens: int) -> Turn:
    """Sends ``prompt`` to an engine that does nothing else, and waits for the answer."""
    begin = time.perf_counter()
    engine.add(name, prompt, output_tokens)
    outputs: list[Any] = []
    while not outputs:
        outputs = engine.step()
    ttft_s = time.perf_counter() - begin
    while engine.engine.has_unfinished_requests():
        outputs = engine.step() or outputs
    (output,) = outputs
    return Turn(ttft_s, list(output.outputs[0].token_ids), output.num_cached_tokens)


def ratios(of_round: Mapping[str, Numbers]) -> dict[str, float]:
    plain, found = of_round["plain"], {}
    for variant, numbers in of_round.items():
        own_first = numbers["second_ttft_s"] / numbers["first_ttft_s"]
        found[f"{variant}: time to the first token, second turn over first"] = own_first
        if variant != "plain":
            slower = numbers["second_ttft_s"] / plain["second_ttft_s"]
            found[f"{variant}: time to the first token of the second turn, over plain"] = slower
    return found


def draw(figure: Any, numbers: Mapping[str, Sequence[Numbers]]) -> None:
    titles = {"first_ttft_s": "s to the first token, first turn", "second_ttft_s": "s to the first token, second turn"}
    titles["read_again_tokens"] = "tokens of the history read again"
    bar_panels(figure, numbers, titles)


CASE = Case(
    name="follow_up",
    description=__doc__,
    add_options=add_options,
    variants=variants,
    measure=measure,
    columns={
        "first_ttft_s": "first turn s",
        "second_ttft_s": "second turn s",
        "read_again_tokens": "history read again",
        "read_tokens": "prompt tokens read",
        "evicted_tokens": "evicted",
    },
    ratios=ratios,
    draw=draw,
)
main = CASE.main
