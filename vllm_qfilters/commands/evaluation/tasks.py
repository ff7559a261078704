"""Defines what is measured: a task makes the requests of a cell, and a measurement of what the engine answers.

A cell is one task, method and budget. Tasks know token ids and answers, not engines.
"""

import dataclasses
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from vllm_qfilters.commands.evaluation import needles
from vllm_qfilters.commands.evaluation.needles import Needle, PromptFrame
from vllm_qfilters.commands.evaluation.statistics import block_means, rounded
from vllm_qfilters.commands.evaluation.texts import TextSequence, digest

BLOCK_TOKENS = 128  # consecutive positions whose mean loss counts as one observation
_ANSWER_TOKENS = 12
_NEEDLES = {"passkey": needles.passkey, "kv": needles.key_value}


@dataclasses.dataclass(frozen=True)
class EvalRequest:
    """Asks the engine for a generation, or for the losses of a prompt.

    Attributes:
        token_ids: the prompt.
        kv_budget: tokens, a fraction of the prompt, or 0 for the full cache.
        max_tokens: how many tokens are generated at most.
        wants_losses: whether the losses of the prompt's tokens are asked for.
        sampling: further fields of vLLM's ``SamplingParams``.
    """

    token_ids: list[int]
    kv_budget: int | float
    max_tokens: int = 1
    wants_losses: bool = False
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"temperature": 0.0})

    @property
    def most_tokens(self) -> int:
        """Tokens that are read and, at most, generated."""
        return len(self.token_ids) + self.max_tokens


@dataclasses.dataclass(frozen=True)
class EvalAnswer:
    """Holds what the engine answered to a request.

    Attributes:
        token_ids: the tokens it generated.
        text: the same as text.
        finish_reason: why it stopped there, as vLLM names reasons.
        losses: the loss of each prompt token from the second on, in nats; empty unless asked for.
    """

    token_ids: list[int]
    text: str
    finish_reason: str | None
    losses: list[float]


class Task(Protocol):
    """Something to measure, on every method and budget."""

    @property
    def name(self) -> str:
        """The name in results."""

    @property
    def budgets(self) -> Sequence[int | float]:
        """The budgets of its cells, without 0, which stands for the full cache."""

    @property
    def cuts(self) -> Mapping[str, Any]:
        """The options of ``KVCompressionConfig`` that the task itself sets, which say where prompts are cut."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the results depend on beside model, method and budget, as JSON."""

    @property
    def max_length(self) -> int:
        """The most tokens of a request, generated ones included."""

    def requests(self, budget: int | float) -> list[EvalRequest]:
        """Makes the requests of a cell."""

    def measure(self, answers: Sequence[EvalAnswer]) -> dict[str, Any]:
        """Measures the answers to :meth:`requests`, which come in their order; returns JSON."""


@dataclasses.dataclass(frozen=True)
class LossTask:
    """Measures the loss over the last tokens of sequences, read as prompts that are cut after every ``chunk`` tokens.

    ``streaming`` cuts often and measures far behind the first cut; ``prompt`` cuts once, where its measuring begins.

    Attributes:
        sequences: the prompts.
        chunk: tokens between two cuts; a multiple of the block size.
        loss_from: index of the first token whose loss counts.
    """

    name: str
    budgets: Sequence[int | float]
    sequences: Sequence[TextSequence]
    chunk: int
    loss_from: int
    settings: Mapping[str, Any]

    @property
    def cuts(self) -> dict[str, Any]:
        return {"prefill": "chunked", "scope": "all", "chunk": self.chunk, "prefill_interval": self.chunk}

    @property
    def max_length(self) -> int:
        return max(len(sequence.token_ids) for sequence in self.sequences) + 1

    def requests(self, budget: int | float) -> list[EvalRequest]:
        # A fraction counts the tokens up to the measured ones, not the whole sequence.
        tokens = round(budget * self.loss_from) if isinstance(budget, float) else budget
        return [EvalRequest(sequence.token_ids, tokens, wants_losses=True) for sequence in self.sequences]

    def measure(self, answers: Sequence[EvalAnswer]) -> dict[str, Any]:
        measured = [answer.losses[self.loss_from - 1 :] for answer in answers]
        return {
            "loss": statistics.fmean(loss for losses in measured for loss in losses),
            "texts": [sequence.text for sequence in self.sequences],
            "block_losses": [[round(mean, 5) for mean in block_means(losses, BLOCK_TOKENS)] for losses in measured],
        }


@dataclasses.dataclass(frozen=True)
class RetrievalTask:
    """Measures the share of prompts whose hidden number is found.

    Attributes:
        needles: the prompts, each with the depth of its hidden number.
    """

    name: str
    budgets: Sequence[int | float]
    needles: Sequence[tuple[float, Needle]]
    settings: Mapping[str, Any]
    cuts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def max_length(self) -> int:
        return max(len(needle.token_ids) for _, needle in self.needles) + _ANSWER_TOKENS

    def requests(self, budget: int | float) -> list[EvalRequest]:
        return [EvalRequest(needle.token_ids, budget, max_tokens=_ANSWER_TOKENS) for _, needle in self.needles]

    def measure(self, answers: Sequence[EvalAnswer]) -> dict[str, Any]:
        by_depth: dict[float, list[bool]] = {}
        for (depth, needle), answer in zip(self.needles, answers, strict=True):
            by_depth.setdefault(depth, []).append(needles.is_answered(answer.text, needle.answer))
        return {
            "found": sum(map(sum, by_depth.values())),
            "trials": len(answers),
            "depths": [
                {"depth": depth, "found": sum(found), "trials": len(found)} for depth, found in by_depth.items()
            ],
            "answers": [
                [needle.answer, answer.text] for (_, needle), answer in zip(self.needles, answers, strict=True)
            ],
        }


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, and what its answer is scored by.

    Attributes:
        kind: what is asked, among the kinds of its task.
        token_ids: the prompt.
        expected: what the answer is compared with.
        max_tokens: how many tokens the answer has at most.
    """

    kind: str
    token_ids: list[int]
    expected: Sequence[str]
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class QuestionTask:
    """Scores answers to questions of several kinds, each from 0 to 1.

    Attributes:
        questions: the prompts.
        score: of an answer, from its text and what is expected.
    """

    name: str
    budgets: Sequence[int | float]
    questions: Sequence[Question]
    score: Callable[[str, Sequence[str]], float]
    settings: Mapping[str, Any]
    cuts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def max_length(self) -> int:
        return max(len(question.token_ids) + question.max_tokens for question in self.questions)

    def requests(self, budget: int | float) -> list[EvalRequest]:
        return [EvalRequest(question.token_ids, budget, question.max_tokens) for question in self.questions]

    def measure(self, answers: Sequence[EvalAnswer]) -> dict[str, Any]:
        asked = list(zip(self.questions, answers, strict=True))
        scores = [round(self.score(answer.text, question.expected), 5) for question, answer in asked]
        by_kind: dict[str, list[float]] = {}
        for (question, _), score in zip(asked, scores, strict=True):
            by_kind.setdefault(question.kind, []).append(score)
        return {
            **rounded(scores),
            "kinds": {kind: rounded(of_kind) for kind, of_kind in by_kind.items()},
            "scores": scores,
            "answers": [[*question.expected, answer.text] for question, answer in asked],
        }


def found(text: str, expected: Sequence[str]) -> float:
    """Returns the share of ``expected`` that stands in ``text``, as whole words."""
    return statistics.fmean(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None for word in expected)


def retrieval_task(
    name: str,
    tokenizer: Any,
    filler: str,
    length: int,
    depths: Sequence[float],
    trials: int,
    seed: int,
    budgets: Sequence[float],
) -> RetrievalTask:
    """Makes the task ``passkey`` or ``kv``.

    Args:
        name: which of them.
        tokenizer: the model's tokenizer.
        filler: the text that numbers are hidden in.
        length: tokens of a prompt.
        depths: where in the text numbers stand, from 0 at its beginning to 1 at its end.
        trials: prompts per depth.
        seed: chooses the numbers and the parts of the text.
        budgets: fractions of the prompt.

    Raises:
        ValueError: ``filler`` or ``length`` is too short.
    """
    frame = PromptFrame(tokenizer)
    token_ids = frame.encode_filler(filler, length, "numbers")
    made = [
        (
            depth,
            _NEEDLES[name](frame, token_ids, length, depth, random.Random(f"{seed} {name} {length} {depth} {trial}")),
        )
        for depth in depths
        for trial in range(trials)
    ]
    settings = {
        "length": length,
        "depths": list(depths),
        "trials_per_depth": trials,
        "seed": seed,
        "filler": digest(filler),
    }
    return RetrievalTask(f"{name}-{length}", budgets, made, settings)
