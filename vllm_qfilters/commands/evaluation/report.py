"""Makes tables of results, in plain text."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_qfilters.commands.evaluation.generations import bits_per_byte, more_repeats, repeated_by_third
from vllm_qfilters.commands.evaluation.methods import FULL
from vllm_qfilters.commands.evaluation.results import Results
from vllm_qfilters.commands.evaluation.statistics import Estimate, paired_increase, share

REFERENCE = "streaming"  # the method others are compared with

Cell = dict[str, Any]


def report(results: Results) -> str:
    """Returns the tables of every task."""
    return "\n\n".join(
        itertools.chain.from_iterable(_TABLES[kind(results, task)](results, task) for task in results.tasks())
    )


def kind(results: Results, task: str) -> str:
    """Returns what a task measures: loss, retrieval, score or generation."""
    settings = results.settings(task)
    by_setting = {"loss_from": "loss", "depths": "retrieval", "kinds": "score"}
    return next((kind for setting, kind in by_setting.items() if setting in settings), "generation")


def loss_increase(cell: Cell, over: Cell, text: str | None = None) -> Estimate:
    """Returns how much the loss of a cell exceeds that of another, in nats per token.

    The observations are pairs: blocks of the same tokens in both cells. The error takes blocks for independent, which
    neighbours are not quite, so it is somewhat too small.

    Args:
        text: counts the sequences of this text alone; by default those of all texts.
    """
    return paired_increase(_blocks(cell, text), _blocks(over, text))


def ratio_to_reference(results: Results, task: str, cell: Cell) -> float | None:
    """Returns the loss increase of a cell divided by that of ``REFERENCE`` at the same budget. It is None if the
    reference is not measured, or costs nothing.
    """
    full, reference = results.get(task, FULL, 0), results.get(task, REFERENCE, cell["budget"])
    if full is None or reference is None:
        return None
    increase = loss_increase(reference, full).mean
    return loss_increase(cell, full).mean / increase if increase > 0 else None


def score_loss(cell: Cell, full: Cell) -> Estimate:
    """Returns how much lower answers score than with the full cache; pairs are answers to the same question."""
    return paired_increase(full["scores"], cell["scores"])


def found(cell: Cell) -> Estimate:
    """Returns the share of the trials of a retrieval cell whose needle was found."""
    return share(cell["found"], cell["trials"])


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table whose first column is aligned to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    aligned = [
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, *aligned])


def _loss_tables(results: Results, task: str) -> Iterable[str]:
    full = results.get(task, FULL, 0)
    if full is None:
        return [f"{task}: the full cache is not measured yet"]
    budgets, methods = results.budgets(task), results.methods(task)
    texts = list(dict.fromkeys(full["texts"]))

    def increase(method: str, budget: int | float) -> str:
        cell = results.get(task, method, budget)
        if cell is None:
            return "-"
        mean, error = loss_increase(cell, full)
        ratio = ratio_to_reference(results, task, cell)
        return f"{mean:+.4f} ({error:.4f})" + (f" {ratio:5.2f}" if ratio is not None else "")

    def difference(method: str, budget: int | float) -> str:
        cell, reference = results.get(task, method, budget), results.get(task, REFERENCE, budget)
        return "-" if cell is None or reference is None else "{:+.4f} ({:.4f})".format(*loss_increase(cell, reference))

    def by_text(method: str, budget: int | float) -> list[str]:
        cell = results.get(task, method, budget)
        return (
            ["-"] * len(texts) if cell is None else [f"{loss_increase(cell, full, text).mean:+.4f}" for text in texts]
        )

    title = (
        f"{task}: full cache {full['loss']:.4f} nats per token (perplexity {math.exp(full['loss']):.3f}); "
        f"increase over it by budget (standard error), ratio to {REFERENCE}"
    )
    header = ["", *map(str, budgets)]
    tables = [table(title, header, [[method, *(increase(method, budget) for budget in budgets)] for method in methods])]
    others = [method for method in methods if method != REFERENCE]
    if REFERENCE in methods and others:
        rows = [[method, *(difference(method, budget) for budget in budgets)] for method in others]
        tables.append(table(f"{task}: difference to {REFERENCE} (paired standard error)", header, rows))
    if len(texts) > 1:
        for budget in budgets:
            rows = [[method, *by_text(method, budget)] for method in methods]
            tables.append(table(f"{task}, budget {budget}, increase by text", ["", *texts], rows))
    return tables


def _retrieval_tables(results: Results, task: str) -> Iterable[str]:
    budgets, full = results.budgets(task), results.get(task, FULL, 0)

    def accuracy(cell: Cell | None) -> str:
        return "-" if cell is None else "{:.2f} ({:.2f})".format(*found(cell))

    rows = [[m, *(accuracy(results.get(task, m, b)) for b in budgets)] for m in results.methods(task)]
    questions = _num_questions(results, task)
    title = f"{task}: share found of {questions} by budget (standard error); full cache {accuracy(full)}"
    return [table(title, ["", *map(str, budgets)], rows)]


def _score_tables(results: Results, task: str) -> Iterable[str]:
    budgets, methods, full = results.budgets(task), results.methods(task), results.get(task, FULL, 0)

    def score(cell: Cell | None) -> str:
        if cell is None:
            return "-"
        if full is None:
            return f"{cell['mean']:.3f}"
        lost, error = score_loss(cell, full)
        return f"{cell['mean']:.3f} {0 - lost:+.3f} ({error:.3f})"

    rows = [[method, *(score(results.get(task, method, budget)) for budget in budgets)] for method in methods]
    mean = "not measured" if full is None else f"{full['mean']:.3f}"
    questions = _num_questions(results, task)
    title = (
        f"{task}: mean score of {questions} questions by budget, over the full cache (paired standard error); "
        f"full cache {mean}"
    )
    tables = [table(title, ["", *map(str, budgets)], rows)]
    kinds = results.settings(task)["kinds"]
    if len(kinds) > 1:
        for budget in budgets:
            named = [(FULL, full), *((method, results.get(task, method, budget)) for method in methods)]
            rows = [[name, *(f"{cell['kinds'][kind]['mean']:.3f}" for kind in kinds)] for name, cell in named if cell]
            tables.append(table(f"{task}, budget {budget}, score by kind", ["", *kinds], rows))
    return tables


def _num_questions(results: Results, task: str) -> int:
    """That every cell of a task was asked."""
    return int(results.cells(task)[0]["trials"])


def _generation_tables(results: Results, task: str) -> Iterable[str]:
    def numbers(cell: Cell | None) -> str:
        if cell is None:
            return "-"
        count = len(cell["lengths"])
        repeated, length = statistics.fmean(cell["repeated_4grams"]), statistics.fmean(cell["lengths"])
        loops = f"{cell['loops']}/{count}" if "loops" in cell else "-"  # earlier cells lack it
        return f"{repeated:.3f} {cell['finished']}/{count} {length:.0f} {loops}"

    budgets, methods, full = results.budgets(task), results.methods(task), results.get(task, FULL, 0)
    rows = [[m, *(numbers(results.get(task, m, b)) for b in budgets)] for m in methods]
    title = f"{task}: share of repeated 4-grams, ended by themselves, mean length, loops; full cache {numbers(full)}"
    tables = [table(title, ["", *map(str, budgets)], rows)]
    cells = [(m, b, results.get(task, m, b)) for m in methods for b in budgets]
    named = [(FULL, full), *((f"{m} {b}", cell) for m, b, cell in cells)]
    by_third = [
        [
            name,
            *("{:.3f} ({:.3f})".format(*third) for third in repeated_by_third(cell)),
            "-" if full is None else "{:+.3f} ({:.3f})".format(*more_repeats(cell, full)),
            f"{statistics.fmean(cell['distinct_last_third']):.3f}",
            "-" if (bits := bits_per_byte(cell)) is None else "{:.2f} ({:.2f})".format(*bits),
        ]
        for name, cell in named
        if cell and "repeated_4grams_thirds" in cell  # earlier cells lack it
    ]
    if by_third:
        title = f"{task}: share of 4-grams that repeat within each third (standard error)"
        header = [
            "",
            "first",
            "second",
            "last",
            "last over full (paired)",
            "different tokens in the last",
            "bits per byte of it",
        ]
        tables.append(table(title, header, by_third))
    return tables


_TABLES = {
    "loss": _loss_tables,
    "retrieval": _retrieval_tables,
    "score": _score_tables,
    "generation": _generation_tables,
}


def _blocks(cell: Cell, text: str | None) -> list[float]:
    chosen = (blocks for name, blocks in zip(cell["texts"], cell["block_losses"], strict=True) if text in (None, name))
    return list(itertools.chain.from_iterable(chosen))
