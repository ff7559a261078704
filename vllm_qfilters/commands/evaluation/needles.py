"""Makes prompts that hide a fact in a long context and ask for it at their end."""

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from vllm_qfilters.commands.evaluation.texts import leading_tokens
from vllm_qfilters.commands.evaluation.words import ADJECTIVES, NOUNS

NUM_KEYS = 8
_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the user's words while the chat template is applied
_SENTENCE_END_REACH = 40  # tokens


@dataclasses.dataclass(frozen=True)
class Needle:
    """A prompt and the number it asks for."""

    token_ids: list[int]
    answer: str


class PromptFrame:
    """Surrounds the user's words with the model's chat template, if the model has one.

    Args:
        tokenizer: the model's tokenizer.

    Attributes:
        head: token ids that stand before the user's words.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if tokenizer.chat_template is None:
            self.head, self._tail = leading_tokens(tokenizer), ""
            return
        messages = [{"role": "user", "content": _PLACE}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        head, _, self._tail = rendered.partition(_PLACE)
        self.head = self.encode(head)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_filler(self, filler: str, length: int, hidden: str) -> list[int]:
        """Encodes the text that ``hidden`` is hidden in; raises ValueError if it has fewer than ``length`` tokens."""
        token_ids = self.encode(filler)
        if len(token_ids) < length:
            raise ValueError(
                f"the text to hide {hidden} in has {len(token_ids)} tokens, {length} are needed: give a longer one"
            )
        return token_ids

    def decode(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def tail(self, question: str, answer_start: str) -> list[int]:
        """Returns the token ids of the question, of what stands behind the user's words, and of the beginning of the
        answer, which the model is to continue.
        """
        return self.encode(question + (self._tail or "\n") + answer_start)


def passkey(frame: PromptFrame, filler: Sequence[int], length: int, depth: float, rng: random.Random) -> Needle:
    """Hides one number within a text.

    Args:
        frame: surrounds the prompt.
        filler: token ids of a text, ``length`` at least.
        length: tokens of the prompt.
        depth: where in the text the number stands, from 0 at its beginning to 1 at its end; it is moved back to the end
            of a sentence.
        rng: chooses the number and the part of the text.

    Raises:
        ValueError: ``length`` is too short for the question.
    """
    key = str(rng.randrange(10_000, 100_000))
    head = "There is a pass key hidden in the text below. Find and remember it.\n\n"
    facts = [(depth, f"\nThe pass key is the number {key}. Remember it. {key} is the pass key.\n")]
    tail = frame.tail("\n\nWhat is the pass key mentioned in the text above?", "The pass key is the number")
    return Needle(hide(frame, filler, length, head, facts, tail, rng), key)


def key_value(frame: PromptFrame, filler: Sequence[int], length: int, depth: float, rng: random.Random) -> Needle:
    """Hides ``NUM_KEYS`` named numbers within a text, evenly. Before the question nothing tells which one it asks for.

    Arguments and errors are those of :func:`passkey`, but ``depth`` is the place among the numbers.
    """
    names = rng.sample([f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], NUM_KEYS)
    numbers = [str(number) for number in rng.sample(range(10_000, 100_000), NUM_KEYS)]
    head = "There are numbers of things hidden in the text below. Find and remember them.\n\n"
    facts = [
        (index / (NUM_KEYS - 1), f"\nThe number of the {name} is {number}.\n")
        for index, (name, number) in enumerate(zip(names, numbers, strict=True))
    ]
    asked = round(depth * (NUM_KEYS - 1))
    tail = frame.tail(f"\n\nWhat is the number of the {names[asked]}?", f"The number of the {names[asked]} is")
    return Needle(hide(frame, filler, length, head, facts, tail, rng), numbers[asked])


def is_answered(text: str, answer: str) -> bool:
    """Returns whether the first number in ``text`` is exactly ``answer``."""
    number = re.search(r"\d+", text)
    return number is not None and number.group() == answer


def most_that_fit(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """Returns the greatest count that fits, of those from ``least`` to ``most``; None if the least does not."""
    if not fits(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least


def hide(
    frame: PromptFrame,
    filler: Sequence[int],
    length: int,
    head: str,
    facts: Sequence[tuple[float, str]],
    tail: Sequence[int],
    rng: random.Random,
) -> list[int]:
    """Returns a prompt of exactly ``length`` tokens: ``head``, a part of ``filler`` with ``facts`` at their depths, and
    ``tail``.
    """
    token_ids = frame.head + frame.encode(head)
    encoded = [(depth, frame.encode(fact)) for depth, fact in facts]
    taken = len(token_ids) + sum(len(fact) for _, fact in encoded) + len(tail)
    room = length - taken
    if room <= 0:
        raise ValueError(
            f"instruction, question and what is hidden take {taken} of {length} tokens: give a longer length"
        )
    first = rng.randrange(len(filler) - room + 1)
    text = filler[first : first + room]
    start = 0
    for depth, fact in encoded:
        place = max(start, _sentence_end(frame, text, round(depth * room)))
        token_ids += [*text[start:place], *fact]
        start = place
    return [*token_ids, *text[start:], *tail]


def _sentence_end(frame: PromptFrame, text: Sequence[int], place: int) -> int:
    """Returns the last end of a sentence at or shortly before ``place``, or else ``place``."""
    if place == len(text):
        return place
    for end in range(place, max(0, place - _SENTENCE_END_REACH), -1):
        if frame.decode(text[end - 1]).rstrip(" ").endswith((".", "\n")):
            return end
    return place
