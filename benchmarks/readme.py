"""Measures what README's table and plots are made from, all of one clean commit on one machine.

    python -m benchmarks readme models/SmolLM2-135M-Instruct [--rounds 3] [--only decode follow_up]
    python -m benchmarks readme models/SmolLM2-135M-Instruct --plots

The parts run one after the other: the cases decode, throughput and follow_up, ``--rounds`` times each, and the tasks
of ``vllm-qfilters eval``, which have as many observations as they have texts and prompts. What is finished waits in
build/, where git does not see it, so that the tree stays clean: the same command goes on after an interruption, and
measures again what another commit or another machine had finished. Once no part is missing, the files are copied to
benchmarks/results/, so that all are of one commit, and the plots are drawn from them.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.case import RESULTS, ROOT, by_variant, check_output
from vllm_qfilters import cpu
from vllm_qfilters.commands.evaluation.environment import describe_run
from vllm_qfilters.commands.evaluation.methods import FULL
from vllm_qfilters.commands.evaluation.report import loss_increase
from vllm_qfilters.commands.evaluation.results import Results

STAGED = ROOT / "build" / "readme"  # git ignores build/
BUDGET = 2048  # tokens: the default
QUALITY = "readme-quality.json"
CHANGES = "+changes"  # ends the name of a commit whose tree has changes
PLOT_INCHES, PLOT_DPI = (7, 4), 200  # at 700 pixels of width 1 pt of text is 1.4 pixels

SIZES = {
    # As many steps as tokens are evicted in one go: every sequence is compacted once while steps are timed.
    "decode": f"--budget {BUDGET} --contexts 1024 4096 7000 --sequences 4 --steps 128 --no-limit",
    # An eighth of the demand, and the page that vLLM keeps for itself: plain vLLM holds two sequences of 48 pages to
    # their ends. Of half as many requests a single page decides how many run at once.
    "throughput": f"--budget {BUDGET} --requests 16 --prompt 6000 --output-tokens 144 --cache 0.13",
    "follow_up": f"--budget {BUDGET} --history 6000 --message 200 --conversations 1",
    "loss": "--tasks streaming --sequences 4 --tokens 7168 --loss-from 3072 --budgets 512 1024 2048",
    # The fractions make a budget of 2,048 tokens.
    "needles": "--tasks passkey --lengths 8000 --fractions 0.256 --trials 2",
    "ruler": "--tasks ruler --lengths 8000 --fractions 0.256 --repeats 4",
    # The code among the texts is too short for its share of 12 contexts.
    "generation": (
        f"--tasks generation --text prose technical --budgets {BUDGET} --generations 12 --generation-context 5800 "
        "--generation-tokens 1200 --generation-temperature 1.0"
    ),
}
DRY_RUN_SIZES = {
    "decode": "--budget 256 --contexts 300 500 --sequences 2 --steps 8 --no-limit",
    "throughput": "--budget 256 --requests 4 --prompt 600 --output-tokens 20 --cache 0.8",
    "follow_up": "--budget 256 --history 600 --message 100 --output-tokens 20 --conversations 1",
    "loss": "--tasks streaming --sequences 1 --tokens 512 --loss-from 256 --budgets 128 256",
    "needles": "--tasks passkey --lengths 500 --fractions 0.256 --trials 1 --depths 0.5",
    "ruler": "--tasks ruler --lengths 500 --fractions 0.256 --repeats 1 --ruler single",
    "generation": (
        "--tasks generation --budgets 128 --generations 2 --generation-context 200 --generation-tokens 40 "
        "--generation-temperature 1.0"
    ),
}
CASES = ("decode", "throughput", "follow_up")
# The full cache of all texts that are generated fits at once.
EVAL_OPTIONS = "--methods qfilters streaming --no-plots --kv-cache-memory-bytes 3221225472"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part is a command that measures, and the name of its file of results, which several parts may share."""

    name: str
    file: str
    command: list[str]


def make_parts(arguments: argparse.Namespace, staged: pathlib.Path) -> list[Part]:
    """Makes all parts, in the order they run, with their files in the folder ``staged``."""
    found, dry_run = [], ["--dry-run"] if arguments.dry_run else []
    for name, sizes in (DRY_RUN_SIZES if arguments.dry_run else SIZES).items():
        if name in CASES:
            file, program = f"readme-{name.replace('_', '-')}.json", [sys.executable, "-m", "benchmarks", name]
            options = ["--rounds", str(arguments.rounds), *dry_run]
        else:
            file, program = QUALITY, [str(pathlib.Path(sys.executable).with_name("vllm-qfilters")), "eval"]
            options = ["--dtype", cpu.fast_dtype(), *EVAL_OPTIONS.split()]
        command = [
            *program,
            arguments.model,
            *sizes.split(),
            *options,
            "--output",
            os.path.relpath(staged / file, ROOT),
        ]
        found.append(Part(name, file, command))
    return found


class Progress:
    """Says which parts are finished, in a file beside theirs.

    All that is there is deleted where it was measured of another commit, on another machine, of another model or in
    other rounds, the part that was interrupted as well: a file of results has one origin.

    Args:
        folder: the files of results are there.
        origin: what all files of results must have in common; None: nothing that is there counts.
    """

    def __init__(self, folder: pathlib.Path, origin: Mapping[str, Any] | None) -> None:
        self._folder, self._path = folder, folder / "finished.json"
        self._origin, self._files = origin, {}  # by part that is finished
        before = json.loads(self._path.read_text()) if self._path.exists() else {"origin": None, "files": {}}
        if origin is not None and before["origin"] == origin:
            self._files = {part: file for part, file in before["files"].items() if (folder / file).exists()}
        elif folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def is_finished(self, part: Part) -> bool:
        return part.name in self._files

    def finish(self, part: Part) -> None:
        self._files[part.name] = part.file
        self._write()

    def discard(self, part: Part) -> None:
        """Deletes the file of a part, and with it the other parts that it holds."""
        (self._folder / part.file).unlink(missing_ok=True)
        self._files = {name: file for name, file in self._files.items() if file != part.file}
        self._write()

    def _write(self) -> None:
        self._path.write_text(json.dumps({"origin": self._origin, "files": self._files}, indent=2) + "\n")


def run_parts(parts: Sequence[Part], progress: Progress, commit: str | None) -> int:
    """Runs the parts that are not finished, one after the other.

    Args:
        parts: in their order.
        progress: of these parts.
        commit: as the results name it; a part during which it became another is discarded.

    Returns:
        The exit status of the first part that fails, or 0.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
    start = time.monotonic()
    for number, part in enumerate(parts, start=1):
        minutes = (time.monotonic() - start) / 60
        shown = f"part {number} of {len(parts)}, {part.name}, after {minutes:.0f} minutes"
        if progress.is_finished(part):
            print(f"{shown}: finished before", file=sys.stderr)
            continue
        print(f"{shown}: {shlex.join(part.command)}", file=sys.stderr, flush=True)
        status = subprocess.run(part.command, cwd=ROOT, env=environment).returncode
        if describe_run()["commit"] != commit:
            progress.discard(part)
            print(f"the tree changed while {part.name} was measured: its results are discarded", file=sys.stderr)
            return status or 1
        if status:
            print(f"{part.name} failed; the same command goes on with it", file=sys.stderr)
            return status
        progress.finish(part)
    print(f"all {len(parts)} parts after {(time.monotonic() - start) / 60:.0f} minutes", file=sys.stderr)
    return 0


def draw_plots(folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws README's plots from the files of results in ``folder``, where there are any, beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plots = {
        "readme-loss": (QUALITY, draw_loss),
        "readme-decode": ("readme-decode.json", draw_decode),
    }
    paths = []
    for name, (file, draw) in plots.items():
        if (folder / file).exists():
            with pyplot.rc_context({"font.size": 11, "lines.linewidth": 2, "lines.markersize": 7}):
                figure, panel = pyplot.subplots(figsize=PLOT_INCHES, layout="constrained")
                draw(panel, folder / file)
                panel.grid(alpha=0.3)
                panel.legend()
                paths.append(folder / f"{name}.png")
                figure.savefig(
                    paths[-1], dpi=PLOT_DPI, metadata={"Software": None}
                )  # the same bytes from the same file
                pyplot.close(figure)
    return paths


def draw_loss(panel: Any, path: pathlib.Path) -> None:
    """Draws loss against budget: the full cache is a line, the bars are standard errors of the increase over it."""
    values = json.loads(path.read_text())
    results = Results(path, values["model"])
    full, budgets = results.get("streaming", FULL, 0), results.budgets("streaming")
    tokens, loss_from = (results.settings("streaming")[name] for name in ("tokens", "loss_from"))
    panel.axhline(full["loss"], color="black", linestyle="--", label="full cache (plain vLLM)")
    for method in results.methods("streaming"):
        cells = [results.get("streaming", method, budget) for budget in budgets]
        errors = [loss_increase(cell, full).error for cell in cells]
        losses = [cell["loss"] for cell in cells]
        panel.errorbar(budgets, losses, yerr=errors, color=_color(method), marker="o", capsize=4, label=_label(method))
    panel.set_xscale("log", base=2)
    panel.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    panel.minorticks_off()
    panel.set_xlabel("budget (tokens)")
    panel.set_ylabel("loss (nats per token)")
    panel.set_title(f"Loss of tokens {loss_from:,} to {tokens:,} of a text")


def draw_decode(panel: Any, path: pathlib.Path) -> None:
    """Draws milliseconds per decode step against context: medians of the rounds, the bars reach from least to most."""
    result = json.loads(path.read_text())
    for variant, rounds in by_variant(result["rounds"]).items():
        contexts = list(rounds[0]["contexts"])
        steps = [[numbers["contexts"][context]["mean_step_ms"] for numbers in rounds] for context in contexts]
        medians = [statistics.median(of_context) for of_context in steps]
        reach = [
            [median - min(of_context) for median, of_context in zip(medians, steps, strict=True)],
            [max(of_context) - median for median, of_context in zip(medians, steps, strict=True)],
        ]
        method, _, budget = variant.partition(" ")
        label = _label(method) + (f", budget {int(budget):,}" if budget else "")
        x = [int(context) for context in contexts]
        panel.errorbar(x, medians, yerr=reach, color=_color(method), marker="o", capsize=4, label=label)
    panel.set_xticks(x, [f"{context:,}" for context in x])
    panel.set_ylim(bottom=0)
    panel.set_xlabel("context (tokens)")
    panel.set_ylabel("ms per decode step")
    panel.set_title(f"Decode step of {result['options']['sequences']} sequences")


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("--rounds", type=int, default=3, help="of decode, throughput and follow_up; default 3")
    parser.add_argument("--only", nargs="+", default=list(SIZES), choices=SIZES, metavar="PART", help=", ".join(SIZES))
    parser.add_argument("--plots", action="store_true", help="measure nothing, draw from the files that are there")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="folder; default benchmarks/results")
    parser.add_argument("--allow-dirty", action="store_true", help="measure a tree with changes, and all of it again")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, whose numbers mean nothing")
    arguments = parser.parse_args()
    check_output(parser, arguments)
    if not arguments.plots:
        status = measure(parser, arguments)
        if status:
            return status
    for path in draw_plots(arguments.output):
        print(f"Plot in {path}")
    return 0


def measure(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Runs the parts that are asked for, and copies all files to the results if no part is missing; returns the exit
    status."""
    run = describe_run()
    is_clean = run["commit"] is not None and not run["commit"].endswith(CHANGES)
    if not (is_clean or arguments.allow_dirty or arguments.dry_run):
        parser.error(
            f"the results are to be of one clean commit, not of {run['commit']}: commit or stash what "
            "`git status -uno` lists, or give --allow-dirty"
        )
    origin = {key: value for key, value in run.items() if key not in ("date", "command")}
    origin |= {"model": arguments.model, "rounds": arguments.rounds}
    staged = STAGED.with_name("readme-dry-run") if arguments.dry_run else STAGED
    parts, progress = make_parts(arguments, staged), Progress(staged, origin if is_clean else None)
    status = run_parts([part for part in parts if part.name in arguments.only], progress, run["commit"])
    if status:
        return status
    missing = [part.name for part in parts if not progress.is_finished(part)]
    if missing:
        print(f"Finished parts are in {staged}; {arguments.output} gets all files once these are: {', '.join(missing)}")
        return 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    for file in dict.fromkeys(part.file for part in parts):
        shutil.copyfile(staged / file, arguments.output / file)
        print(f"Results in {arguments.output / file}")
    return 0


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _label(method: str) -> str:
    return {"plain": "plain vLLM", "streaming": "StreamingLLM"}.get(method, method)


def _color(method: str) -> str:
    return {"plain": "black", "qfilters": "C0", "streaming": "C1"}.get(method, "C2")


if __name__ == "__main__":
    sys.exit(main())
