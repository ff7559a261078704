"""Modules of the tests that run in a process of their own."""

import subprocess
import sys
from collections.abc import Mapping


def output_of(module: str, *arguments: str, environment: Mapping[str, str], stdin: str = "") -> str:
    """What ``python -m MODULE ARGUMENTS`` prints.

    Args:
        environment: all of its variables.
        stdin: what it reads.
    """
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-6000:]
    return process.stdout
