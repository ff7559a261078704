"""The command ``vllm-qfilters``: imports the command that is named, runs it, and returns its exit status.

The exit status is 0, or 1 if lines of the input failed, 2 if the user has to change something, which one line says, 130
after an interruption, or 143 after a signal to terminate. Importing this package imports none of its commands, so that
help and version are quick; vLLM is imported only once a command is named.
"""

import argparse
import importlib
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NamedTuple, NoReturn, cast

from vllm_qfilters import __version__
from vllm_qfilters.commands import engine
from vllm_qfilters.commands.arguments import Command, UsageError


class Listed(NamedTuple):
    module: str  # below this package, see Command
    summary: str  # for the help of vllm-qfilters itself


COMMANDS = {
    "calibrate": Listed("calibrate", "make the Q-Filters of a model"),
    "generate": Listed("generate.command", "generate completions for a JSONL file, with compressed KV caches"),
    "eval": Listed("evaluation.command", "measure what compression costs in quality"),
    "size": Listed("sizing.command", "reckon how many sequences fit into a memory, with and without compression"),
    "inspect": Listed("inspection.command", "show on a page which tokens of a prompt the cache keeps"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status. After help, and for arguments that cannot be parsed, it exits by
    itself.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        _parser().parse_args(argv)  # prints help, version or an error, and exits in any case
    name = argv[0]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        command = load(name)
        return command.run(engine.parse(name, command, argv[1:]))
    except UsageError as error:
        print(f"vllm-qfilters {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vllm-qfilters {name}: interrupted", file=sys.stderr)
        return 130


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the command as an exception does, so that engines in processes of their own end with it."""
    raise SystemExit(128 + number)


def load(name: str) -> Command:
    """Imports the command ``name``, one of ``COMMANDS``."""
    return cast(Command, importlib.import_module(f"{__name__}.{COMMANDS[name].module}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-qfilters",
        description="Tools around vLLM's --kv-compression, which keeps the KV cache of every sequence within a budget.",
        epilog="Example: vllm-qfilters calibrate Qwen/Qwen3-0.6B, then "
        "vllm serve Qwen/Qwen3-0.6B --kv-compression qfilters",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands, each with its own --help", metavar="COMMAND", required=True)
    for name, listed in COMMANDS.items():
        commands.add_parser(name, help=listed.summary)
    return parser
