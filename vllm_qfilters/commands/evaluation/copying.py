"""The task ``copy``: write out a table or a piece of code of the prompt with one change, scored line by line."""

import difflib
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vllm_qfilters.commands.evaluation.needles import PromptFrame, most_that_fit
from vllm_qfilters.commands.evaluation.tasks import Question, QuestionTask
from vllm_qfilters.commands.evaluation.words import ADJECTIVES, NOUNS

_SPARE_TOKENS = 16  # that an answer may take beyond the lines that are expected


class Form(NamedTuple):
    """How rows are written.

    Attributes:
        what: one of them is called.
        head: stands before the rows; the answer begins with it, too.
        between: words of a name.
        row: of a name and a number.
        end: stands behind the rows.
    """

    what: str
    head: str
    between: str
    row: Callable[[str, int], str]
    end: str


KINDS = {
    "table": Form("table", "| thing | number |\n|---|---|\n", " ", "| {} | {} |\n".format, ""),
    "code": Form("piece of code", "NUMBERS = {\n", "_", '    "{}": {},\n'.format, "}\n"),
}


def copy_task(
    tokenizer: Any, length: int, kinds: Sequence[str], repeats: int, seed: int, budgets: Sequence[float]
) -> QuestionTask:
    """Makes the task ``copy``. What is written is about as long as the prompt, and each line of it depends on one.

    Args:
        tokenizer: the model's tokenizer.
        length: tokens of a prompt, at most.
        kinds: some of ``KINDS``.
        repeats: prompts of each kind.
        seed: chooses rows and the change.
        budgets: fractions of the prompt.

    Raises:
        ValueError: ``length`` is too short for two rows.
    """
    frame = PromptFrame(tokenizer)
    questions = [
        _question(frame, kind, length, random.Random(f"{seed} copy {kind} {length} {repeat}"))
        for kind in kinds
        for repeat in range(repeats)
    ]
    settings = {"length": length, "kinds": list(kinds), "repeats": repeats, "seed": seed}
    return QuestionTask(f"copy-{length}", budgets, questions, lines_in_order, settings)


def lines_in_order(text: str, expected: Sequence[str]) -> float:
    """Returns the share of the lines of ``expected`` that ``text`` has exactly, in their order; blanks around a line do
    not count.
    """
    lines, wanted = [line.strip() for line in text.splitlines()], [line.strip() for line in expected]
    blocks = difflib.SequenceMatcher(None, lines, wanted, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / len(wanted)


def _question(frame: PromptFrame, kind: str, length: int, rng: random.Random) -> Question:
    form = KINDS[kind]
    names = rng.sample([f"{adjective}{form.between}{noun}" for adjective in ADJECTIVES for noun in NOUNS], 4000)
    numbers = rng.sample(range(10_000, 100_000), len(names) + 1)
    place = rng.random()

    def rows(num_rows: int, changed_to: int | None = None) -> list[str]:
        changed = int(place * num_rows)
        return [
            form.row(name, number if row != changed or changed_to is None else changed_to)
            for row, (name, number) in enumerate(zip(names[:num_rows], numbers, strict=False))
        ]

    def prompt(num_rows: int) -> list[int]:
        head = f"Here is a {form.what}.\n\n{form.head}{''.join(rows(num_rows))}{form.end}\n"
        question = (
            f"Write out the whole {form.what} with one change: "
            f"the number of {names[int(place * num_rows)]} is now {numbers[-1]}."
        )
        return frame.head + frame.encode(head) + frame.tail(question, form.head)

    num_rows = most_that_fit(lambda count: len(prompt(count)) <= length, 2, len(names))
    if num_rows is None:
        raise ValueError(f"a {form.what} to copy takes more than {length} tokens: give a longer length")
    expected = rows(num_rows, changed_to=numbers[-1])
    max_tokens = len(frame.encode("".join(expected))) + _SPARE_TOKENS
    return Question(kind, prompt(num_rows), expected, max_tokens)
