"""Describes where and with what something is measured."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
from typing import Any

from vllm_qfilters import cpu

PACKAGES = ("vllm", "torch", "triton", "transformers", "xformers", "vllm-qfilters")

RESULTS = "benchmarks/results"  # in the checkout: what is written there changes no program

_FOLDER = pathlib.Path(__file__).parent


def describe_run(folder: pathlib.Path = _FOLDER) -> dict[str, Any]:
    """Returns date, machine, versions, commit and command of this run, as JSON.

    Args:
        folder: a package of the checkout whose commit is named; by default this package.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_gpu(),
        "cpu": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores",
        "isa": cpu.isa(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "commit": _commit(folder),
        "command": f"{pathlib.Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
    }


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())


def _gpu() -> dict[str, str]:
    """Returns the names of card and driver; nothing on a machine without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return {"gpu": subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: pathlib.Path) -> str | None:
    """Returns the commit of the checkout that ``folder`` is in, with ``+changes`` if other files than results differ;
    None for an installed package.
    """
    commit = _git(folder, "rev-parse", "--short", "HEAD")
    if commit is None or _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # the repository is another one, around site-packages
    changed = _git(folder, "status", "--porcelain", "-uno", "--", ":/", f":(top,exclude){RESULTS}")
    return commit + ("+changes" if changed else "")


def _git(folder: pathlib.Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
