"""Measures what a conversation still knows of its earlier turns: facts that its first messages tell, asked for at its
end.

    python -m benchmarks conversations models/SmolLM2-135M-Instruct [--conversations 4] [--turns 4] [--message 1000]

Every message is a text with a numbered thing in it, and the model answers with a few words. Then each of the things is
asked for, behind the same history. With ``prefix: exact`` the history is what a cold reading holds of it; with
``resume`` a turn goes on from what the last one held at its end, which was cut to the budget while the answer was
written.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.case import Case, Numbers, bar_panels
from benchmarks.engine import Engine, text_tokens

_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for what is said while the chat template is applied
_THINGS = ("anchor", "bell", "candle", "drum", "feather", "lantern", "marble", "piano", "ribbon", "saddle", "violin")
_REQUEST = "\n\nSay in one sentence what this text is about."
_QUESTION_TOKENS, _ANSWER_TOKENS = 100, 12


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conversations", type=int, default=4, help="one after the other; default %(default)s")
    parser.add_argument("--turns", type=int, default=4, help="that tell a fact; at most 11, default %(default)s")
    parser.add_argument("--message", type=int, default=1000, help="tokens of text per turn; default %(default)s")
    parser.add_argument("--output-tokens", type=int, default=60, help="answered per turn at most; default %(default)s")


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    return {
        "plain": {"method": None, "compression": {}},
        "exact": {"method": "qfilters", "compression": {}},
        "resume": {"method": "qfilters", "compression": {"prefix": "resume"}},
    }


def measure(job: dict[str, Any]) -> Numbers:
    from vllm_qfilters.commands.evaluation.needles import is_answered

    told = job["turns"] * (job["message"] + job["output_tokens"] + _QUESTION_TOKENS)
    length = told + _QUESTION_TOKENS + _ANSWER_TOKENS
    engine = Engine(job, job["method"], job["compression"], max_model_len=length, enable_prefix_caching=True)
    tokenizer, numbers = engine.llm.get_tokenizer(), random.Random(0)
    text = text_tokens(tokenizer, job["conversations"] * job["turns"] * job["message"])
    begin, to_answer, to_message = _template(tokenizer)
    found: list[list[bool]] = []
    prompt_tokens = cached_tokens = 0
    for _ in range(job["conversations"]):
        history, facts = list(begin), []
        for thing in numbers.sample(_THINGS, job["turns"]):
            facts.append((thing, str(numbers.randrange(10_000, 100_000))))
            passage, text = text[: job["message"]], text[job["message"] :]
            fact = f"\nThe number of the {thing} is {facts[-1][1]}.\n"
            middle = numbers.randrange(len(passage))
            said = [*passage[:middle], *_encode(tokenizer, fact), *passage[middle:], *_encode(tokenizer, _REQUEST)]
            history += [*said, *to_answer]
            answer = _ask(engine, history, job["output_tokens"]).outputs[0].token_ids
            history += [token for token in answer if token not in tokenizer.all_special_ids] + to_message
        found.append([])
        for thing, number in facts:
            question = f"What is the number of the {thing} that I told you?"
            start = _encode(tokenizer, f"The number of the {thing} is")
            output = _ask(engine, [*history, *_encode(tokenizer, question), *to_answer, *start], _ANSWER_TOKENS)
            found[-1].append(is_answered(tokenizer.decode(output.outputs[0].token_ids), number))
            prompt_tokens += len(output.prompt_token_ids)
            cached_tokens += output.num_cached_tokens
    return {
        "found": sum(map(sum, found)),
        "asked": job["conversations"] * job["turns"],
        "found_of_first_half": sum(sum(of_conversation[: job["turns"] // 2]) for of_conversation in found),
        "read_per_question": (prompt_tokens - cached_tokens) / (job["conversations"] * job["turns"]),
        "history": prompt_tokens / (job["conversations"] * job["turns"]),
        "evicted_tokens": engine.evicted_tokens,
        "all_found": found,
    }


def _ask(engine: Engine, prompt: Sequence[int], max_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    (output,) = engine.llm.generate([TokensPrompt(prompt_token_ids=list(prompt))], params, use_tqdm=False)
    return output


def _template(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """What stands before the first message, between a message and its answer, and between that and the next one."""
    if tokenizer.chat_template is None:
        return [], _encode(tokenizer, "\n"), _encode(tokenizer, "\n\n")
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": _PLACE} for role in roles]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    begin, _, to_message, to_answer = rendered.split(_PLACE)
    return _encode(tokenizer, begin), _encode(tokenizer, to_answer), _encode(tokenizer, to_message)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def ratios(of_round: Mapping[str, Numbers]) -> dict[str, float]:
    return {f"{variant}: facts found of those asked for": n["found"] / n["asked"] for variant, n in of_round.items()}


def draw(figure: Any, numbers: Mapping[str, Sequence[Numbers]]) -> None:
    bar_panels(figure, numbers, {"found": "facts found", "read_per_question": "tokens read per question"})


CASE = Case(
    name="conversations",
    description=__doc__,
    add_options=add_options,
    variants=variants,
    measure=measure,
    columns={
        "found": "found",
        "asked": "asked",
        "found_of_first_half": "of the first half",
        "read_per_question": "read per question",
        "history": "history",
        "evicted_tokens": "evicted",
    },
    ratios=ratios,
    draw=draw,
)
main = CASE.main
