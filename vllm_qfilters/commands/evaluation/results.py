"""Keeps what was measured in a file, which is written after every cell so that a run can be continued."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_qfilters.commands.evaluation.methods import FULL
from vllm_qfilters.commands.evaluation.tasks import Task

_VERSION = 1
# What files that were written before a task had these settings were measured with.
_EARLIER_SETTINGS = {"generation": {"context": 0, "temperature": 0.7, "penalty": 1.0, "ignore_eos": False}}
_EARLIER_INSTRUCTIONS = 8


class Results:
    """The cells of one model.

    The file is JSON: ``cells`` hold the measurements, and each the index of its engine; ``engines`` tell their
    configuration, and each the index of its run; ``runs`` tell machine, versions, commit and command; ``tasks`` the
    settings of each task.

    Args:
        path: the file; if it exists, it is continued.
        model: the name of the model.

    Raises:
        ValueError: the file holds results of another model, or is no file of results.
    """

    def __init__(self, path: pathlib.Path, model: str) -> None:
        self.path = path
        empty = {"version": _VERSION, "model": model, "runs": [], "tasks": {}, "engines": [], "cells": []}
        self._values: dict[str, Any] = _read(path, model) if path.exists() else empty

    @property
    def model(self) -> str:
        return str(self._values["model"])

    def check_settings(self, tasks: Iterable[Task]) -> None:
        """Raises ValueError if there are cells of a task that were measured with other settings than it has now."""
        for task in tasks:
            before, now = self._values["tasks"].get(task.name), json.loads(json.dumps(task.settings))
            if before is not None and before != now:
                changed = ", ".join(sorted(key for key in {*before, *now} if before.get(key) != now.get(key)))
                raise ValueError(
                    f"{self.path} has {task.name} with other settings ({changed}): choose another --output"
                )

    def check_dtype(self, dtype: str) -> None:
        """Raises ValueError if there is anything that was measured in another dtype than ``dtype``."""
        for engine in self._values["engines"]:
            if engine.get("dtype", dtype) != dtype:
                raise ValueError(
                    f"{self.path} was measured in {engine['dtype']}, and this run is in {dtype}: give --dtype "
                    f"{engine['dtype']}, or choose another --output"
                )

    def start_run(self, run: Mapping[str, Any]) -> None:
        """Begins a run, which all cells added from now on belong to; ``run`` says where and how it measures."""
        self._values["runs"].append(dict(run))

    def start_engine(self, method: str, configuration: Mapping[str, Any]) -> None:
        """Begins an engine, which all cells added from now on belong to; ``configuration`` is what it reports."""
        self._values["engines"].append({"method": method, "run": len(self._values["runs"]) - 1, **configuration})

    def finish_engine(self, **measured: Any) -> None:
        """Adds to the present engine what was measured over its whole life, and writes the file."""
        self._values["engines"][-1].update(measured)
        self._write()

    def get(self, task: str, method: str, budget: int | float) -> dict[str, Any] | None:
        """Returns a cell, or None if it is not measured yet; the full cache is ``FULL`` with a budget of 0."""
        return next((cell for cell in self.cells(task) if (cell["method"], cell["budget"]) == (method, budget)), None)

    def add(self, task: Task, method: str, budget: int | float, measured: Mapping[str, Any]) -> None:
        """Adds a cell, and writes the file.

        Raises:
            OSError: the file cannot be written.
        """
        assert (method == FULL) == (budget == 0)
        self._values["tasks"][task.name] = dict(task.settings)
        engine = len(self._values["engines"]) - 1
        self._values["cells"].append(
            {"task": task.name, "method": method, "budget": budget, "engine": engine, **measured}
        )
        self._write()

    def amend(self, cell: dict[str, Any], measured: Mapping[str, Any]) -> None:
        """Adds what was measured later to a cell of :meth:`cells`, and writes the file."""
        cell.update(measured)
        self._write()

    def cells(self, task: str) -> list[dict[str, Any]]:
        """Returns all cells of a task, that of the full cache among them."""
        return [cell for cell in self._values["cells"] if cell["task"] == task]

    def tasks(self) -> list[str]:
        return list(self._values["tasks"])

    def settings(self, task: str) -> dict[str, Any]:
        return dict(self._values["tasks"][task])

    def methods(self, task: str) -> list[str]:
        """Returns the methods measured on ``task`` in the order they were measured, without the full cache."""
        return list(dict.fromkeys(cell["method"] for cell in self.cells(task) if cell["method"] != FULL))

    def budgets(self, task: str) -> list[int | float]:
        """Returns the budgets measured on ``task``, the smallest first, without that of the full cache."""
        return sorted({cell["budget"] for cell in self.cells(task)} - {0})

    def _write(self) -> None:
        written = self.path.with_name(self.path.name + ".part")
        written.write_text(_encode(self._values), encoding="utf-8")
        os.replace(written, self.path)


def _encode(values: Mapping[str, Any]) -> str:
    """Encodes as JSON with one line per run, engine, task and cell."""
    parts = []
    for key, value in values.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
        elif isinstance(value, dict):
            text = (
                "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(item)}" for name, item in value.items()) + "\n }"
            )
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _read(path: pathlib.Path, model: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: choose another --output ({error})") from error
    if not isinstance(values, dict) or values.get("version") != _VERSION:
        raise ValueError(f"{path} is no file of results of this version: choose another --output, or delete it")
    if values["model"] != model:
        raise ValueError(f"{path} has results of {values['model']}, not of {model}: choose another --output")
    for task, settings in _EARLIER_SETTINGS.items():
        if task in values["tasks"]:
            values["tasks"][task] = {**settings, **values["tasks"][task]}
    if generation := values["tasks"].get("generation"):
        generation.setdefault("instructions", min(generation["prompts"], _EARLIER_INSTRUCTIONS))
    return values
