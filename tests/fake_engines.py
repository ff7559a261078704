"""Engines for the tests of ``generate --ray``, which Ray's processes import: nothing heavy here."""

import contextlib
import os
import pathlib
import signal
import time

from vllm_qfilters.commands.arguments import UsageError
from vllm_qfilters.commands.generate.offline import Completion, Refusal


@contextlib.contextmanager
def echo(folder: pathlib.Path):
    """Answers with the prompt in capitals; some prompts make it do other things. Notes each batch in ``folder``, by
    process.
    """

    def generate(requests):
        with (folder / str(os.getpid())).open("a") as log:
            log.write(",".join(str(request.line) for request in requests) + "\n")
        return [answer(request.prompt, folder) for request in requests]

    yield generate


@contextlib.contextmanager
def no_engine():
    raise UsageError("no such model")
    yield


def answer(prompt: str, folder: pathlib.Path):
    match prompt.split():
        case ["refused"]:
            return Refusal("no such prompt")
        case ["slow", *_]:
            time.sleep(2)
        case ["die", "once"]:
            if is_first(folder / "died"):
                os.kill(os.getpid(), signal.SIGKILL)
        case ["raise", "once"]:
            if is_first(folder / "raised"):
                raise RuntimeError("the engine is dead")
        case ["die", "always"]:
            os.kill(os.getpid(), signal.SIGKILL)
    return Completion(prompt.upper(), "stop", 1, 1)


def is_first(marker: pathlib.Path) -> bool:
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
