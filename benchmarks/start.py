"""Measures a start: seconds from the command ``vllm serve`` to the first answer, cold and warm.

    python -m benchmarks start models/SmolLM2-135M-Instruct [--methods qfilters streaming] [--compiled] [--budget 1024]

A cold start finds nothing of an earlier one: filters are calibrated, and with ``--compiled`` the model is compiled. A
warm start finds what the cold one has left. Either way the packages are installed, and their files are as likely to be
in memory. As ``make serve`` does, the model runs eagerly where ``--compiled`` is not given. Sixteen tokens are an
answer.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.case import Case, Numbers, bar_panels

ANSWER_TOKENS = 16
LONGEST_START = 900  # seconds
LONGEST_ANSWER = 120  # seconds
LONGEST_STOP = 60  # seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", default=["qfilters", "streaming"])
    parser.add_argument("--compiled", action="store_true", help="with torch.compile; default eager, as `make serve`")


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    return {"plain": {"method": None}, **{method: {"method": method} for method in arguments.methods}}


def measure(job: dict[str, Any]) -> Numbers:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "VLLM_CACHE_ROOT": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        log = pathlib.Path(folder) / "log"
        return {"cold_s": start(job, environment, log), "warm_s": start(job, environment, log)}


def start(job: dict[str, Any], environment: Mapping[str, str], log: pathlib.Path) -> float:
    """Starts a server, asks it, and stops it.

    Args:
        job: ``model``, ``method``, ``budget``, ``kv_cache_memory_bytes``, ``compiled``, ``llm`` and ``options``.
        environment: of the server.
        log: the server's output goes there.

    Returns:
        The seconds from the command to the answer.

    Raises:
        RuntimeError: the server ended, or did not answer in time; the message ends with what it printed last.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    begin = time.perf_counter()
    with log.open("w") as output:
        server = subprocess.Popen(command(job, port), env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not _answers(job["model"], port):
            if server.poll() is not None or time.perf_counter() - begin > LONGEST_START:
                raise RuntimeError(f"no answer from the server, which printed:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        return time.perf_counter() - begin
    finally:
        server.terminate()
        try:
            server.wait(LONGEST_STOP)
        except subprocess.TimeoutExpired:
            server.kill()
            raise


def command(job: Mapping[str, Any], port: int) -> list[str]:
    """Returns the command line of a server."""
    flags = [str(pathlib.Path(sys.executable).parent / "vllm"), "serve", job["model"], "--port", str(port)]
    if job["kv_cache_memory_bytes"]:
        flags += ["--kv-cache-memory-bytes", str(job["kv_cache_memory_bytes"])]
    if not job["compiled"]:
        flags += ["--enforce-eager"]
    for name, value in job["llm"].items():
        flags += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    if job["method"] is not None:
        options = {"budget": job["budget"], **job["options"]}
        flags += ["--kv-compression", job["method"], "--kv-compression-config", json.dumps(options)]
    return flags


def _answers(model: str, port: int) -> bool:
    body = json.dumps({"model": model, "prompt": "Once", "max_tokens": ANSWER_TOKENS, "ignore_eos": True}).encode()
    url, headers = f"http://localhost:{port}/v1/completions", {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=LONGEST_ANSWER) as answer:
            return bool(json.load(answer)["choices"][0]["text"])
    except urllib.error.HTTPError:
        raise
    except OSError:  # nobody listens yet, or answers
        return False


def ratios(of_round: Mapping[str, Numbers]) -> dict[str, float]:
    plain, found = of_round["plain"], {}
    for variant, numbers in of_round.items():
        if variant != "plain":
            found[f"{variant}: cold start over plain"] = numbers["cold_s"] / plain["cold_s"]
            found[f"{variant}: warm start over plain"] = numbers["warm_s"] / plain["warm_s"]
    return found


def draw(figure: Any, numbers: Mapping[str, Sequence[Numbers]]) -> None:
    bar_panels(figure, numbers, {"cold_s": "s to the first answer, cold", "warm_s": "s to the first answer, warm"})


CASE = Case(
    name="start",
    description=__doc__,
    add_options=add_options,
    variants=variants,
    measure=measure,
    columns={"cold_s": "cold s", "warm_s": "warm s"},
    ratios=ratios,
    draw=draw,
)
main = CASE.main
