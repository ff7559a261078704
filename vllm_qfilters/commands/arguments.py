"""What the subcommands of ``vllm-qfilters`` have in common when they read their arguments."""

import argparse
from collections.abc import Callable


class UsageError(Exception):
    """The user has to change something; the message says what, in one line."""


def at_least(least: int) -> Callable[[str], int]:
    """A type of argument: an integer, ``least`` or more."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no integer >= {least}")
        return int(text)

    return integer
