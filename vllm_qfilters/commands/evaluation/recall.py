"""The task ``recall``: a fact stated once while text streams by, asked for many cuts later."""

import random
from collections.abc import Sequence
from typing import Any

from vllm_qfilters.commands.evaluation.needles import PromptFrame, hide
from vllm_qfilters.commands.evaluation.tasks import Question, QuestionTask, found
from vllm_qfilters.commands.evaluation.texts import digest
from vllm_qfilters.commands.evaluation.words import ADJECTIVES, NOUNS

LEAD_TOKENS = 512  # of text before the fact, so that it is none of the first tokens, which stay
_ANSWER_TOKENS = 12


def recall_task(
    tokenizer: Any, filler: str, distance: int, chunk: int, repeats: int, seed: int, budgets: Sequence[int]
) -> QuestionTask:
    """Makes the task ``recall``. Its prompts are cut to the budget after every ``chunk`` tokens, as generated text is.

    Nothing before the question tells that the fact matters: what stays is for the method to guess.

    Args:
        tokenizer: the model's tokenizer.
        filler: the text that streams.
        distance: tokens between the fact and the question.
        chunk: tokens between two cuts; a multiple of the block size.
        repeats: prompts.
        seed: chooses the facts and the parts of the text.
        budgets: tokens.

    Raises:
        ValueError: ``filler`` is too short.
    """
    frame = PromptFrame(tokenizer)
    token_ids = frame.encode(filler)
    if len(token_ids) < LEAD_TOKENS + distance:
        raise ValueError(
            f"the text that streams has {len(token_ids)} tokens, {LEAD_TOKENS + distance} are needed: give a longer one"
        )
    questions = [
        _question(frame, token_ids, distance, random.Random(f"{seed} recall {distance} {repeat}"))
        for repeat in range(repeats)
    ]
    settings = {"distance": distance, "chunk": chunk, "kinds": ["fact"], "repeats": repeats, "seed": seed}
    settings["filler"] = digest(filler)
    cuts = {"prefill": "chunked", "scope": "all", "chunk": chunk, "prefill_interval": chunk}
    return QuestionTask(f"recall-{distance}", budgets, questions, found, settings, cuts)


def _question(frame: PromptFrame, filler: Sequence[int], distance: int, rng: random.Random) -> Question:
    name, number = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}", str(rng.randrange(10_000, 100_000))
    fact = f"\nThe number of the {name} is {number}.\n"
    tail = frame.tail(f"\n\nWhat is the number of the {name}?", f"The number of the {name} is")
    room = LEAD_TOKENS + distance
    length = len(frame.head) + room + len(frame.encode(fact)) + len(tail)
    placed = [(LEAD_TOKENS / room, fact)]
    return Question("fact", hide(frame, filler, length, "", placed, tail, rng), [number], _ANSWER_TOKENS)
