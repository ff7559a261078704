"""The generated parts of README.md and docs/budget.md: results, plots, hits in the prefix cache, quality."""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence

from scripts.pages.markdown import NOT_MEASURED, number, table
from scripts.pages.results import File, Values, by_variant
from vllm_qfilters.commands.evaluation.methods import FULL
from vllm_qfilters.commands.evaluation.report import kind, loss_increase
from vllm_qfilters.commands.evaluation.results import Results
from vllm_qfilters.config import EVICTS, KVCompressionConfig
from vllm_qfilters.policy import resolve

COLUMNS = {"plain": "plain vLLM", "qfilters": "qfilters", "streaming": "StreamingLLM"}  # by variant
PREFIX_CACHE_PAGE = 16  # tokens: the block size of vLLM on GPUs
_COMPARED = ("qfilters", "qfilters:distinct_share=0.5", "streaming")
_TASKS = {  # what a task of `vllm-qfilters eval` is, with the tokens of its prompts
    "streaming": "{count} texts of {length} tokens",
    "prompt": "text after a prompt of {length} tokens",
    "passkey": "one number in {length} tokens",
    "kv": "one of several numbers in {length} tokens",
}
HISTORY = 30_000  # tokens of a conversation, as an example
_MISSING_ROWS = (
    "ms per step",
    "seconds to the first token",
    "requests per second",
    "loss above the full cache's",
    "hidden numbers found",
    "score of questions like RULER's",
    "long answers that turn in circles",
    "seconds to the next turn's first token",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table of results.

    Attributes:
        label: what was measured.
        values: by column, None where nothing was measured; a column that is left out has nothing to measure.
        shown: how a value is printed.
        most_is_best: whether the greatest value is printed in bold, and not the least.
    """

    label: str
    values: dict[str, float | None]
    shown: Callable[[float], str] = number
    most_is_best: bool = False

    def cells(self) -> list[str]:
        """The label and the values; the best ones are bold."""
        measured = {value for value in self.values.values() if value is not None}
        best = None
        if len({self.shown(value) for value in measured}) > 1:
            best = self.shown(max(measured) if self.most_is_best else min(measured))
        columns = self.values or dict.fromkeys(COLUMNS)
        return [self.label, *(self._cell(columns[column], best) if column in columns else "" for column in COLUMNS)]

    def _cell(self, value: float | None, best: str | None) -> str:
        if value is None:
            return NOT_MEASURED
        return f"**{best}**" if self.shown(value) == best else self.shown(value)


def parts(files: Sequence[File], all_files: Sequence[File]) -> dict[str, str]:
    """The generated parts of all pages by name, except for where their plots lie.

    Args:
        files: the results that README shows.
        all_files: all results.
    """
    return {
        "results": results(files),
        "prefix-cache": prefix_cache(),
        "quality": quality(all_files),
        "elastic": elastic(all_files),
    }


def plots(folder: pathlib.Path, link: str) -> str:
    """The two plots side by side; the files are drawn with the results."""
    titles = {"readme-loss": "loss against budget", "readme-decode": "milliseconds per step against context"}
    shown = [
        f'<img src="{link}/{name}.png" width="49%" alt="{title}">' if (folder / f"{name}.png").exists() else ""
        for name, title in titles.items()
    ]
    return "\n".join(filter(None, shown)) or f"Plots: {NOT_MEASURED}."


def results(files: Sequence[File]) -> str:
    """The table of one machine and one budget, and where it comes from."""
    budget = resolve(KVCompressionConfig()).budget
    assert isinstance(budget, int)
    rows = _case_rows(files, budget) + _quality_rows(files, budget) + _follow_up_rows(files)
    if not rows:
        rows = [Row(label, {}) for label in _MISSING_ROWS]
    models = {file.model for file in files}
    header = [", ".join([*sorted(models), f"budget {number(budget)}"]), *COLUMNS.values()]
    return "\n\n".join(filter(None, [table(header, [row.cells() for row in rows]), _origin(files)]))


def prefix_cache() -> str:
    """Where hits in the prefix cache end, asked of the limits of a request."""
    cuts = {budget: kept_cuts(KVCompressionConfig(budget=budget)) for budget in (1024, 2048, 4096, 8192)}
    policy = resolve(KVCompressionConfig(), block_size=PREFIX_CACHE_PAGE)
    first, then = [kept[0] for kept in cuts.values()], [kept[1] - kept[0] for kept in cuts.values()]
    lines = (
        "A prompt that goes on where one of the same budget ended starts at its last whole page: the answer and what",
        "is new are read. Prompts that part earlier start at the last kept cut before, or below the first. At budgets",
        f"of {_listed(cuts)} tokens the first cut is at {_listed(first)}, and then one every",
        f"{_listed(then)} tokens is kept (pages of {PREFIX_CACHE_PAGE}, `chunk` {number(policy.chunk)}).",
    )
    return "\n".join(lines)


def _listed(numbers: Iterable[int]) -> str:
    return " / ".join(map(number, numbers))


def kept_cuts(config: KVCompressionConfig) -> list[int]:
    """The positions of the cuts of a long prompt that stay in the prefix cache."""
    policy = resolve(config, block_size=PREFIX_CACHE_PAGE)
    limits = policy.request_limits(None, HISTORY, PREFIX_CACHE_PAGE)
    assert limits is not None and limits.first_prefill_cut is not None and limits.prefill_interval is not None
    cuts = range(limits.first_prefill_cut, HISTORY, limits.prefill_interval)
    return [cut for cut in cuts if limits.keeps_prefix(cut, PREFIX_CACHE_PAGE)]


def quality(files: Sequence[File]) -> str:
    """What Q-Filters and StreamingLLM cost in loss and in hidden numbers, model by model."""
    found = []
    for file in files:
        if file.is_quality:
            measured = Results(file.path, file.values["model"])
            for of_kind, unit in (("loss", "increase of the loss"), ("retrieval", "hidden numbers found")):
                tasks = [task for task in measured.tasks() if kind(measured, task) == of_kind]
                for kind_of_budget in (int, float):
                    found.append(_quality_table(measured, tasks, kind_of_budget, unit))
    return "\n\n".join(filter(None, found)) or NOT_MEASURED


def elastic(files: Sequence[File]) -> str:
    """Requests per second and preemptions of plain vLLM and of both values of ``evict``, cache by cache."""
    file = _case(files, "elastic")
    if file is None:
        return NOT_MEASURED
    rows = []
    for share in file.values["options"]["shares"]:
        variants = {kind: f"{kind}, cache {share:g}" for kind in ("plain", *EVICTS)}
        for key, label in (("requests_per_s", "requests per second"), ("preemptions", "preemptions")):
            cells = [number(value) for value in _medians(file, key, variants).values() if value is not None]
            rows.append([f"{label}, cache of {share:g} of the demand", *cells])
    return table(["", "plain vLLM", *(f"`{kind}`" for kind in EVICTS)], rows)


def _quality_table(measured: Results, tasks: Sequence[str], kind_of_budget: type, unit: str) -> str:
    """A row per task and method; budgets are all numbers of tokens or all fractions of the prompt."""
    tasks = [task for task in tasks if any(isinstance(budget, kind_of_budget) for budget in measured.budgets(task))]
    given = {b for task in tasks for b in measured.budgets(task) for m in _COMPARED if measured.get(task, m, b)}
    budgets = sorted(given)
    rows = [
        [
            f"{_name(measured, task)}{_of(measured, task)}, {method.replace(':', ' ')}",
            *(_quality_cell(measured, task, method, b) for b in budgets),
        ]
        for task in tasks
        for method in _COMPARED
        if method in measured.methods(task)
    ]
    if not rows:
        return ""
    header = [number(b) if kind_of_budget is int else f"{b:g} of the prompt" for b in budgets]
    return table([f"{pathlib.Path(measured.model).name}: {unit}", *header], rows)


def _of(measured: Results, task: str) -> str:
    full = measured.get(task, FULL, 0)
    is_retrieval = kind(measured, task) == "retrieval"
    return f" (full cache: {full['found']} of {full['trials']})" if is_retrieval and full is not None else ""


def _quality_cell(measured: Results, task: str, method: str, budget: float) -> str:
    cell, full = measured.get(task, method, budget), measured.get(task, FULL, 0)
    if cell is None or full is None:
        return ""
    if kind(measured, task) == "loss":
        return "{:.3f} ± {:.3f}".format(*loss_increase(cell, full))
    return str(cell["found"])


def _case(files: Sequence[File], name: str) -> File | None:
    return next((file for file in files if file.values.get("case") == name), None)


def _medians(file: File, key: str, variants: dict[str, str], context: int | None = None) -> dict[str, float | None]:
    """A number by column, the median of the rounds; with ``context`` the number there."""
    measured = by_variant(file.rounds)

    def median(variant: str) -> float | None:
        rounds = measured.get(variant)
        if not rounds:
            return None
        return statistics.median((n if context is None else n["contexts"][str(context)])[key] for n in rounds)

    return {column: median(variant) for column, variant in variants.items()}


def _case_rows(files: Sequence[File], budget: int) -> list[Row]:
    rows = []
    decode, throughput = _case(files, "decode"), _case(files, "throughput")
    if decode is not None:
        options = decode.values["options"]
        variants = {column: column if column == "plain" else f"{column} {budget}" for column in COLUMNS}
        for context in (max(options["contexts"]), min(options["contexts"])):
            label = f"ms per step, {options['sequences']} sequences of {number(context)} tokens"
            rows.append(Row(label, _medians(decode, "mean_step_ms", variants, context)))
        longest = max(options["contexts"])
        label = f"s to the first token, prompt of {number(longest)}"
        rows.append(Row(label, _medians(decode, "ttft_s", variants, longest)))
    if throughput is not None:
        options = throughput.values["options"]
        label = f"requests per second, cache of {options['cache']:.0%} of the demand"
        rows.append(Row(label, _medians(throughput, "requests_per_s", _same()), most_is_best=True))
    return rows


def _follow_up_rows(files: Sequence[File]) -> list[Row]:
    file = _case(files, "follow_up")
    if file is None:
        return []
    history = number(file.values["options"]["history"])
    rows = [
        Row(f"s to the next turn's first token, history of {history}", _medians(file, "second_ttft_s", _same())),
        Row(
            f"tokens read again, {number(file.values['options']['output_tokens'])} of the answer",
            _medians(file, "read_again_tokens", _same()),
        ),
    ]
    return [row for row in rows if any(value is not None for value in row.values.values())]


def _quality_rows(files: Sequence[File], budget: int) -> list[Row]:
    rows = []
    for file in files:
        if not file.is_quality:
            continue
        measured = Results(file.path, file.values["model"])
        for task in measured.tasks():
            full = measured.get(task, FULL, 0)
            cells = {"plain": full, **{m: _cell_at(measured, task, m, budget) for m in ("qfilters", "streaming")}}
            if full is not None:
                rows.append(_quality_row(kind(measured, task), measured.settings(task), cells, full))
    return rows


def _quality_row(of_kind: str, settings: Values, cells: dict[str, Values | None], full: Values) -> Row:
    def each(measure: Callable[[Values], float]) -> dict[str, float | None]:
        return {column: None if cell is None else measure(cell) for column, cell in cells.items()}

    if of_kind == "loss":
        label = "loss above the full cache's, nats per token"
        return Row(
            label,
            each(lambda cell: loss_increase(cell, full).mean),
            shown=lambda value: f"{value:.3f}" if value else "0",
        )
    if of_kind == "retrieval":
        label = f"hidden numbers found of {full['trials']}, prompts of {number(settings['length'])}"
        return Row(label, each(lambda cell: cell["found"]), most_is_best=True)
    if of_kind == "score":
        label = f"score of questions like RULER's, prompts of {number(settings['length'])}"
        return Row(label, each(lambda cell: cell["mean"]), shown=lambda value: f"{value:.2f}", most_is_best=True)
    label = f"answers of up to {number(settings['tokens'])} tokens that turn in circles, of {len(full['lengths'])}"
    return Row(label, each(lambda cell: cell["loops"]))


def _cell_at(measured: Results, task: str, method: str, budget: int) -> Values | None:
    """The cell of a budget in tokens, or of the fraction of the prompt that comes to as many."""
    length = measured.settings(task).get("length", 0)
    for given in measured.budgets(task):
        if (round(given * length) if isinstance(given, float) else given) == budget:
            return measured.get(task, method, given)
    return None


def _name(measured: Results, task: str) -> str:
    name, _, length = task.partition("-")
    settings = measured.settings(task)
    return _TASKS[name].format(length=length or number(settings["tokens"]), count=settings.get("sequences"))


def _same() -> dict[str, str]:
    return {column: column for column in COLUMNS}


def _origin(files: Sequence[File]) -> str:
    """Machine, versions, commit and rounds, and what is wrong with them."""
    if not files:
        return ""
    runs = [run for file in files for run in file.runs]

    def each(name: str) -> str:
        return " / ".join(dict.fromkeys(str(run.get(name, "unknown")) for run in runs))

    rounds = {len(file.rounds) for file in files if file.rounds}
    text = f"{each('cpu')} ({each('isa')}), vLLM {each('vllm')}, commit {each('commit')}.\n"
    if rounds:
        text += f"Speed: medians of {' / '.join(map(str, sorted(rounds)))} rounds, quality: one run. "
    remarks = dict.fromkeys(remark for file in files for remark in file.remarks)
    if len({run["commit"] for run in runs}) > 1:
        remarks["several commits"] = None
    warning = f" **{', '.join(remarks)}**" if remarks else ""
    return f"{text}The best of each row is bold, often within noise.{warning}"
