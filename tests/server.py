"""``vllm serve`` in a process of its own: for the tests and scripts/load_test.py."""

import collections
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

VLLM = str(pathlib.Path(sys.executable).parent / "vllm")
METRICS = "vllm:kv_compression_"


class Server:
    """Starts at once; :meth:`wait` returns when it is up.

    Args:
        model: folder.
        flags: of ``vllm serve``.
        name: the model is served under.
        environment: variables beside those of this process.

    Attributes:
        url: without a slash at its end.
        log: its lines so far.
        flags: all of them.
    """

    def __init__(
        self, model: pathlib.Path, *flags: str, name: str = "demo", environment: Mapping[str, str] = {}
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.flags = [
            "--served-model-name",
            name,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--enforce-eager",
            *flags,
        ]
        logged = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [VLLM, "serve", str(model), *self.flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **logged, **environment}, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=lambda: self.log.extend(self.process.stdout), daemon=True).start()

    def wait(self, seconds: float = 300) -> "Server":
        """Raises RuntimeError with the end of the log if it ends meanwhile or is not up in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.5)
        self.stop()
        raise RuntimeError("the server did not start:\n" + "".join(self.log[-40:]))

    def metrics(self, prefix: str = METRICS, **labels: str) -> dict[str, float]:
        """Those whose names begin with ``prefix``, by the rest of the name; sums over labels other than ``labels``."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        sums = collections.defaultdict(float)
        for line in lines:
            match = re.match(prefix + r"(\w+)(?:\{(.*)\})? (\S+)$", line)
            if match and all(f'{name}="{value}"' in (match[2] or "") for name, value in labels.items()):
                sums[match[1]] += float(match[3])
        return {name: value for name, value in sums.items() if not name.endswith("_created")}

    def sequences(self) -> list[dict[str, Any]]:
        """From the endpoint."""
        with urllib.request.urlopen(self.url + "/kv_compression", timeout=10) as response:
            return json.load(response)["sequences"]

    def stop(self, seconds: float = 60) -> None:
        """Raises subprocess.TimeoutExpired if it did not end in time and had to be killed."""
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
