"""Examples that need no model: the start script, with a stand-in for ``vllm``, and what can be read of the others."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"

# It notes every start. The first server dies after a while, the second one stops answering, the third one stays.
STAND_IN = """#!{python}
import http.server, pathlib, sys, threading, os
starts = pathlib.Path({starts!r})
with starts.open("a") as file:
    file.write(f"{{os.getpid()}}\\n")
number = len(starts.read_text().splitlines())
port = int(sys.argv[sys.argv.index("--port") + 1])
if port == 0:
    sys.exit("a flag is wrong")

class Health(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        Health.asked += 1
        if number == 1 and Health.asked > 3:
            os._exit(1)
        self.send_response(503 if number == 2 and Health.asked > 3 else 200)
        self.end_headers()

http.server.ThreadingHTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@pytest.fixture
def start(tmp_path):
    """Starts the script with the stand-in, and ends it."""
    vllm, starts = tmp_path / "vllm", tmp_path / "starts"
    vllm.write_text(STAND_IN.format(python=sys.executable, starts=str(starts)))
    vllm.chmod(0o755)
    starts.touch()
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"HEALTH_SECONDS": "0.2", "STOP_SECONDS": "3", "START_SECONDS": "60"}
    scripts = []

    def start_script(port):
        command = [EXAMPLES / "serve_forever.sh", "MODEL", "--port", str(port)]
        scripts.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return scripts[-1], lambda: [int(line) for line in starts.read_text().split()]

    yield start_script
    for script in scripts:
        script.kill()


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_is_started_anew_until_the_script_is_told_to_end(start):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script, started = start(port)
    end = time.monotonic() + 60
    said = []
    while time.monotonic() < end and sum("up after" in line for line in said) < 3:
        said.append(script.stderr.readline())
    pids = started()
    assert len(pids) == 3 and [is_running(pid) for pid in pids] == [False, False, True]
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 0 and not is_running(pids[-1])
    text = "".join(said)
    assert "the server ended" in text and "no answer to three questions for its health" in text


def test_a_server_that_never_started_is_not_tried_again(start):
    script, started = start(0)
    _, said = script.communicate(timeout=30)
    assert script.returncode == 1 and "did not start" in said and len(started()) == 1


def test_every_example_is_listed():
    listed = set(re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text()))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__")}
