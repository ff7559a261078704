"""Goes through methods and tasks, one engine at a time: results are written cell by cell, and not measured again."""

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vllm_qfilters.commands.evaluation.engine import (
    EngineEvent,
    EngineFinished,
    EngineStarted,
    Progress,
    RequestFinished,
)
from vllm_qfilters.commands.evaluation.methods import FULL, Method
from vllm_qfilters.commands.evaluation.results import Results
from vllm_qfilters.commands.evaluation.tasks import EvalAnswer, EvalRequest, Task
from vllm_qfilters.config import REQUEST_BUDGET_KEY, UNLIMITED, KVCompressionConfig
from vllm_qfilters.frontend.engine_args import apply_kv_compression
from vllm_qfilters.policy import Policy, resolve

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

RunEngine = Callable[["EngineArgs", Sequence[EvalRequest]], Iterator[EngineEvent]]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Names what one number of the table is measured for; ``method`` is a label."""

    task: Task
    method: str
    budget: int | float


@dataclasses.dataclass(frozen=True)
class Job:
    """Cells that one engine measures.

    Attributes:
        method: the method the engine is started with.
        options: further fields of ``KVCompressionConfig``.
        cells: what it measures; one of another method is the full cache.
    """

    method: Method
    options: dict[str, Any]
    cells: list[Cell]

    @property
    def num_tokens(self) -> int:
        """Counts the tokens that are read and, at most, generated."""
        return sum(request.most_tokens for cell in self.cells for request in cell.task.requests(cell.budget))


def engine_options(method: Method, task: Task, block_size: int) -> dict[str, Any]:
    """Returns the options of ``KVCompressionConfig`` for ``method`` in ``task``.

    The interval is the smallest there is unless the method names one, so that small budgets have room; every request
    names its own budget.

    Raises:
        ValueError: the method sets what the task sets itself, or there is no room for one of the task's budgets.
    """
    both = sorted(set(method.options) & set(task.cuts))
    if both:
        raise ValueError(
            f"{method.label}: {', '.join(both)} is set by {task.name} itself: drop it, or leave {task.name} out of "
            "--tasks"
        )
    every_budget = {"budget": 1.0, "max_budget": UNLIMITED, "allow_kv_budget_off": True}
    options = {"interval": block_size, **method.options, **task.cuts, **every_budget}
    try:
        policy = resolve(KVCompressionConfig.from_dict({"method": method.name, **options}), block_size=block_size)
        policy.check_block_size(block_size)
        for budget in task.budgets:
            for request in task.requests(budget):
                _check_budget(policy, request, block_size)
    except ValueError as error:
        raise ValueError(f"{method.label}, {task.name}: {error}") from error
    return options


def plan(methods: Sequence[Method], tasks: Sequence[Task], results: Results, block_size: int) -> list[Job]:
    """Returns what is left to measure. The full cache is measured on the engine of the first method, whose requests can
    switch compression off.

    Raises:
        ValueError: method and task do not fit together (see :func:`engine_options`), measured already or not.
    """
    jobs: dict[tuple[str, str], Job] = {}
    for method in methods:
        for task in tasks:
            options = engine_options(method, task, block_size)
            cells = [Cell(task, method.label, budget) for budget in task.budgets]
            if method is methods[0]:
                cells.insert(0, Cell(task, FULL, 0))
            missing = [cell for cell in cells if results.get(task.name, cell.method, cell.budget) is None]
            if missing:
                job = jobs.setdefault((method.label, json.dumps(options, sort_keys=True)), Job(method, options, []))
                job.cells.extend(missing)
    return list(jobs.values())


def evaluate(jobs: Sequence[Job], results: Results, engine_args: "EngineArgs", run_engine: RunEngine) -> None:
    """Runs ``jobs`` one after the other, and adds their cells to ``results`` as they are finished.

    Args:
        jobs: what :func:`plan` returned.
        results: keeps what is measured.
        engine_args: the arguments of all engines, without KV compression.
        run_engine: starts an engine and runs requests on it.

    Raises:
        EngineError: ``run_engine`` raised it; what was finished before is kept.
    """
    with tqdm(total=sum(job.num_tokens for job in jobs), unit=" tokens", unit_scale=True, smoothing=0.05) as bar:
        for number, job in enumerate(jobs, start=1):
            names = ", ".join(dict.fromkeys(cell.task.name for cell in job.cells))
            description = f"{number}/{len(jobs)} {job.method.label} ({names})"
            bar.set_description(f"{description}, starting an engine")
            _run_job(job, results, engine_args, run_engine, bar, description)


def _run_job(
    job: Job, results: Results, engine_args: "EngineArgs", run_engine: RunEngine, bar: tqdm, description: str
) -> None:
    engine_args = copy.copy(engine_args)
    apply_kv_compression(engine_args, job.method.name, job.options)
    of_cells = [cell.task.requests(cell.budget) for cell in job.cells]
    requests = [request for of_cell in of_cells for request in of_cell]
    owners = [(cell_index, place) for cell_index, of_cell in enumerate(of_cells) for place in range(len(of_cell))]
    answers: list[dict[int, EvalAnswer]] = [{} for _ in of_cells]  # for each cell, by the places of its requests
    finished_tokens = bar.n
    start = time.monotonic()
    for event in run_engine(engine_args, requests):
        match event:
            case EngineStarted():
                results.start_engine(job.method.label, event.configuration)
                startup_seconds, start = time.monotonic() - start, time.monotonic()
                bar.unpause()  # the start does not count in the rate
                bar.set_description(description)
            case Progress():
                bar.update(finished_tokens + event.tokens - bar.n)
            case RequestFinished():
                cell_index, place = owners[event.index]
                answers[cell_index][place] = event.answer
                finished_tokens += requests[event.index].most_tokens
                bar.update(max(0, finished_tokens - bar.n))
                if len(answers[cell_index]) == len(of_cells[cell_index]):
                    cell = job.cells[cell_index]
                    in_order = [answers[cell_index][place] for place in range(len(of_cells[cell_index]))]
                    results.add(cell.task, cell.method, cell.budget, cell.task.measure(in_order))
            case EngineFinished():
                seconds = round(time.monotonic() - start, 1)
                results.finish_engine(
                    startup_seconds=round(startup_seconds, 1), seconds=seconds, evicted_tokens=event.evicted_tokens
                )


def _check_budget(policy: Policy, request: EvalRequest, block_size: int) -> None:
    """Raises ValueError unless ``policy`` allows the budget of ``request``."""
    budget, prompt_tokens = request.kv_budget, len(request.token_ids)
    policy.request_limits({REQUEST_BUDGET_KEY: budget}, prompt_tokens, block_size)
    least = policy.min_budget(block_size)
    # Where a fraction gives fewer tokens than the least budget, the engine would take the least instead of refusing.
    if isinstance(budget, float) and (tokens := math.ceil(budget * prompt_tokens)) < least:
        window = f"window {policy.window}"
        if policy.prompt_share:
            window += f" + prompt_share {policy.prompt_share}"
        raise ValueError(
            f"{budget} of a prompt of {prompt_tokens} tokens is {tokens}, at least {least} are needed for "
            f"{window} + sinks {policy.sinks} + interval {policy.interval}: raise --fractions or --lengths"
        )
