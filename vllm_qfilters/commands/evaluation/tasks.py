"""Defines what is measured: a task makes the requests of a cell, and a measurement of what the engine answers.

A cell is one task, method and budget. Tasks know token ids and answers, not engines.
"""

import dataclasses
import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vllm_qfilters.commands.evaluation import needles
from vllm_qfilters.commands.evaluation.needles import Needle, PromptFrame
from vllm_qfilters.commands.evaluation.statistics import block_means, repeated_ngrams
from vllm_qfilters.commands.evaluation.texts import Text, TextSequence, digest, pieces

BLOCK_TOKENS = 128  # consecutive positions whose mean loss counts as one observation
GENERATION_TEMPERATURE = 0.7
LOOP_SHARE = 0.3  # a text goes round in circles if more 4-grams of its last third than this occurred there before
_ANSWER_TOKENS = 12
_NEEDLES = {"passkey": needles.passkey, "kv": needles.key_value}
_INSTRUCTIONS = (
    "Write a long story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain in detail how a refrigerator works, from the compressor to the thermostat.",
    "Write a travel diary of two weeks in a country of your choice, day by day.",
    "Describe the history of writing, from clay tablets to computers.",
    "Give a step by step guide to planting and keeping a vegetable garden for a whole year.",
    "Write a dialogue between a teacher and a curious student about why the sky is blue.",
    "Compare living in a city with living in the countryside, with many examples.",
    "Write an essay about how trains changed the world.",
)


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
class GenerationTask:
    """Measures whether long generations go round in circles, and whether they end.

    Attributes:
        prompts: token ids of each.
        max_tokens: how many tokens are generated at most.
        temperature: the temperature of sampling.
        seed: the seed of the first prompt's sampling; the others follow.
    """

    budgets: Sequence[int | float]
    prompts: Sequence[list[int]]
    max_tokens: int
    temperature: float
    seed: int
    settings: Mapping[str, Any]
    name: str = "generation"
    cuts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def max_length(self) -> int:
        return max(map(len, self.prompts)) + self.max_tokens

    def requests(self, budget: int | float) -> list[EvalRequest]:
        sampling = {"temperature": self.temperature, "top_p": 0.95}
        return [
            EvalRequest(prompt, budget, self.max_tokens, sampling={**sampling, "seed": self.seed + index})
            for index, prompt in enumerate(self.prompts)
        ]

    def measure(self, answers: Sequence[EvalAnswer]) -> dict[str, Any]:
        last_thirds = [repeated_ngrams(_last_third(answer.token_ids)) for answer in answers]
        return {
            "repeated_4grams": [round(repeated_ngrams(answer.token_ids), 5) for answer in answers],
            "repeated_4grams_last_third": [round(share, 5) for share in last_thirds],
            "loops": sum(share > LOOP_SHARE for share in last_thirds),
            "lengths": [len(answer.token_ids) for answer in answers],
            "finished": sum(answer.finish_reason == "stop" for answer in answers),
            "texts": [answer.text for answer in answers],
        }


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
    token_ids = frame.encode(filler)
    if len(token_ids) < length:
        raise ValueError(
            f"the text to hide numbers in has {len(token_ids)} tokens, {length} are needed: give a longer one"
        )
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


def generation_task(
    tokenizer: Any,
    num_prompts: int,
    max_tokens: int,
    seed: int,
    budgets: Sequence[int],
    texts: Sequence[Text] = (),
    context: int = 0,
    temperature: float = GENERATION_TEMPERATURE,
) -> GenerationTask:
    """Makes the task ``generation``.

    Args:
        tokenizer: the model's tokenizer.
        num_prompts: how many generations there are; without a context no more than there are instructions.
        max_tokens: how many tokens are generated at most.
        seed: the seed of the first generation; the others follow.
        budgets: tokens; those that no generation can outgrow are left out.
        texts: the texts to take contexts from, in turn.
        context: tokens of text that stand before each instruction, another piece before each; 0 for none.
        temperature: the temperature of sampling.

    Raises:
        ValueError: there are too few instructions without a context, or the texts are too short.
    """
    if num_prompts > len(_INSTRUCTIONS) and not context:
        raise ValueError(
            f"there are {len(_INSTRUCTIONS)} prompts to generate from, not {num_prompts}: ask for fewer, or give "
            "--generation-context"
        )
    frame = PromptFrame(tokenizer)
    instructions = itertools.islice(itertools.cycle(_INSTRUCTIONS), num_prompts)
    settings: dict[str, Any] = {"prompts": num_prompts, "tokens": max_tokens, "seed": seed}
    settings |= {"context": context, "temperature": temperature}
    if context:
        settings["texts"] = {text.name: digest(text.content) for text in texts[:num_prompts]}
        before = [piece.token_ids for piece in pieces(texts, tokenizer, num_prompts, context)]
        prompts = [
            [*frame.head, *token_ids, *frame.tail(f"\n\n{instruction}", "")]
            for token_ids, instruction in zip(before, instructions, strict=True)
        ]
    else:
        prompts = [frame.head + frame.tail(instruction, "") for instruction in instructions]
    longest = max(map(len, prompts)) + max_tokens
    outgrown = [budget for budget in budgets if budget < longest]
    return GenerationTask(outgrown, prompts, max_tokens, temperature, seed, settings)


def _last_third(token_ids: Sequence[int]) -> Sequence[int]:
    return token_ids[len(token_ids) - len(token_ids) // 3 :]
