"""Judges what was generated: how likely another model finds the end of each text, in bits per byte.

Repetition is likely, so fewer bits are not better as such: the full cache's are what to compare with.
"""

import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_qfilters.commands.evaluation.engine import RequestFinished
from vllm_qfilters.commands.evaluation.evaluate import RunEngine
from vllm_qfilters.commands.evaluation.results import Results
from vllm_qfilters.commands.evaluation.tasks import EvalRequest
from vllm_qfilters.commands.evaluation.texts import leading_tokens
from vllm_qfilters.config import UNLIMITED
from vllm_qfilters.frontend.engine_args import apply_kv_compression

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

TASK = "generation"
_FULL_CACHE = {"budget": 1.0, "max_budget": UNLIMITED, "allow_kv_budget_off": True}


def unjudged(results: Results, model: str) -> list[dict[str, Any]]:
    """Returns the cells of generations that ``model`` has not judged."""
    return [cell for cell in results.cells(TASK) if cell.get("judge") != model]


def judge(results: Results, engine_args: "EngineArgs", model: str, run_engine: RunEngine) -> None:
    """Adds to every cell of generations the bits per byte of the last third of each text, given the third before.

    Args:
        results: of which the cells are judged that are not yet.
        engine_args: of all engines, without KV compression.
        model: judges, with its full cache.
        run_engine: starts an engine and runs requests on it.

    Raises:
        EngineError: ``run_engine`` raised it.
        ValueError, OSError: there is no such model.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    cells = unjudged(results, model)
    if not cells:
        return
    engine_args = copy.copy(engine_args)
    engine_args.model, engine_args.tokenizer, engine_args.max_model_len = model, None, None
    engine_args.served_model_name, engine_args.revision = None, None
    tokenizer = cached_tokenizer_from_config(engine_args.create_model_config())
    ends = {
        (index, place): _ends(tokenizer, text)
        for index, cell in enumerate(cells)
        for place, text in enumerate(cell["texts"])
    }
    judged = [key for key, end in ends.items() if end.before and end.last]  # not texts of hardly a word
    requests = [EvalRequest(ends[key].before + ends[key].last, 0, wants_losses=True) for key in judged]
    engine_args.max_model_len = max((len(request.token_ids) for request in requests), default=0) + 1
    apply_kv_compression(engine_args, "streaming", _FULL_CACHE)
    bits_per_byte: list[list[float | None]] = [[None] * len(cell["texts"]) for cell in cells]
    for event in run_engine(engine_args, requests):
        if isinstance(event, RequestFinished):
            index, place = judged[event.index]
            end = ends[index, place]
            losses = event.answer.losses[len(end.before) - 1 :]
            bits_per_byte[index][place] = round(math.fsum(losses) / math.log(2) / end.num_bytes, 5)
    for cell, bits in zip(cells, bits_per_byte, strict=True):
        results.amend(cell, {"judge": model, "bits_per_byte": bits})


class _End(NamedTuple):
    """The tokens of the second third of a text, those of the last one, and the bytes of the latter."""

    before: list[int]
    last: list[int]
    num_bytes: int


def _ends(tokenizer: Any, text: str) -> _End:
    third = len(text) // 3
    before, last = text[third : len(text) - third], text[len(text) - third :]
    encoded = [list(tokenizer.encode(part, add_special_tokens=False)) for part in (before, last)]
    return _End(leading_tokens(tokenizer) + encoded[0], encoded[1], len(last.encode()))
