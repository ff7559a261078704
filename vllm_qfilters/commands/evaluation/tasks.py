"""What is measured: a task makes the requests of a cell, and a measurement of what the engine answers.

A cell is one task, method and budget. Tasks know token ids and answers, not engines.
"""

import dataclasses
import hashlib
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vllm_qfilters.commands.evaluation import needles
from vllm_qfilters.commands.evaluation.needles import Needle, PromptFrame
from vllm_qfilters.commands.evaluation.statistics import block_means, repeated_ngrams
from vllm_qfilters.commands.evaluation.texts import TextSequence

BLOCK_TOKENS = 128  # consecutive positions whose mean loss counts as one observation
_ANSWER_TOKENS = 12
_NEEDLES = {"passkey": needles.passkey, "kv": needles.key_value}
_GENERATION_PROMPTS = (
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
    """What the engine is to do.

    Attributes:
        token_ids: the prompt.
        kv_budget: tokens, a fraction of the prompt, or 0 for the full cache.
        max_tokens: to generate.
        wants_losses: of the prompt's tokens.
        sampling: further fields of vLLM's ``SamplingParams``.
    """

    token_ids: list[int]
    kv_budget: int | float
    max_tokens: int = 1
    wants_losses: bool = False
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"temperature": 0.0})


@dataclasses.dataclass(frozen=True)
class EvalAnswer:
    """What the engine did.

    Attributes:
        token_ids, text, finish_reason: of what it generated.
        losses: nats, of the prompt's tokens from the second on; empty unless asked for.
    """

    token_ids: list[int]
    text: str
    finish_reason: str | None
    losses: list[float]


class Task(Protocol):
    """Attributes:
    name: in results.
    budgets: of its cells, beside 0, the full cache.
    cuts: options of ``KVCompressionConfig`` that the task itself sets: where prompts are cut.
    settings: what its results depend on beside model, method and budget, as JSON.
    max_length: most tokens of a request, generated ones included.
    """

    name: str
    budgets: Sequence[int | float]
    cuts: Mapping[str, Any]
    settings: Mapping[str, Any]
    max_length: int

    def requests(self, budget: int | float) -> list[EvalRequest]: ...

    def measure(self, answers: Sequence[EvalAnswer]) -> dict[str, Any]:
        """Of answers to :meth:`requests`, in their order; JSON."""


@dataclasses.dataclass(frozen=True)
class LossTask:
    """The loss over the last tokens of sequences, read as prompts that are cut after every ``chunk`` tokens.

    ``streaming`` cuts often and measures far behind the first cut; ``prompt`` cuts once, where its measuring begins.

    Attributes:
        chunk: tokens; a multiple of the block size.
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
        # A fraction is one of the tokens up to the measured ones, not of the sequence.
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
    """Share of prompts whose hidden number is found.

    Attributes:
        needles: with the depth of each.
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
            "answers": [[needle.answer, answer.text] for (_, needle), answer in zip(self.needles, answers)],
        }


@dataclasses.dataclass(frozen=True)
class GenerationTask:
    """Whether long generations go round in circles, and whether they end."""

    budgets: Sequence[int | float]
    prompts: Sequence[list[int]]
    max_tokens: int
    seed: int
    settings: Mapping[str, Any]
    name: str = "generation"
    cuts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def max_length(self) -> int:
        return max(map(len, self.prompts)) + self.max_tokens

    def requests(self, budget: int | float) -> list[EvalRequest]:
        sampling = {"temperature": 0.7, "top_p": 0.95}
        return [
            EvalRequest(prompt, budget, self.max_tokens, sampling={**sampling, "seed": self.seed + index})
            for index, prompt in enumerate(self.prompts)
        ]

    def measure(self, answers: Sequence[EvalAnswer]) -> dict[str, Any]:
        return {
            "repeated_4grams": [round(repeated_ngrams(answer.token_ids), 5) for answer in answers],
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
    """The task ``passkey`` or ``kv``: arguments as for :func:`needles.passkey`, ``trials`` per depth.

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
        "filler": hashlib.sha256(filler.encode()).hexdigest()[:16],
    }
    return RetrievalTask(f"{name}-{length}", budgets, made, settings)


def generation_task(
    tokenizer: Any, num_prompts: int, max_tokens: int, seed: int, budgets: Sequence[int]
) -> GenerationTask:
    """Of budgets, those that a generation can outgrow."""
    if num_prompts > len(_GENERATION_PROMPTS):
        raise ValueError(f"there are {len(_GENERATION_PROMPTS)} prompts to generate from, not {num_prompts}")
    frame = PromptFrame(tokenizer)
    prompts = [frame.head + frame.tail(prompt, "") for prompt in _GENERATION_PROMPTS[:num_prompts]]
    longest = max(map(len, prompts)) + max_tokens
    settings = {"prompts": num_prompts, "tokens": max_tokens, "seed": seed}
    return GenerationTask([budget for budget in budgets if budget < longest], prompts, max_tokens, seed, settings)
