"""The cases that start engines share this: variants take turns, each in a process of its own, and their numbers become
a file of results, a table and a plot.

A round measures every variant once. Ratios are made round by round, since the speed of a machine drifts between rounds.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_qfilters import cpu
from vllm_qfilters.commands.evaluation import environment

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / environment.RESULTS
_MEASURED = "measured: "

Numbers = dict[str, Any]  # what one variant measured in one round, as JSON


class NotMeasured(Exception):
    """A variant cannot run here; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A benchmark that measures several variants of one load.

    Attributes:
        name: the case and its files of results are named so.
        description: ``--help`` shows it.
        add_options: adds the options that the case has beside :func:`_add_common_options`.
        variants: takes the options and returns what differs between the jobs of a round, by the name of the variant.
            The key ``python`` names another interpreter to measure with.
        measure: takes the options together with what one variant differs in, and returns numbers as JSON. It runs in a
            process of its own.
        columns: the table shows these numbers, under these headers.
        ratios: takes the numbers of a round by variant, and returns ratios by name.
        draw: draws onto a figure of matplotlib's the numbers of all rounds, by variant; with None there is no plot.
        problems: takes the numbers of a round by variant, and returns what is wrong with them; the exit status is then
            1.
    """

    name: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    variants: Callable[[argparse.Namespace], Mapping[str, dict[str, Any]]]
    measure: Callable[[dict[str, Any]], Numbers]
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ratios: Callable[[Mapping[str, Numbers]], Mapping[str, float]] = lambda of_round: {}
    draw: Callable[[Any, Mapping[str, Sequence[Numbers]]], None] | None = None
    problems: Callable[[Mapping[str, Numbers]], Sequence[str]] = lambda of_round: ()

    def main(self) -> int:
        """Runs the command and returns its exit status."""
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks {self.name}",
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            conflict_handler="resolve",  # a case may say more about a common option
        )
        _add_common_options(parser)
        self.add_options(parser)
        arguments = parser.parse_args()
        if arguments.measure is not None:
            print(_MEASURED + json.dumps(self.measure({**_job(arguments), **arguments.measure})))
            return 0
        arguments.llm.setdefault("dtype", cpu.fast_dtype())
        arguments.output = output = arguments.output or RESULTS / f"{self.name}.json"
        check_output(parser, arguments)
        print(f"measuring in {arguments.llm['dtype']}; --llm '{{\"dtype\": ...}}' chooses another", file=sys.stderr)
        variants = self.variants(arguments)
        rounds, ratios, problems = [], [], []
        for number in range(1, arguments.rounds + 1):
            of_round = {}
            for variant, job in variants.items():
                print(f"round {number} of {arguments.rounds}: {variant} ...", file=sys.stderr, flush=True)
                with contextlib.suppress(NotMeasured):
                    # The dtype is decided here: another interpreter may be without torch.
                    of_round[variant] = _run_child(variant, {"llm": arguments.llm, **job})
            rounds.append(of_round)
            ratios.append({name: round(ratio, 2) for name, ratio in self.ratios(of_round).items()})
            problems += self.problems(of_round)
        described = {
            "case": self.name,
            "dry_run": arguments.dry_run,
            "run": environment.describe_run(),
            "options": _job(arguments),
        }
        result = {**described, "rounds": rounds, "ratios": ratios}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")
        self._print(result)
        plot = "" if self.draw is None else f", plot in {self._plot(rounds, output.with_suffix('.png'))}"
        print(f"\nResults in {output}{plot}")
        for problem in problems:
            print(problem, file=sys.stderr)
        return 1 if problems else 0

    def _print(self, result: dict[str, Any]) -> None:
        for key, value in result["run"].items():
            print(f"{key}: {value}")
        width = max(map(len, result["rounds"][0])) + 1
        print("\n" + " " * width + "".join(f"{header:>{len(header) + 3}}" for header in self.columns.values()))
        for variant, numbers in by_variant(result["rounds"]).items():
            cells = (median(numbers, key) for key in self.columns)
            shown = (f"{cell:>{len(header) + 3}.4g}" for cell, header in zip(cells, self.columns.values(), strict=True))
            print(f"{variant:<{width}}" + "".join(shown))
        print()
        for name in result["ratios"][0]:
            print(f"{name}: " + ", ".join(str(ratios[name]) for ratios in result["ratios"]))

    def _plot(self, rounds: Sequence[Mapping[str, Numbers]], path: pathlib.Path) -> pathlib.Path:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure = pyplot.figure(layout="constrained")
        self.draw(figure, by_variant(rounds))
        figure.savefig(path, dpi=120)
        return path


def check_output(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuses a dry run that would write to the results."""
    if arguments.dry_run and arguments.output is not None and arguments.output.resolve().is_relative_to(RESULTS):
        parser.error(f"a dry run measures nothing: give it an --output elsewhere than {RESULTS}")


def by_variant(rounds: Sequence[Mapping[str, Numbers]]) -> dict[str, list[Numbers]]:
    return {variant: [of_round[variant] for of_round in rounds if variant in of_round] for variant in rounds[0]}


def median(numbers: Sequence[Numbers], key: str) -> float:
    return statistics.median(of_round[key] for of_round in numbers)


def bars(panel: Any, numbers: Mapping[str, Sequence[Numbers]], key: str, title: str) -> None:
    """Draws a bar per variant, as high as the median, and a dot per round."""
    for place, rounds in enumerate(numbers.values()):
        panel.bar(place, median(rounds, key), color=f"C{place}")
        panel.plot([place] * len(rounds), [of_round[key] for of_round in rounds], "k.")
    panel.set_xticks(range(len(numbers)), numbers, fontsize="small", rotation=25, ha="right", rotation_mode="anchor")
    panel.set_title(title, fontsize="medium")
    panel.grid(axis="y", alpha=0.3)


def bar_panels(figure: Any, numbers: Mapping[str, Sequence[Numbers]], titles: Mapping[str, str]) -> None:
    """Draws a panel of bars for each key of a number, side by side."""
    figure.set_size_inches(15, 4.5)
    for panel, (key, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        bars(panel, numbers, key, title)


def _run_child(variant: str, job: dict[str, Any]) -> Numbers:
    command = [
        job.get("python") or sys.executable,
        *sys.argv[0].split()[1:],
        *sys.argv[1:],
        "--measure",
        json.dumps(job),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    measured = [line for line in done.stdout.splitlines() if line.startswith(_MEASURED)]
    if done.returncode or not measured:
        raised = f"{NotMeasured.__module__}.{NotMeasured.__name__}: "
        reasons = [line.removeprefix(raised) for line in done.stderr.splitlines() if line.startswith(raised)]
        if reasons:  # behind which a library may print more while the process ends
            reason = reasons[-1]
            print(f"  not measured: {reason}", file=sys.stderr)
            raise NotMeasured(reason)
        ended = f", ended by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
        sys.exit(f"{variant} failed{ended}:\n{done.stderr[-3000:]}")
    return json.loads(measured[0].removeprefix(_MEASURED))


def _job(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        name: value for name, value in vars(arguments).items() if name not in ("output", "dry_run", "rounds", "measure")
    }


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budget", type=int, default=1024, help="tokens; default %(default)s")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=2 << 30, help="0: vLLM decides; default 2 GiB")
    parser.add_argument("--llm", type=json.loads, default={}, help="further arguments of vLLM's LLM, as JSON")
    parser.add_argument("--options", type=json.loads, default={}, help="further KV compression options, as JSON")
    parser.add_argument("--output", type=pathlib.Path, help="file of results; default benchmarks/results/CASE.json")
    parser.add_argument("--dry-run", action="store_true", help="the numbers mean nothing: the output says so")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
