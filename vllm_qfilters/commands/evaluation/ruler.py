"""The task ``ruler``: synthetic questions about long prompts, after RULER (Hsieh et al. 2024, arXiv 2404.06654).

Made here from the paper's descriptions, with words and texts of our own, so scores are not to be compared with its
tables. As there, the score of an answer is the share of what is asked for that stands in it. The questions about
documents (QA) need data sets and are left out.
"""

import itertools
import random
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from vllm_qfilters.commands.evaluation.needles import PromptFrame, hide, most_that_fit
from vllm_qfilters.commands.evaluation.tasks import Question, QuestionTask, found
from vllm_qfilters.commands.evaluation.texts import digest
from vllm_qfilters.commands.evaluation.words import ADJECTIVES, NOUNS

NEEDLES = 4  # keys, values or questions of the kinds that have several
HOPS = 4  # assignments behind the first variable
COMMON_WORDS, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
SHORT_TIMES = (10, 1)  # of common words and others, in prompts too short for the above
FREQUENT_WORDS, ZETA = 3, 2.0
_LETTERS_OF_A_WORD = 6


def ruler_task(
    tokenizer: Any,
    filler: str,
    length: int,
    kinds: Sequence[str],
    repeats: int,
    seed: int,
    budgets: Sequence[float],
) -> QuestionTask:
    """Makes the task ``ruler``.

    Args:
        tokenizer: the model's tokenizer.
        filler: the text that needles and variables are hidden in.
        length: tokens of a prompt, at most.
        kinds: some of ``KINDS``.
        repeats: prompts of each kind.
        seed: chooses everything that is random.
        budgets: fractions of the prompt.

    Raises:
        ValueError: ``filler`` or ``length`` is too short.
    """
    frame = PromptFrame(tokenizer)
    token_ids = frame.encode_filler(filler, length, "things")
    questions = [
        KINDS[kind](frame, token_ids, length, random.Random(f"{seed} ruler {kind} {length} {repeat}"))
        for kind in kinds
        for repeat in range(repeats)
    ]
    settings = {"length": length, "kinds": list(kinds), "repeats": repeats, "seed": seed, "filler": digest(filler)}
    return QuestionTask(f"ruler-{length}", budgets, questions, found, settings)


def _needles(kind: str, num_keys: int, values_of_key: int, num_asked: int) -> "Make":
    """A kind of question about numbers of things that are hidden in a text: ``num_keys`` things, each with
    ``values_of_key`` numbers; those of ``num_asked`` are asked for.
    """

    def make(frame: PromptFrame, filler: Sequence[int], length: int, rng: random.Random) -> Question:
        keys = rng.sample(_names(), num_keys)
        numbers = iter(rng.sample(range(1_000_000, 10_000_000), num_keys * values_of_key))
        facts = [(key, str(next(numbers))) for key in keys for _ in range(values_of_key)]
        expected = [number for key, number in facts if key in keys[:num_asked]]
        rng.shuffle(facts)
        placed = _placed([f"\nA number of the {key} is {number}.\n" for key, number in facts], rng)
        things = "the " + " and the ".join(keys[:num_asked])
        asked, is_they = ("number", "is") if len(expected) == 1 else ("numbers", "are")
        head = "Numbers of things are hidden in the text below. Remember them: you will be asked for some.\n\n"
        tail = frame.tail(
            f"\n\nWhat {is_they} the {asked} of {things} in the text above?", f"The {asked} of {things} {is_they}"
        )
        return Question(kind, hide(frame, filler, length, head, placed, tail, rng), expected, 16 * len(expected))

    return make


def _variables(frame: PromptFrame, filler: Sequence[int], length: int, rng: random.Random) -> Question:
    """Asks for the names of all variables that hold a number, which one is given and passes on."""
    number = str(rng.randrange(10_000, 100_000))
    names = _distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=5)), HOPS + 1)
    facts = [f"\nVAR {names[0]} = {number}\n"]
    facts += [f"\nVAR {name} = VAR {before}\n" for before, name in itertools.pairwise(names)]
    head = "Variables are assigned in the text below. Remember which variable holds what.\n\n"
    tail = frame.tail(
        f"\n\nWhich variables of the text above hold the number {number}? There are {len(names)} of them.",
        f"The {len(names)} variables that hold {number} are VAR",
    )
    return Question(
        "variables", hide(frame, filler, length, head, _placed(facts, rng), tail, rng), names, 8 * len(names)
    )


def _common_words(frame: PromptFrame, filler: Sequence[int], length: int, rng: random.Random) -> Question:
    """Asks for the words that a list has more often than the others."""
    names = rng.sample(_names("-"), len(ADJECTIVES) * len(NOUNS))
    common, others = names[:COMMON_WORDS], names[COMMON_WORDS:]
    head = "Remember which words of the list below it has most often.\n\n"
    tail = frame.tail(
        f"\n\nWhich {COMMON_WORDS} words does the list above have most often?",
        f"The {COMMON_WORDS} most common words of the list are:",
    )

    def listed(num_others: int, times: tuple[int, int]) -> list[int]:
        words = common * times[0] + others[:num_others] * times[1]
        random.Random(common[0]).shuffle(words)
        return frame.encode("\n".join(f"{place}. {word}" for place, word in enumerate(words, start=1)))

    token_ids = frame.head + frame.encode(head)
    room = length - len(token_ids) - len(tail)
    times = (COMMON_TIMES, OTHER_TIMES)
    if len(listed(2 * COMMON_WORDS, times)) > room:
        times = SHORT_TIMES
    num_others = most_that_fit(lambda count: len(listed(count, times)) <= room, COMMON_WORDS, len(others))
    if num_others is None:
        raise ValueError(f"a list of words takes more than {length} tokens: give a longer length")
    token_ids += [*listed(num_others, times), *tail]
    return Question("common-words", token_ids, common, 12 * COMMON_WORDS)


def _frequent_words(frame: PromptFrame, filler: Sequence[int], length: int, rng: random.Random) -> Question:
    """Asks for the most frequent of made-up words, whose frequencies follow a Zeta distribution."""
    words = _distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=_LETTERS_OF_A_WORD)), 2000)
    weights = [rank**-ZETA for rank in range(1, len(words) + 1)]
    head = "Remember which words of the coded text below it has most often.\n\n"
    tail = frame.tail(
        f"\n\nWhich {FREQUENT_WORDS} words does the coded text above have most often?",
        f"The {FREQUENT_WORDS} most frequent words of the coded text are:",
    )
    token_ids = frame.head + frame.encode(head)
    room = length - len(token_ids) - len(tail)
    drawn = rng.choices(words, weights, k=max(1, room))

    def text(num_words: int) -> list[int]:
        return frame.encode(" ".join(drawn[:num_words]))

    num_words = most_that_fit(lambda count: len(text(count)) <= room, 20 * FREQUENT_WORDS, len(drawn))
    if num_words is None:
        raise ValueError(f"a coded text takes more than {length} tokens: give a longer length")
    frequent = [word for word, _ in Counter(drawn[:num_words]).most_common(FREQUENT_WORDS)]
    token_ids += [*text(num_words), *tail]
    return Question("frequent-words", token_ids, frequent, 16 * FREQUENT_WORDS)


Make = Callable[[PromptFrame, Sequence[int], int, random.Random], Question]

KINDS: dict[str, Make] = {
    "single": _needles("single", 1, 1, 1),
    "multi-key": _needles("multi-key", NEEDLES, 1, 1),
    "multi-value": _needles("multi-value", 1, NEEDLES, 1),
    "multi-query": _needles("multi-query", NEEDLES, 1, NEEDLES),
    "variables": _variables,
    "common-words": _common_words,
    "frequent-words": _frequent_words,
}


def _names(between: str = " ") -> list[str]:
    return [f"{adjective}{between}{noun}" for adjective in ADJECTIVES for noun in NOUNS]


def _placed(facts: Sequence[str], rng: random.Random) -> list[tuple[float, str]]:
    """Gives facts random depths, in their order."""
    return list(zip(sorted(rng.random() for _ in facts), facts, strict=True))


def _distinct(draw: Callable[[], str], count: int) -> list[str]:
    """Draws until there are ``count`` different words, in the order they were drawn."""
    words: dict[str, None] = {}
    while len(words) < count:
        words[draw()] = None
    return list(words)
