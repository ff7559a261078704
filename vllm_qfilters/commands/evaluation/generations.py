"""The task ``generation``: whether long generations go round in circles, and whether they end."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_qfilters.commands.evaluation.needles import PromptFrame
from vllm_qfilters.commands.evaluation.statistics import Estimate, estimate, paired_increase, repeated_ngrams
from vllm_qfilters.commands.evaluation.tasks import EvalAnswer, EvalRequest
from vllm_qfilters.commands.evaluation.texts import Text, digest, pieces

TEMPERATURE, PENALTY = 0.7, 1.0
LOOP_SHARE = 0.3  # a text goes round in circles if more 4-grams of its last third than this occurred there before
INSTRUCTIONS = (
    "Write a long story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain in detail how a refrigerator works, from the compressor to the thermostat.",
    "Write a travel diary of two weeks in a country of your choice, day by day.",
    "Describe the history of writing, from clay tablets to computers.",
    "Give a step by step guide to planting and keeping a vegetable garden for a whole year.",
    "Write a dialogue between a teacher and a curious student about why the sky is blue.",
    "Compare living in a city with living in the countryside, with many examples.",
    "Write an essay about how trains changed the world.",
    "Tell the life of a river, from its spring in the mountains to the sea.",
    "Explain how a bill becomes a law, and what can happen to it on the way.",
    "Write a letter from a ship's cook to his sister about a year at sea.",
    "Describe a working day in a bakery, hour by hour.",
    "Explain how bicycles are built, part by part, and what each part does.",
    "Write a speech for the opening of a new public library.",
    "List things that people believed about the stars, century by century, and what became of each belief.",
    "Write a detective story that takes place in a train stuck in the snow.",
)
HELD_BACK_INSTRUCTIONS = (
    "Write a long story about two brothers who inherit a broken clock.",
    "Explain in detail how cheese is made, from the milk to the shop.",
    "Write the log book of an expedition to an unknown island, day by day.",
    "Describe the history of medicine, from herbs to hospitals.",
    "Give a step by step guide to repairing an old wooden boat.",
    "Write a dialogue between a farmer and a scientist about the weather.",
    "Compare travelling by ship with travelling by plane, with many examples.",
    "Write an essay about how electric light changed the night.",
    "Tell the life of an oak, from the acorn to the table.",
    "Explain how a newspaper is made, from the first rumour to the printed page.",
    "Write a letter from a mountain guide to a visitor who wants to come back.",
    "Describe a night in a hospital, hour by hour.",
    "Explain how a piano is built, part by part, and what each part does.",
    "Write a speech for the hundredth birthday of a village school.",
    "List ways in which people measured time, century by century, and what each was good for.",
    "Write a ghost story that takes place in a museum after closing time.",
)


@dataclasses.dataclass(frozen=True)
class GenerationTask:
    """Measures whether long generations go round in circles, and whether they end.

    Attributes:
        prompts: token ids of each.
        max_tokens: how many tokens are generated at most.
        sampling: fields of vLLM's ``SamplingParams``.
        seed: the seed of the first prompt's sampling; the others follow.
    """

    budgets: Sequence[int | float]
    prompts: Sequence[list[int]]
    max_tokens: int
    sampling: Mapping[str, Any]
    seed: int
    settings: Mapping[str, Any]
    name: str = "generation"
    cuts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def max_length(self) -> int:
        return max(map(len, self.prompts)) + self.max_tokens

    def requests(self, budget: int | float) -> list[EvalRequest]:
        return [
            EvalRequest(prompt, budget, self.max_tokens, sampling={**self.sampling, "seed": self.seed + index})
            for index, prompt in enumerate(self.prompts)
        ]

    def measure(self, answers: Sequence[EvalAnswer]) -> dict[str, Any]:
        by_third = [[repeated_ngrams(third) for third in _thirds(answer.token_ids)] for answer in answers]
        return {
            "repeated_4grams": [round(repeated_ngrams(answer.token_ids), 5) for answer in answers],
            "repeated_4grams_thirds": [[round(share, 5) for share in shares] for shares in by_third],
            "repeated_4grams_last_third": [round(shares[-1], 5) for shares in by_third],
            "distinct_last_third": [round(_distinct(_thirds(answer.token_ids)[-1]), 5) for answer in answers],
            "loops": sum(shares[-1] > LOOP_SHARE for shares in by_third),
            "lengths": [len(answer.token_ids) for answer in answers],
            "finished": sum(answer.finish_reason == "stop" for answer in answers),
            "texts": [answer.text for answer in answers],
        }


def generation_task(
    tokenizer: Any,
    num_prompts: int,
    max_tokens: int,
    seed: int,
    budgets: Sequence[int],
    texts: Sequence[Text] = (),
    context: int = 0,
    temperature: float = TEMPERATURE,
    penalty: float = PENALTY,
    ignore_eos: bool = False,
    is_held_back: bool = False,
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
        penalty: the repetition penalty of sampling; 1 for none.
        ignore_eos: all generations have ``max_tokens`` tokens, whether the model would end them or not.
        is_held_back: other instructions, and contexts that begin elsewhere.

    Raises:
        ValueError: there are too few instructions without a context, or the texts are too short.
    """
    of_set = HELD_BACK_INSTRUCTIONS if is_held_back else INSTRUCTIONS
    if num_prompts > len(of_set) and not context:
        raise ValueError(
            f"there are {len(of_set)} prompts to generate from, not {num_prompts}: ask for fewer, or give "
            "--generation-context"
        )
    frame = PromptFrame(tokenizer)
    instructions = itertools.islice(itertools.cycle(of_set), num_prompts)
    settings: dict[str, Any] = {"prompts": num_prompts, "tokens": max_tokens, "seed": seed}
    settings |= {"context": context, "temperature": temperature, "penalty": penalty, "ignore_eos": ignore_eos}
    settings["instructions"] = min(num_prompts, len(of_set))
    if context:
        settings["texts"] = {text.name: digest(text.content) for text in texts[:num_prompts]}
        begin = 0.0 if is_held_back else 0.5
        before = [piece.token_ids for piece in pieces(texts, tokenizer, num_prompts, context, begin)]
        prompts = [
            [*frame.head, *token_ids, *frame.tail(f"\n\n{instruction}", "")]
            for token_ids, instruction in zip(before, instructions, strict=True)
        ]
    else:
        prompts = [frame.head + frame.tail(instruction, "") for instruction in instructions]
    longest = max(map(len, prompts)) + max_tokens
    outgrown = [budget for budget in budgets if budget < longest]
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": 0.95}
    if penalty != PENALTY:
        sampling["repetition_penalty"] = penalty
    if ignore_eos:
        sampling["ignore_eos"] = True
    return GenerationTask(outgrown, prompts, max_tokens, sampling, seed, settings)


def repeated_by_third(cell: Mapping[str, Any]) -> list[Estimate]:
    """Returns the share of 4-grams that repeat within each third of the texts of a cell."""
    return [estimate(shares) for shares in zip(*cell["repeated_4grams_thirds"], strict=True)]


def more_repeats(cell: Mapping[str, Any], full: Mapping[str, Any]) -> Estimate:
    """Returns how much more of the last third repeats than with the full cache; pairs are texts of the same prompt."""
    return paired_increase(cell["repeated_4grams_last_third"], full["repeated_4grams_last_third"])


def bits_per_byte(cell: Mapping[str, Any]) -> Estimate | None:
    """Returns what another model needs for the last thirds of a cell; None if none was asked."""
    bits = [value for value in cell.get("bits_per_byte", ()) if value is not None]
    return estimate(bits) if bits else None


def _thirds(token_ids: Sequence[int]) -> list[Sequence[int]]:
    third = len(token_ids) // 3
    return [token_ids[:third], token_ids[third : len(token_ids) - third], token_ids[len(token_ids) - third :]]


def _distinct(token_ids: Sequence[int]) -> float:
    """Returns how many different tokens there are for each token."""
    return len(set(token_ids)) / len(token_ids) if token_ids else 1.0
