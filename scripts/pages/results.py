"""The page docs/results.md: every file of benchmarks/results/ as tables, with its machine and its commit."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.__main__ import CASES
from scripts.pages.markdown import number, plain_table, table, without_folders
from vllm_qfilters.commands.evaluation.generations import bits_per_byte, more_repeats, repeated_by_third
from vllm_qfilters.commands.evaluation.methods import FULL
from vllm_qfilters.commands.evaluation.report import kind, loss_increase, ratio_to_reference, score_loss
from vllm_qfilters.commands.evaluation.results import Results

Values = dict[str, Any]

HEAD = """# Everything measured

Every section below is one file of `benchmarks/results/`, and `scripts/make_docs.py` made the page from these files.
Numbers of several rounds are the median, with the least and the greatest in brackets. A *single round* says nothing of
how far a number drifts on a shared machine, and *uncommitted changes* mean that the commit alone does not give the
program that was measured. No file comes from a GPU: no GPU has run this package yet.
"""
_LOAD = "load and faults on a real server: `scripts/load_test.py`"
_PROVENANCE = ("date", "gpu", "cpu", "isa", "commit", "command")
_DIRTY = "+changes"


@dataclasses.dataclass(frozen=True)
class File:
    """A file of results.

    Attributes:
        path: of the file.
        values: what it holds.
    """

    path: pathlib.Path
    values: Values

    @property
    def is_quality(self) -> bool:
        """The file holds cells of ``vllm-qfilters eval``."""
        return "cells" in self.values

    @property
    def model(self) -> str:
        """The name of the model that was measured, without its folder."""
        return pathlib.Path((self.values.get("options") or self.values)["model"]).name

    @property
    def runs(self) -> list[Values]:
        """Machine, versions, commit and command of every run that wrote into the file."""
        if self.is_quality:
            return self.values["runs"]
        return [self.values["run"] if "run" in self.values else self.values["machine"]]

    @property
    def rounds(self) -> list[dict[str, Values]]:
        """The numbers of a benchmark by variant, one mapping per round; empty for files that know no rounds."""
        return self.values.get("rounds", [])

    @property
    def summary(self) -> str:
        if self.is_quality:
            return f"what compression costs in quality, {self.model}: `vllm-qfilters eval`"
        case = self.values.get("case", self.path.stem)
        return f"{CASES[case]}: `python -m benchmarks {case}`" if case in CASES else _LOAD

    @property
    def remarks(self) -> list[str]:
        """What a reader has to know before taking a number from the file."""
        remarks = []
        if self.values.get("dry_run"):
            remarks.append("dry run: the numbers mean nothing")
        if any(str(run["commit"]).endswith(_DIRTY) for run in self.runs):
            remarks.append("uncommitted changes")
        if len(self.rounds) == 1:
            remarks.append("a single round")
        if len({run["commit"] for run in self.runs}) > 1:
            remarks.append("several commits")
        return remarks


def read(folder: pathlib.Path, pattern: str = "*.json") -> list[File]:
    """The files of results in a folder, by name."""
    return [File(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob(pattern))]


def page(files: Sequence[File], plots: str) -> str:
    """The whole page.

    Args:
        files: of :func:`read`.
        plots: the folder of the results, as the page links to it.
    """
    index = plain_table(
        ["file", "measured", "machine", "commit", "remarks"],
        [
            [f"[{file.path.name}](#{anchor(file)})", file.summary, *_machine_and_commit(file), _listed(file.remarks)]
            for file in files
        ],
    )
    return "\n\n".join([HEAD.rstrip(), index, *(_section(file, plots) for file in files)]) + "\n"


def by_variant(rounds: Iterable[Mapping[str, Values]]) -> dict[str, list[Values]]:
    """The numbers of all rounds by variant; a variant may be missing from a round."""
    found: dict[str, list[Values]] = {}
    for of_round in rounds:
        for variant, numbers in of_round.items():
            found.setdefault(variant, []).append(numbers)
    return found


def spread(values: Sequence[float]) -> str:
    """The median, with the least and the greatest of several values."""
    text = number(statistics.median(values))
    return text if len(values) == 1 else f"{text} ({number(min(values))} to {number(max(values))})"


def anchor(file: File) -> str:
    return "".join(letter for letter in file.path.name.lower() if letter.isalnum() or letter in "-_")


def _machine_and_commit(file: File) -> tuple[str, str]:
    machines = dict.fromkeys(run.get("gpu") or run["cpu"] for run in file.runs)
    commits = dict.fromkeys(str(run["commit"]).removesuffix(_DIRTY) for run in file.runs)
    return _listed(list(machines), "; "), _listed(list(commits))


def _listed(texts: Sequence[str], separator: str = ", ") -> str:
    return separator.join(texts)


def _section(file: File, plots: str) -> str:
    parts = [f"## {file.path.name}", f"{file.summary[0].upper()}{file.summary[1:]}.", _provenance(file)]
    if file.remarks:
        parts.insert(2, f"**{_listed(file.remarks)}**")
    if file.is_quality:
        parts += _quality(file)
    elif file.rounds:
        parts += _rounds(file)
    else:
        parts += _mappings(file)
    for plot in sorted(file.path.parent.glob(f"{file.path.stem}*.png")):
        if plot.stem == file.path.stem or (file.is_quality and plot.stem.startswith(f"{file.path.stem}-")):
            parts.append(f"![{plot.stem}]({plots}/{plot.name})")
    return "\n\n".join(parts)


def _provenance(file: File) -> str:
    shown = [name for name in _PROVENANCE if any(run.get(name) for run in file.runs)]
    rows = []
    for index, run in enumerate(file.runs):
        versions = [f"{name} {run[name]}" for name in ("vllm", "torch", "transformers", "python") if run.get(name)]
        cells = [_code(run.get(name), name) for name in shown]
        rows.append([str(index), *cells, _listed(versions)])
    text = plain_table(["run", *shown, "versions"], rows)
    options = file.values.get("options") or file.values.get("load")
    return text if options is None else f"{text}\n\nOptions: {_settings(options)}"


def _settings(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} `{without_folders(_short(value))}`" for key, value in options.items() if value != {})


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _code(value: Any, name: str) -> str:
    if value is None:
        return "unknown"
    return f"`{without_folders(str(value))}`" if name in ("command", "commit") else str(value)


def _rounds(file: File) -> list[str]:
    variants = by_variant(file.rounds)
    parts = [f"{_counted(len(file.rounds), 'round')}."]
    scalars = [key for key, value in next(iter(variants.values()))[0].items() if _is_number(value)]
    rows = [
        [variant, *(spread([numbers[key] for numbers in rounds]) for key in scalars)]
        for variant, rounds in variants.items()
    ]
    parts.append(table(["", *map(_words, scalars)], rows))
    parts += _by_context(variants)
    if file.values.get("ratios") and file.values["ratios"][0]:
        ratios = [
            [name, spread([of_round[name] for of_round in file.values["ratios"]])] for name in file.values["ratios"][0]
        ]
        parts.append(table(["ratio, made round by round", ""], ratios))
    return parts


def _by_context(variants: Mapping[str, Sequence[Values]]) -> list[str]:
    """A table per quantity, where a benchmark ran several contexts."""
    measured = {
        variant: [n["contexts"] for n in rounds] for variant, rounds in variants.items() if "contexts" in rounds[0]
    }
    contexts = list(dict.fromkeys(context for rounds in measured.values() for context in rounds[0]))
    if len(contexts) < 2:
        return []
    quantities = next(iter(next(iter(measured.values()))[0].values()))
    parts = []
    for quantity in ("mean_step_ms", "alone_mean_step_ms", "ttft_s", "prefill_s", "pages_per_sequence"):
        if quantity in quantities:
            rows = [
                [variant, *(spread([r[c][quantity] for r in rounds]) if c in rounds[0] else "" for c in contexts)]
                for variant, rounds in measured.items()
            ]
            parts.append(table([f"{_words(quantity)}, by context", *(number(int(c)) for c in contexts)], rows))
    return parts


def _mappings(file: File) -> list[str]:
    """Files without rounds: numbers, and tables of numbers."""
    known = {"run", "machine", "load", "options", "case", "dry_run", "server"}
    parts, single = [], []
    for name, value in file.values.items():
        if name in known:
            continue
        if isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
            columns = list(dict.fromkeys(column for row in value.values() for column in row))
            rows = [[title, *(number(row.get(column, "")) for column in columns)] for title, row in value.items()]
            parts.append(table([_words(name), *map(_words, columns)], rows))
        elif isinstance(value, dict):
            parts.append(table([_words(name), ""], [[title, number(n)] for title, n in value.items()]))
        elif isinstance(value, list) and value and all(isinstance(sample, dict) for sample in value):
            columns = list(value[0])
            rows = [[number(sample[column]) for column in columns] for sample in value]
            parts.append(table([f"{_words(name)}: {columns[0]}", *columns[1:]], rows))
        elif isinstance(value, list):
            single.append([_words(name), str(len(value))])
        else:
            single.append([_words(name), number(value)])
    return [*parts, table(["", ""], single)] if single else parts


def _quality(file: File) -> list[str]:
    results = Results(file.path, file.values["model"])
    tables = {"loss": _loss, "retrieval": _retrieval, "score": _scores, "generation": _generation}
    return [text for task in results.tasks() for text in tables[kind(results, task)](file, results, task)]


def _cells(file: File, results: Results, task: str, head: str, shown: Any) -> str:
    """A row per method and a column per budget, and which runs the cells of a row come from."""
    budgets = results.budgets(task)
    rows = []
    for method in results.methods(task):
        cells = [results.get(task, method, budget) for budget in budgets]
        measured = [cell for cell in cells if cell is not None]
        runs = sorted({file.values["engines"][cell["engine"]]["run"] for cell in measured})
        rows.append([method, *("" if cell is None else shown(cell) for cell in cells), _listed([str(r) for r in runs])])
    return table([head, *map(_budget, budgets), "runs"], rows)


def _loss(file: File, results: Results, task: str) -> list[str]:
    full = results.get(task, FULL, 0)
    settings = results.settings(task)
    title = (
        f"**{task}**: {settings['sequences']} sequences of {number(settings['tokens'])} tokens, cut after every "
        f"{number(settings['chunk'])}; loss of the tokens from {number(settings['loss_from'])} on."
    )
    if full is None:
        return [title, "The full cache is not measured."]

    def shown(cell: Values) -> str:
        mean, error = loss_increase(cell, full)
        ratio = ratio_to_reference(results, task, cell)
        return f"{mean:.3f} ± {error:.3f}" + ("" if ratio is None else f"; {ratio:.2f}")

    title += (
        f" Full cache: {full['loss']:.3f} nats per token. The table has the increase over it by budget, ± its standard "
        "error; behind it the ratio to `streaming`."
    )
    return [title, _cells(file, results, task, "nats per token", shown)]


def _retrieval(file: File, results: Results, task: str) -> list[str]:
    full, settings = results.get(task, FULL, 0), results.settings(task)
    title = (
        f"**{task}**: numbers hidden in prompts of {number(settings['length'])} tokens, "
        f"{settings['trials_per_depth']} at each of {len(settings['depths'])} depths; found of those, by budget."
    )
    title += "" if full is None else f" Full cache: {full['found']} of {full['trials']}."
    return [title, _cells(file, results, task, "found", lambda cell: f"{cell['found']} of {cell['trials']}")]


_SCORED = {
    "ruler": "questions about prompts of {length} tokens, of the kinds of RULER; share found of what is asked for",
    "copy": "a table or code, with its prompt {length} tokens long, written out with one change; share of the lines "
    "that are right",
    "recall": "a number stated {distance} tokens before its question, in text that is cut after every {chunk}; share "
    "found",
}


def _scores(file: File, results: Results, task: str) -> list[str]:
    full, settings = results.get(task, FULL, 0), results.settings(task)
    kinds = settings["kinds"]
    what = _SCORED[task.partition("-")[0]].format(
        **{key: number(value) for key, value in settings.items() if isinstance(value, int)}
    )
    title = f"**{task}**: {what}. {_counted(settings['repeats'], 'prompt')} of each kind, ± standard error."
    title += "" if full is None else f" Full cache: {_mean(full)}."

    def shown(cell: Values) -> str:
        lost = "" if full is None else "; {:.3f} ± {:.3f}".format(*score_loss(cell, full))
        return f"{cell['mean']:.3f}{lost}"

    parts = [title, _cells(file, results, task, "score; lost to the full cache", shown)]
    if len(kinds) > 1:
        for budget in results.budgets(task):
            cells = [(FULL, full), *((m, results.get(task, m, budget)) for m in results.methods(task))]
            rows = [[name, *(_mean(cell["kinds"][kind]) for kind in kinds)] for name, cell in cells if cell]
            parts.append(table([f"by kind, {_budget(budget)}", *kinds], rows))
    return parts


def _mean(measured: Values) -> str:
    return f"{measured['mean']:.2f}" + ("" if measured["error"] is None else f" ± {measured['error']:.2f}")


def _budget(budget: int | float) -> str:
    return number(budget) if isinstance(budget, int) else f"{budget:g} of it"


def _generation(file: File, results: Results, task: str) -> list[str]:
    full, settings = results.get(task, FULL, 0), results.settings(task)

    def shown(cell: Values) -> str:
        repeated, length = statistics.fmean(cell["repeated_4grams"]), statistics.fmean(cell["lengths"])
        return f"{repeated:.3f}; {cell['finished']} of {len(cell['lengths'])}; {length:.0f}"

    title = (
        f"**{task}**: {settings['prompts']} prompts, at most {number(settings['tokens'])} tokens generated; share of "
        "the 4-grams that occurred before, texts that ended by themselves, mean length."
    )
    title += "" if full is None else f" Full cache: {shown(full)}."
    parts = [title, _cells(file, results, task, "by budget", shown)]
    cells = [(m, b, results.get(task, m, b)) for m in results.methods(task) for b in results.budgets(task)]
    named = [("full", full), *((f"{m}, {_budget(b)}", cell) for m, b, cell in cells)]
    rows = [
        [
            name,
            *("{:.3f} ± {:.3f}".format(*third) for third in repeated_by_third(cell)),
            "" if full is None or cell is full else "{:.3f} ± {:.3f}".format(*more_repeats(cell, full)),
            f"{cell['loops']} of {len(cell['lengths'])}",
            f"{statistics.fmean(cell['distinct_last_third']):.3f}",
            "" if (bits := bits_per_byte(cell)) is None else "{:.2f} ± {:.2f}".format(*bits),
        ]
        for name, cell in named
        if cell and "repeated_4grams_thirds" in cell
    ]
    header = ["4-grams that repeat within a third", "first", "second", "last", "last over full, paired"]
    return (
        [*parts, table([*header, "loops", "different tokens in the last", "bits per byte of it"], rows)]
        if rows
        else parts
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _words(name: str) -> str:
    return name.replace("_", " ")
