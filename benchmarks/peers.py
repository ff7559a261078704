"""What the cases share that measure another engine beside vLLM and ours: prompts, hidden numbers, ratios and plot.

Every variant answers a short prompt first, which is not timed. Then a sequence is read alone, then all of them; then
every sequence decodes. Hidden numbers (the task passkey of ``vllm-qfilters eval``) tell what is left to answer from.
"""

import argparse
import itertools
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.case import Case, NotMeasured, Numbers, bar_panels
from benchmarks.engine import Engine, cut_prompts, text_tokens
from vllm_qfilters.commands.evaluation.needles import Needle, PromptFrame, is_answered, passkey

ANSWER_TOKENS = 12
WARM_UP_TOKENS = 64
VLLM: dict[str, dict[str, Any]] = {
    "vLLM": {"method": None, "compression": {}, "python": None},
    "ours": {"method": "qfilters", "compression": {}, "python": None},
    "ours, prefill full": {"method": "qfilters", "compression": {"prefill": "full"}, "python": None},
    "ours, StreamingLLM": {"method": "streaming", "compression": {}, "python": None},
}
COLUMNS = {
    "ttft_s": "s to the first token, alone",
    "prefill_s": "s to read all",
    "step_ms": "ms per step (median)",
    "mean_step_ms": "(mean)",
    "tokens_per_s": "tokens/s",
    "most_tokens_while_reading": "tokens held at most, reading",
    "held_tokens": "in the end",
    "peak_rss_gib": "memory GiB",
    "found": "hidden numbers found",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=4000, help="tokens of a prompt; default %(default)s")
    parser.add_argument("--sequences", type=int, default=4, help="at once; default %(default)s")
    parser.add_argument("--steps", type=int, default=128, help="tokens generated per sequence, and timed")
    parser.add_argument("--needles", type=int, default=6, help="prompts that hide a number; default %(default)s")


def most_tokens(job: Mapping[str, Any]) -> int:
    """Returns how many tokens a sequence may generate: those that are timed, and those of the steps in which the last
    sequences are read, 512 tokens of each at least.
    """
    return job["steps"] + job["sequences"] * (2 + job["context"] // 512)


def named_precision(job: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Returns a peer's name of the precision that vLLM computes in; raises NotMeasured if it has none."""
    dtype = job["llm"]["dtype"]
    if dtype not in names:
        raise NotMeasured(
            f"dtype {dtype} cannot be had on both sides; --llm '{{\"dtype\": ...}}' takes {', '.join(names)}"
        )
    return names[dtype]


def prompts(job: Mapping[str, Any], tokenizer: Any) -> list[list[int]]:
    """Cuts the prompts of :meth:`Engine.prompts` where there is no engine."""
    return cut_prompts(lambda count: text_tokens(tokenizer, count), job["sequences"], job["context"])


def count_found(job: Mapping[str, Any], tokenizer: Any, answer: Callable[[list[int]], Sequence[int]]) -> int:
    """Counts the hidden numbers that ``answer`` gives back: it takes a prompt and returns ``ANSWER_TOKENS`` tokens."""
    return sum(is_answered(tokenizer.decode(answer(n.token_ids)), n.answer) for n in needles(job, tokenizer))


def needles(job: Mapping[str, Any], tokenizer: Any) -> list[Needle]:
    """Returns the same prompts for every variant, with numbers at depths from the beginning to the end."""
    rng, frame = random.Random(0), PromptFrame(tokenizer)
    filler = text_tokens(tokenizer, 4 * job["context"])
    depths = [index / max(1, job["needles"] - 1) for index in range(job["needles"])]
    return [passkey(frame, filler, job["context"], depth, rng) for depth in depths]


def measure_vllm(job: dict[str, Any]) -> Numbers:
    engine = Engine(
        job,
        job["method"],
        job["compression"],
        max_model_len=job["context"] + most_tokens(job),
        enable_prefix_caching=False,
    )
    tokenizer = engine.llm.get_tokenizer()

    names = map(str, itertools.count())

    def answer(prompt: list[int]) -> Sequence[int]:
        engine.add(next(names), prompt, ANSWER_TOKENS)
        outputs: list[Any] = []
        while engine.engine.has_unfinished_requests():
            outputs = engine.step() or outputs
        return outputs[0].outputs[0].token_ids

    first, *others = engine.prompts(job["sequences"], job["context"])
    answer(first[:WARM_UP_TOKENS])
    engine.add(next(names), first, most_tokens(job))
    ttft, _ = engine.read_prompts()
    engine.drop_everything()
    for prompt in (first, *others):
        engine.add(next(names), prompt, most_tokens(job))
    prefill, pages = engine.read_prompts()
    seconds = []
    for _ in range(job["steps"]):
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
    assert len(engine.scheduler.running) == job["sequences"], "a sequence ended while it was timed"
    held = engine.pages() * engine.manager.block_size
    engine.drop_everything()
    found = count_found(job, tokenizer, answer)
    return numbers(job, ttft, prefill, seconds, pages * engine.manager.block_size, held, found)


def numbers(
    job: Mapping[str, Any],
    ttft: float,
    prefill: float,
    seconds: Sequence[float],
    read_tokens: float,
    held_tokens: float,
    found: int,
) -> Numbers:
    """Makes what the table shows.

    Args:
        job: ``sequences``, read at once.
        ttft: seconds to the first token of a sequence alone.
        prefill: seconds until every sequence had its first token.
        seconds: of each step that gave every sequence a token.
        read_tokens: the most tokens that a sequence held until then.
        held_tokens: the tokens that a sequence held after the last step.
        found: hidden numbers in answers.
    """
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
    for name, theirs in of_round.items():
        if name != "ours":
            found[f"tokens per second, ours over {name}"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
            found[f"speed of reading all prompts, ours over {name}"] = theirs["prefill_s"] / ours["prefill_s"]
    return found


def draw(figure: Any, of_variants: Mapping[str, Sequence[Numbers]]) -> None:
    titles = {
        "prefill_s": "s to read all prompts",
        "tokens_per_s": "tokens per second, all sequences",
        "held_tokens": "tokens held per sequence in the end",
        "found": "hidden numbers found",
    }
    bar_panels(figure, of_variants, titles)


def peer_case(
    name: str,
    description: str,
    add_own_options: Callable[[argparse.ArgumentParser], None],
    own_variants: Callable[[argparse.Namespace], Mapping[str, dict[str, Any]]],
    measure_own: Callable[[dict[str, Any]], Numbers],
) -> Case:
    """Makes the case that measures the variants of a peer behind those of vLLM."""

    def add_all_options(parser: argparse.ArgumentParser) -> None:
        add_options(parser)
        add_own_options(parser)

    return Case(
        name=name,
        description=description,
        add_options=add_all_options,
        variants=lambda arguments: {**VLLM, **own_variants(arguments)},
        measure=lambda job: measure_vllm(job) if "method" in job else measure_own(job),
        columns=COLUMNS,
        ratios=ratios,
        draw=draw,
    )
