"""Processes that work beside the tests: they start before the first one, and give way to all of them."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping


class Background:
    """``python -m MODULE ARGUMENTS`` at a low priority. Starts at once.

    Args:
        command: the module and its arguments.
        environment: all of its variables.
        stdin: what it reads.
    """

    def __init__(self, *command: str, environment: Mapping[str, str], stdin: str = "") -> None:
        self._stdin, self._stdout, self._stderr = (tempfile.TemporaryFile("w+") for _ in range(3))  # noqa: SIM115
        self._stdin.write(stdin)
        self._stdin.seek(0)
        self._process = subprocess.Popen(
            ["nice", sys.executable, "-m", *command],
            stdin=self._stdin,
            stdout=self._stdout,
            stderr=self._stderr,
            env=environment,
        )

    def output(self) -> str:
        """Waits for its end; what it printed."""
        status = self._process.wait()
        self._stderr.seek(0)
        assert status == 0, self._stderr.read()[-6000:]
        self._stdout.seek(0)
        return self._stdout.read()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
