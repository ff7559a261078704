"""What a command is, and what the commands share when they read and check their arguments. Imports no vLLM."""

import argparse
import os
import pathlib
from collections.abc import Callable
from typing import Any, Protocol


class UsageError(Exception):
    """The user has to change something; the message says what, in one line."""


class Command(Protocol):
    """A command is a module with these names.

    Attributes:
        USAGE: the arguments that matter most, for the first line of its help.
        DESCRIPTION: what the command does, above the options in its help.
        EXAMPLES: command lines, below the options in its help.
        ENGINE_DEFAULTS: defaults of engine arguments where they differ from vLLM's.
    """

    USAGE: str
    DESCRIPTION: str
    EXAMPLES: str
    ENGINE_DEFAULTS: dict[str, Any]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's own options; MODEL and vLLM's engine arguments are added by :mod:`.engine`."""

    def run(self, args: argparse.Namespace) -> int:
        """Runs the command and returns its exit status.

        Raises:
            UsageError: the user has to change something.
        """


def at_least(least: int) -> Callable[[str], int]:
    """Returns a type of argument: an integer that is ``least`` or more."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no integer >= {least}")
        return int(text)

    return integer


def temperature(text: str) -> float:
    """Is a type of argument: a temperature of sampling."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number >= 0")
    return value


def check_writable(path: pathlib.Path) -> None:
    """Checks that a file can be written, before the time of a model load is spent.

    Raises:
        UsageError: it cannot.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder: make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written")
