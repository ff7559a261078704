"""Draws plots of results as PNG files beside the file of results. Needs matplotlib."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import colormaps, pyplot
from matplotlib.figure import Figure

from vllm_qfilters.commands.evaluation.methods import FULL
from vllm_qfilters.commands.evaluation.report import kind, loss_increase
from vllm_qfilters.commands.evaluation.results import Results
from vllm_qfilters.commands.evaluation.statistics import Estimate


def draw(results: Results) -> list[pathlib.Path]:
    """Draws a plot of each kind that there are measurements for, and returns the files."""
    plots = {"loss": _draw_loss, "retrieval": _draw_retrieval, "score": _draw_scores}
    tasks = {name: [task for task in results.tasks() if kind(results, task) == name] for name in plots}
    tasks["loss"] = [task for task in tasks["loss"] if results.get(task, FULL, 0) is not None]
    paths = []
    for name, plot in plots.items():
        if any(results.methods(task) for task in tasks[name]):
            figure = plot(results, [task for task in tasks[name] if results.methods(task)])
            paths.append(results.path.with_name(f"{results.path.stem}-{name}.png"))
            figure.savefig(paths[-1], dpi=120)
            pyplot.close(figure)
    return paths


def _draw_loss(results: Results, tasks: list[str]) -> Figure:
    """Draws the loss increase against the budget, with a panel per task and a line per method."""

    def increase(cell: dict[str, Any], full: dict[str, Any] | None) -> Estimate:
        assert full is not None, "draw() chooses tasks whose full cache is measured"
        return loss_increase(cell, full)

    figure, panels = _draw_lines(results, tasks, increase, "loss increase over the full cache (nats per token)")
    for panel in panels:
        panel.axhline(0, color="black", linewidth=0.8)
    return figure


def _draw_scores(results: Results, tasks: list[str]) -> Figure:
    """Draws the mean score against the budget, likewise; a black line is the full cache."""

    def score(cell: dict[str, Any], full: dict[str, Any] | None) -> Estimate:
        return Estimate(cell["mean"], cell["error"] or 0.0)

    figure, panels = _draw_lines(results, tasks, score, "mean score")
    for panel, task in zip(panels, tasks, strict=True):
        full = results.get(task, FULL, 0)
        if full is not None:
            panel.axhline(full["mean"], color="black", linewidth=0.8)
        panel.set_ylim(-0.02, 1.02)
    return figure


def _draw_lines(
    results: Results,
    tasks: list[str],
    measured: Callable[[dict[str, Any], dict[str, Any] | None], Estimate],
    label: str,
) -> tuple[Figure, Any]:
    """Draws what is measured of a cell, given that of the full cache, against the budget: a panel per task and a line
    per method. Returns the panels too.
    """
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(6.5 * len(tasks) + 3.5, 5), squeeze=False, layout="constrained"
    )
    colors, lines = _colors(results, tasks), {}
    for panel, task in zip(panels[0], tasks, strict=True):
        full = results.get(task, FULL, 0)
        for method in results.methods(task):
            cells = [
                cell for budget in results.budgets(task) if (cell := results.get(task, method, budget)) is not None
            ]
            means, errors = zip(*(measured(cell, full) for cell in cells), strict=True)
            x = [cell["budget"] for cell in cells]
            lines[method] = panel.errorbar(x, means, yerr=errors, color=colors[method], marker="o", capsize=3)
        budgets = results.budgets(task)
        panel.set_xscale("log", base=2)
        panel.set_xticks(budgets, [str(budget) for budget in budgets])
        panel.minorticks_off()
        panel.set_title(task)
        panel.set_xlabel("budget (fraction of the prompt)" if isinstance(budgets[0], float) else "budget (tokens)")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    figure.legend(list(lines.values()), list(lines), loc="outside right upper", fontsize="small")
    figure.suptitle(_model_name(results))
    return figure, panels[0]


def _draw_retrieval(results: Results, tasks: list[str]) -> Figure:
    """Draws the share found by depth and budget, with a row of heat maps per task and one map per method."""
    columns = list(_colors(results, tasks))
    size = (2.6 * len(columns) + 1.5, 2.4 * len(tasks) + 0.8)
    figure, panels = pyplot.subplots(len(tasks), len(columns), figsize=size, squeeze=False, layout="constrained")
    for row, task in zip(panels, tasks, strict=True):
        depths = results.settings(task)["depths"]
        budgets = [0, *reversed(results.budgets(task))]
        for panel, method in zip(row, columns, strict=True):
            cells = [results.get(task, FULL if budget == 0 else method, budget) for budget in budgets]
            shares = [list(_shares_by_depth(cell, len(depths))) for cell in cells]
            image = panel.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            labels = ["full" if budget == 0 else f"{budget:g}" for budget in budgets]
            panel.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize="x-small")
            panel.set_yticks(range(len(budgets)), labels, fontsize="x-small")
            panel.set_title(method.replace(":", ":\n", 1).replace(",", ",\n"), fontsize="x-small")
        row[0].set_ylabel(f"{task}\nbudget (fraction of the prompt)", fontsize="small")
    figure.supxlabel("depth", fontsize="small")
    figure.colorbar(image, ax=panels, label="share found")
    figure.suptitle(_model_name(results))
    return figure


def _shares_by_depth(cell: dict[str, Any] | None, num_depths: int) -> Iterator[float]:
    if cell is None:
        yield from [float("nan")] * num_depths
    else:
        yield from (depth["found"] / depth["trials"] for depth in cell["depths"])


def _colors(results: Results, tasks: list[str]) -> dict[str, tuple[float, ...]]:
    """Returns a color for every method that one of ``tasks`` was measured with."""
    methods = dict.fromkeys(method for task in tasks for method in results.methods(task))
    colormap = colormaps["tab20"]
    return {method: colormap(index % colormap.N) for index, method in enumerate(methods)}


def _model_name(results: Results) -> str:
    return pathlib.PurePath(results.model).name
