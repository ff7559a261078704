"""Load and faults on a real server, on loopback and for a bounded time: what is lost, leaks, grows, or hangs?

    python scripts/load_test.py [--minutes 10] [--model FOLDER] [--full-size] [any argument of vllm serve]
    python scripts/load_test.py --kv-compression-config.evict always --kv-compression-config.prefix resume

Starts ``vllm serve`` with two API servers, elastic budgets (``evict: pressure``) and a cache so small that requests are
preempted all the time, and sends at once

- short requests, thousands of them, beside long ones with budgets of their own, elastic ones and such as insist on
  theirs,
- conversations, which send their whole history again on every turn,
- ``vllm bench serve``, round after round, with lengths from a tenth to twice the mean,
- requests whose clients go away in the middle of the stream,
- requests with malformed ``kv_budget`` values, which must be refused with a 400 and a reason,
- what an operator does: the prefix cache is reset, with running requests and without, and the engine is put to sleep
  and woken up, which keeps its requests or waits for them.

Then everything must have been answered, no page be held, the same prompt get the same answer as before, and no
exception stand in the log. At last the worker's process is killed while it streams, and on another server the engine's:
every client must hear of it, and the server say why and end. Prints a report, writes it with a plot to
benchmarks/results/load.json and the logs of the servers to build/, and ends with status 1 if anything was not as it
must be.

The model has the demo model's vocabulary and random weights of 2 small layers, unless --full-size: the subject is the
engine.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp

from vllm_qfilters.commands.evaluation.environment import RESULTS, describe_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.server import VLLM, Server

LOG = ROOT / "build" / "load_test"
NAME = "model"
PROCESSES = ("VLLM::Worker", "VLLM::EngineCore")
BLOCK, BUDGET, CHUNK = 32, 256, 512
MAX_MODEL_LEN, NUM_PAGES = 4096, 48
SMALL = {
    "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}  # fmt: skip
MALFORMED = (-1, 7, 1.5, "256", "much", [256], {"budget": 256}, True, 1e400, None)
ENDS = ("EngineDeadError", "died unexpectedly")  # an API server says, and what started several of them
HANG_SECONDS = 60.0
MEMORY_SAMPLES = 20  # while there is load, and one before


class LoadedServer(Server):
    """And what can be seen of it from outside."""

    def __init__(self, arguments: argparse.Namespace, flags: list[str]) -> None:
        config = {"budget": BUDGET, "interval": BLOCK, "chunk": CHUNK}
        config |= {"evict": "pressure", "max_budget": "unlimited", "allow_kv_budget_off": True}
        defaults = ["--kv-compression", "qfilters", "--kv-compression-config", json.dumps(config)]
        defaults += ["--dtype", "float32", "--block-size", str(BLOCK), "--max-model-len", str(MAX_MODEL_LEN)]
        defaults += ["--num-gpu-blocks-override", str(NUM_PAGES), "--kv-cache-memory-bytes", str(1 << 30)]
        if not arguments.full_size:
            defaults += ["--load-format", "dummy", "--hf-overrides", json.dumps(SMALL)]
        # /reset_prefix_cache and /sleep are there in this mode alone, which also logs the stack of every refusal.
        defaults += ["--no-log-error-stack", "--api-server-count", "2"]
        # A machine that stands still for longer than this makes the server close connections with requests it has not
        # read.
        environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120"}
        super().__init__(arguments.model, *defaults, *flags, name=NAME, environment=environment)

    def processes(self) -> dict[int, str]:
        """All of its session: process id to command line."""
        found = {}
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z" and int(session) == self.process.pid:
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        return found

    def resident_mb(self) -> dict[str, float]:
        """By process; of the front end together with Python's own."""
        found = collections.Counter()
        for pid, name in self.processes().items():
            with contextlib.suppress(OSError):
                kilobytes = re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]
                found[next((title for title in PROCESSES if title in name), "front end")] += int(kilobytes) / 1024
        return {name: round(megabytes, 1) for name, megabytes in found.items()}

    def exceptions(self) -> Iterator[str]:
        """The last lines of the tracebacks in the log, without what vLLM puts before every line."""
        is_inside = False
        for line in self.log:
            line = re.sub(r"^(\(\S+ pid=\d+\) )?((ERROR|WARNING|INFO) \S+ \S+ \[\S+\] ?)?", "", line).rstrip()
            if line.startswith("Traceback"):
                is_inside = True
            elif is_inside and re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line):
                is_inside = False
                yield line[:200]


class Load:
    """Sends requests and counts what becomes of them, by kind.

    Attributes:
        counts: by (kind, outcome); outcomes are sent, answered, refused, left (by the client) and failed.
        failures: the first few, in words.
    """

    def __init__(self, server: LoadedServer, session: aiohttp.ClientSession, seed: int) -> None:
        self.server, self.session, self.rng = server, session, random.Random(seed)
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)  # to whole answers, by kind
        self.failures: list[str] = []
        self.ends_at = 0.0

    async def run(self, seconds: float, concurrency: dict[Callable[[], Awaitable[None]], int]) -> None:
        self.ends_at = time.monotonic() + seconds

        async def repeat(send: Callable[[], Awaitable[None]]) -> None:
            while time.monotonic() < self.ends_at:
                await send()

        async with asyncio.TaskGroup() as tasks:
            for send, count in concurrency.items():
                for _ in range(count):
                    tasks.create_task(repeat(send))

    async def short(self) -> None:
        await self._complete("short", self._tokens(1, 24), self.rng.randint(1, 8))

    async def long(self) -> None:
        budget = self.rng.choice([None, None, 192, 0.3, 0])
        length = self.rng.randint(300, 3000) if budget != 0 else self.rng.randint(300, 900)
        xargs = {} if budget is None else {"kv_budget": budget}
        xargs |= self.rng.choice([{}, {}, {"kv_evict": "always"}])
        await self._complete("long", self._tokens(length, length), self.rng.randint(50, 300), vllm_xargs=xargs)

    async def converse(self) -> None:
        """Every turn sends what was said before, the answers too."""
        history: list[int] = []
        xargs = self.rng.choice([{}, {}, {"kv_evict": "always"}])
        for _ in range(self.rng.randint(2, 8)):
            history += self._tokens(20, 500)
            answer = await self._complete(
                "conversation", history, self.rng.randint(20, 120), vllm_xargs=xargs, return_token_ids=True
            )
            if answer is None or time.monotonic() > self.ends_at:
                return
            history += answer["token_ids"]
            if len(history) > MAX_MODEL_LEN - 700:  # less than the longest turn is left
                return

    async def operate(self) -> None:
        await asyncio.sleep(self.rng.uniform(2, 10))
        if self.rng.random() < 0.7:
            running = self.rng.choice(["true", "false"])
            await self._order(f"reset_prefix_cache?reset_running_requests={running}")
        else:
            await self._order(f"sleep?level=1&mode={self.rng.choice(['keep', 'wait'])}")
            await asyncio.sleep(self.rng.uniform(0, 1))
            await self._order("wake_up")

    async def _order(self, order: str) -> None:
        self.counts["operator", "sent"] += 1
        status, text = await self._post(order)
        if status == 200:
            self.counts["operator", "answered"] += 1
        else:
            self._fail("operator", f"{order}: {status}: {text}")

    async def leave(self) -> None:
        body = self._body(self._tokens(10, 1500), 600, stream=True)
        self.counts["leaving", "sent"] += 1
        try:
            async with self.session.post(f"{self.server.url}/v1/completions", json=body) as response:
                if response.status == 200:
                    for _ in range(self.rng.choice([0, 1, 5, 40])):
                        await response.content.readline()
                    response.close()
                    self.counts["leaving", "left"] += 1
                else:
                    self._fail("leaving", f"{response.status}: {await response.text()}")
        except (aiohttp.ClientError, TimeoutError) as error:
            self._fail("leaving", repr(error))

    async def malformed(self) -> None:
        value = self.rng.choice(MALFORMED)
        body = self._body(self._tokens(5, 50), 5, vllm_xargs={"kv_budget": value})
        self.counts["malformed", "sent"] += 1
        status, text = await self._post("v1/completions", body)
        if status in (400, 422) and ("kv_budget" in text or "vllm_xargs" in text):
            self.counts["malformed", "refused"] += 1
        else:
            self._fail("malformed", f"kv_budget={value!r} got {status}: {text[:300]}")
        await asyncio.sleep(0.2)

    async def ask(self) -> list[str]:
        """The same every time, of an idle server; its answers must be, too: in full and within the budget."""
        numbers = random.Random(1)
        prompt = [numbers.randrange(3, 400) for _ in range(900)]
        answers = []
        for evict in ("pressure", "always"):
            await self._order("reset_prefix_cache")
            status, text = await self._post("v1/completions", self._body(prompt, 64, vllm_xargs={"kv_evict": evict}))
            answers.append(json.loads(text)["choices"][0]["text"] if status == 200 else f"{status}: {text}")
        return answers

    async def stream_to_the_end(self) -> bool:
        """Whether the client was told that something went wrong."""
        body = self._body(self._tokens(50, 50), 3000, stream=True)
        try:
            async with self.session.post(f"{self.server.url}/v1/completions", json=body) as response:
                content = await response.text()
                return response.status != 200 or '"error"' in content or "[DONE]" not in content
        except aiohttp.ClientError:
            return True

    async def _complete(self, kind: str, prompt: list[int], max_tokens: int, **extra: Any) -> dict[str, Any] | None:
        """Returns the answer, or None if it is not what was asked for."""
        self.counts[kind, "sent"] += 1
        begin = time.monotonic()
        status, text = await self._post("v1/completions", self._body(prompt, max_tokens, **extra))
        usage = json.loads(text)["usage"] if status == 200 else {}
        if usage.get("completion_tokens") == max_tokens and usage.get("prompt_tokens") == len(prompt):
            self.counts[kind, "answered"] += 1
            self.seconds[kind].append(time.monotonic() - begin)
            return json.loads(text)["choices"][0]
        self._fail(kind, f"{len(prompt)} tokens, {max_tokens} wanted, {extra}: {status} {usage or text[:300]}")
        return None

    async def _post(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        try:
            async with self.session.post(f"{self.server.url}/{path}", json=body) as response:
                return response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            return 0, repr(error)

    def _body(self, prompt: list[int], max_tokens: int, **extra: Any) -> dict[str, Any]:
        return {
            "model": NAME,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            **extra,
        }

    def _tokens(self, least: int, most: int) -> list[int]:
        return [self.rng.randrange(3, 400) for _ in range(self.rng.randint(least, most))]

    def _fail(self, kind: str, reason: str) -> None:
        self.counts[kind, "failed"] += 1
        if len(self.failures) < 10:
            self.failures.append(f"{kind}: {reason}")


async def wait_until(condition: Callable[[], Awaitable[bool]], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(aiohttp.ClientError):
            if await condition():
                return True
        await asyncio.sleep(0.25)
    return False


def bench_rounds(server: LoadedServer, model: pathlib.Path, load: Load) -> None:
    """``vllm bench serve`` until the load ends; its counts go to ``load``."""
    while not load.ends_at:
        time.sleep(0.1)
    number = 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < load.ends_at:
            number += 1
            command = [VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.url, "--model", NAME]
            command += [
                "--tokenizer",
                str(model),
                "--seed",
                str(number),
                "--dataset-name",
                "random",
                "--num-prompts",
                "60",
            ]
            command += ["--random-input-len", "500", "--random-output-len", "80", "--random-range-ratio", "0.9"]
            command += ["--max-concurrency", "8", "--ignore-eos", "--disable-tqdm"]
            command += ["--save-result", "--result-dir", folder, "--result-filename", "round.json"]
            left = max(1.0, load.ends_at - time.monotonic()) + HANG_SECONDS
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=left)
            except subprocess.TimeoutExpired:
                load.counts["bench", "failed"] += 1
                load.failures.append(f"bench: not finished {HANG_SECONDS:.0f} s after the load ended")
                return
            if done.returncode:
                load.counts["bench", "failed"] += 1
                load.failures.append(f"bench: {done.stderr[-500:]}")
                return
            result = json.loads(pathlib.Path(folder, "round.json").read_text())
            for outcome, key in (("sent", "num_prompts"), ("answered", "completed"), ("failed", "failed")):
                load.counts["bench", outcome] += result[key]


async def put_under_load(server: LoadedServer, load: Load, arguments: argparse.Namespace) -> dict[str, Any]:
    first_answer = await load.ask()
    seconds, memory = 60 * arguments.minutes, []

    async def watch_memory() -> None:
        # In a thread: the kernel may take seconds over it, in which the server gives up connections that nobody reads.
        begin = time.monotonic()
        for number in range(MEMORY_SAMPLES + 1):
            await asyncio.sleep(begin + seconds * number / MEMORY_SAMPLES - time.monotonic())
            now = round(time.monotonic() - begin)
            memory.append({"seconds": now, **await asyncio.to_thread(server.resident_mb)})

    bench = asyncio.to_thread(bench_rounds, server, arguments.model, load) if arguments.bench else asyncio.sleep(0)
    mix = {load.short: 32, load.long: 4, load.converse: 4, load.leave: 3, load.malformed: 1, load.operate: 1}
    watch = asyncio.create_task(watch_memory())
    await asyncio.gather(load.run(seconds, mix), bench)
    await watch

    async def is_idle() -> bool:
        await load.short()  # vLLM's gauges are those of its last step
        now = await asyncio.to_thread(server.metrics, "vllm:")
        return not (now["num_requests_running"] or now["num_requests_waiting"] or now["kv_compression_resident_tokens"])

    went_idle = await wait_until(is_idle, HANG_SECONDS)
    last_answer = await load.ask()
    numbers = await asyncio.to_thread(server.metrics, "vllm:")
    lines_before = len(server.log)
    async with load.session.post(f"{server.url}/reset_prefix_cache") as response:
        all_pages_free = (await response.json())["success"]
    held = [re.search(r"some blocks \((\d+)\) are not freed", line) for line in server.log[lines_before:]]
    kinds = sorted({kind for kind, _ in load.counts})
    outcomes = ("sent", "answered", "refused", "left", "failed")
    return {
        "minutes": arguments.minutes,
        "requests": {kind: {outcome: load.counts[kind, outcome] for outcome in outcomes} for kind in kinds},
        "seconds_to_whole_answers": {kind: percentiles(load.seconds[kind]) for kind in sorted(load.seconds)},
        "failures": load.failures,
        "preemptions": int(numbers["num_preemptions_total"]),
        "compactions": int(numbers["kv_compression_compactions_total"]),
        "pressure_compactions": int(numbers["kv_compression_pressure_compactions_total"]),
        "evicted_tokens": int(numbers["kv_compression_evicted_tokens_total"]),
        "freed_pages": int(numbers["kv_compression_freed_pages_total"]),
        "prefix_hits": int(numbers["kv_compression_prefix_hits_total"]),
        "prefix_hit_tokens": int(numbers["kv_compression_prefix_hit_tokens_total"]),
        "resumed_requests": int(numbers["kv_compression_resumed_requests_total"]),
        "cache_pages": NUM_PAGES - 1,
        "leaked_pages": 0 if all_pages_free else max((int(match[1]) for match in held if match), default=-1),
        "went_idle": went_idle,
        "same_answer_as_before": last_answer == first_answer,
        "resident_mb": memory,
        "exceptions_in_the_log": dict(collections.Counter(server.exceptions()).most_common(10)),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    found = {f"p{percent}": ordered[int(len(ordered) * percent / 100)] for percent in (50, 90, 99)}
    return {name: round(value, 2) for name, value in {**found, "most": ordered[-1]}.items()}


async def kill(title: str, server: LoadedServer, load: Load) -> dict[str, Any]:
    """Ends a process of the server as the kernel would for want of memory, while it streams."""
    lines_before = len(server.log)
    (victim,) = (pid for pid, name in server.processes().items() if title in name)
    streams = [asyncio.create_task(load.stream_to_the_end()) for _ in range(4)]
    await asyncio.sleep(2)
    begin = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    done, hanging = await asyncio.wait(streams, timeout=HANG_SECONDS)
    seconds_to_clients = round(time.monotonic() - begin, 1)
    for task in hanging:
        task.cancel()
    try:
        status = await asyncio.to_thread(server.process.wait, HANG_SECONDS)
    except subprocess.TimeoutExpired:
        status = None
    seconds_to_end = round(time.monotonic() - begin, 1)

    async def all_ended() -> bool:
        return not await asyncio.to_thread(server.processes)

    await wait_until(all_ended, HANG_SECONDS)  # workers find out by themselves that their engine is gone
    return {
        "clients": len(streams),
        "clients_told": sum(task.result() for task in done),
        "seconds_until_clients_were_told": seconds_to_clients,
        "server_status": status,
        "seconds_until_the_server_ended": seconds_to_end,
        "processes_left": len(server.processes()),
        "seconds_until_all_processes_ended": round(time.monotonic() - begin, 1),
        "log_says_why": any(why in line for line in server.log[lines_before:] for why in ENDS),
    }


async def test(arguments: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    report = {"run": describe_run(), "kills": {}}
    timeout = aiohttp.ClientTimeout(total=600)
    for title in PROCESSES:
        server = LoadedServer(arguments, flags)
        try:
            await asyncio.to_thread(server.wait)
            async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
                load = Load(server, session, arguments.seed)
                if title == PROCESSES[0]:
                    print(f"load, {arguments.minutes:g} minutes ...", file=sys.stderr, flush=True)
                    report["server"] = server.flags
                    report |= await put_under_load(server, load, arguments)
                print(f"kill {title} ...", file=sys.stderr, flush=True)
                report["kills"][title] = await kill(title, server, load)
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the report says that it did not end
                server.stop()
            LOG.parent.mkdir(exist_ok=True)
            LOG.with_suffix(f".{title.rpartition(':')[2]}.log").write_text("".join(server.log))
    return report


def violations(report: dict[str, Any]) -> Iterator[str]:
    for kind, counts in report["requests"].items():
        if counts["failed"] or counts["sent"] != counts["answered"] + counts["refused"] + counts["left"]:
            yield f"{kind} requests failed or were lost: {counts}"
    if not report["preemptions"]:
        yield "nothing was preempted: the cache was not small enough"
    if not report["pressure_compactions"]:
        yield "nothing was compacted for want of pages"
    if report["compactions"] == report["pressure_compactions"]:
        yield "no sequence was compacted that insisted on its budget"
    if report["leaked_pages"]:
        yield f"{report['leaked_pages']} pages are held by nobody"
    for name in ("went_idle", "same_answer_as_before"):
        if not report[name]:
            yield f"not so: {name.replace('_', ' ')}"
    samples = report["resident_mb"]
    halfway, at_end = (sum(sample.values()) - sample["seconds"] for sample in (samples[len(samples) // 2], samples[-1]))
    if at_end > 1.05 * halfway:
        yield f"memory grew from {halfway:.0f} MB halfway through to {at_end:.0f} MB"
    for exception in report["exceptions_in_the_log"]:
        yield f"in the server's log: {exception}"
    for title, kill in report["kills"].items():
        if kill["clients_told"] != kill["clients"]:
            not_told = kill["clients"] - kill["clients_told"]
            yield f"{title} killed: {not_told} clients not told within {HANG_SECONDS:.0f} s"
        if kill["server_status"] is None:
            yield f"{title} killed: the server still runs after {HANG_SECONDS:.0f} s"
        if not kill["log_says_why"]:
            yield f"{title} killed: the server's log does not say so"
        if kill["processes_left"]:
            yield f"{title} killed: {kill['processes_left']} processes of the server are left"


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws memory over time, and how long whole answers took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    samples = report["resident_mb"]
    minutes = [sample["seconds"] / 60 for sample in samples]
    for name in (name for name in samples[0] if name != "seconds"):
        left.plot(minutes, [sample.get(name) for sample in samples], marker=".", label=name)
    left.set_ylim(bottom=0)
    left.set_xlabel("minutes")
    left.set_title("resident MB")
    left.legend()
    for place, (kind, seconds) in enumerate(report["seconds_to_whole_answers"].items()):
        shown = {name: value for name, value in seconds.items() if name.startswith("p")}
        right.plot(list(shown), list(shown.values()), marker="o", color=f"C{place}", label=kind)
    right.set_yscale("log")
    right.set_title("seconds to whole answers, percentiles")
    right.legend()
    for panel in (left, right):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def print_report(report: dict[str, Any]) -> None:
    for key, value in report["run"].items():
        print(f"{key}: {value}")
    print(f"\n{'requests':<12}" + "".join(f"{name:>10}" for name in ("sent", "answered", "refused", "left", "failed")))
    for kind, counts in report["requests"].items():
        print(f"{kind:<12}" + "".join(f"{count:>10}" for count in counts.values()))
    for kind, seconds in report["seconds_to_whole_answers"].items():
        print(f"seconds to whole answers, {kind}: " + ", ".join(f"{name} {value}" for name, value in seconds.items()))
    print()
    shown = (
        "preemptions",
        "compactions",
        "pressure_compactions",
        "evicted_tokens",
        "freed_pages",
        "prefix_hits",
        "prefix_hit_tokens",
        "resumed_requests",
        "leaked_pages",
        "same_answer_as_before",
    )
    for name in shown:
        print(f"{name.replace('_', ' ')}: {report[name]}")
    for sample in report["resident_mb"]:
        print("resident MB: " + ", ".join(f"{name} {value}" for name, value in sample.items()))
    print(f"exceptions in the log: {report['exceptions_in_the_log'] or 'none'}")
    for title, kill in report["kills"].items():
        print(f"{title} killed: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in kill.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of load; default %(default)s")
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--full-size", action="store_true", help="the model as it is")
    parser.add_argument("--no-bench", dest="bench", action="store_false", help="without vllm bench serve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / RESULTS / "load.json")
    arguments, flags = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the server
    report = asyncio.run(test(arguments, flags))
    report["violations"] = list(violations(report))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)
    draw(report, arguments.output.with_suffix(".png"))
    for violation in report["violations"]:
        print(f"VIOLATION: {violation}")
    for failure in report["failures"]:
        print(f"  {failure}")
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
