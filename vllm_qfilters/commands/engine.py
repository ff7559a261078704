"""Starts vLLM's engine for a command: reads its arguments, ends it, and puts its errors into one line.

Every command runs these functions in its own process. They import vLLM themselves, so that importing this module is
quick.
"""

import argparse
import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vllm_qfilters.commands.arguments import Command, UsageError
from vllm_qfilters.frontend.versions import set_up_environment

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

_SHUTDOWN_SECONDS = 30.0


def parse(name: str, command: Command, argv: Sequence[str]) -> argparse.Namespace:
    """Reads the options of a command and vLLM's engine arguments. It exits after help, and for arguments that cannot be
    parsed.

    Args:
        name: the command as the user names it.
        command: its module.
        argv: what follows the name.

    Returns:
        The command's options and all engine arguments, ``model`` among them.
    """
    parser = _parser(name, command)
    try:
        args = parser.parse_args(list(argv))
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
    except IndexError:
        parser.error(f"{argv[-1]} needs a value")  # vLLM's parser does not check dotted keys
    if (args.model is None) == (args.model_tag is None):
        parser.error(
            "which MODEL?" if args.model is None else f"name one model, not both {args.model_tag} and {args.model}"
        )
    args.model = args.model or args.model_tag
    return args


def read_engine_args(args: argparse.Namespace) -> "EngineArgs":
    """Makes vLLM's engine arguments from what :func:`parse` returned.

    Raises:
        UsageError: the model folder does not exist, or vLLM refuses an argument.
    """
    from vllm.engine.arg_utils import EngineArgs

    is_local = args.model.startswith((".", "/", "~"))
    if is_local and not pathlib.Path(args.model).exists():
        raise UsageError(f"{args.model}: no such model folder")
    try:
        engine_args: EngineArgs = EngineArgs.from_cli_args(args)
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    except OSError as error:  # comes from the hub, which does not always say for which model
        raise UsageError(f"{args.model}: {one_line(error)}") from error
    return engine_args


@contextlib.contextmanager
def start_engine(engine_args: "EngineArgs") -> Iterator["LLM"]:
    """Starts an engine, and ends it in a way that prints nothing below the command's result.

    Raises:
        UsageError: the engine does not start.
    """
    from vllm import LLM

    set_up_environment()
    try:
        llm = LLM.from_engine_args(engine_args)
    except (ValueError, OSError) as error:
        raise UsageError(one_line(error)) from error
    except RuntimeError as error:
        if not str(error).startswith("Engine core initialization failed"):
            raise
        raise UsageError("the engine did not start, the first error above says why") from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=_SHUTDOWN_SECONDS)


def one_line(error: Exception) -> str:
    """Returns the message of an error in one line, without what pydantic writes around it."""
    from pydantic import ValidationError

    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    message = (
        error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else str(error)
    )
    return " ".join(message.split())


def _parser(name: str, command: Command) -> argparse.ArgumentParser:
    """Makes vLLM's parser for a command. Its plain help lists engine arguments by group only, so the command's own
    options are part of the description.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_qfilters.frontend.plugin import register

    options = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    options.add_argument(
        "model_tag", metavar="MODEL", nargs="?", help="folder or Hugging Face repository; also as --model"
    )
    command.add_arguments(options)
    parser = FlexibleArgumentParser(
        prog=f"vllm-qfilters {name}",
        usage=f"vllm-qfilters {name} {command.USAGE} [any engine argument of vLLM]",
        description=f"{command.DESCRIPTION}\n\n{options.format_help()}",
        epilog=f"{command.EXAMPLES}\n\n"
        "Engine arguments: --help=all shows every one, --help=WORD those of a group or name.",
        parents=[options],
    )
    load_general_plugins()
    register()  # is needed where VLLM_PLUGINS leaves this package out
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=None, **command.ENGINE_DEFAULTS)
    return parser
