"""``vllm-qfilters generate --ray N``: gives each batch to a free one of N engines, which are Ray actors on one machine
or many.

Ray starts an actor anew, on another machine if need be, when its process dies or its engine raises what is no refusal;
the actor then gets its batch again. Answers are handed on in the order of the batches, each once: what an actor said
before it died is lost with it. This module runs in the process of the command, :class:`Engine` in processes of Ray, so
that all machines need this package installed.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from vllm_qfilters.commands.arguments import UsageError
from vllm_qfilters.commands.generate.offline import Answer, GenerateBatch, GenerateBatches, Request

TRIES = 3  # how often a batch is tried before it is taken for the reason why engines die
_AHEAD = 4  # how many batches per engine may be finished before the oldest unfinished one is

Batch = Sequence[Request]
StartEngine = Callable[[], contextlib.AbstractContextManager[GenerateBatch]]


class Engine:
    """An actor. It starts its engine with its first batch, and again with the next one after it was restarted."""

    def __init__(self, start: StartEngine) -> None:
        self._start = start
        self._lifetime = contextlib.ExitStack()
        self._generate_batch: GenerateBatch | None = None

    def generate(self, requests: Batch) -> Sequence[Answer]:
        try:
            if self._generate_batch is None:
                self._generate_batch = self._lifetime.enter_context(self._start())
            return self._generate_batch(requests)
        except UsageError:
            raise
        except Exception:
            # What is left of the engine, and of its processes, is not to be trusted.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


@contextlib.contextmanager
def ray_engines(start: StartEngine, num_engines: int, gpus_per_engine: int) -> Iterator[GenerateBatches]:
    """Connects to the cluster that RAY_ADDRESS or a ``ray start`` on this machine names, or starts one here for this
    long.

    Args:
        start: starts an engine in the actor, and ends it; it must be picklable.
        num_engines: how many actors there are at most; there are fewer if there are fewer batches.
        gpus_per_engine: 0 on CPUs, whose cores the engines then share out.

    Raises:
        UsageError: the cluster has no room for the engines. Generating raises it too, if an engine does not start, or
            if engines died ``TRIES`` times on one batch.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here reports to nobody
    environment = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "HF_"))}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # with one process per engine no part of it survives another
    with _connection():
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = cores_per_engine(nodes, num_engines, gpus_per_engine)
        if not gpus_per_engine:
            environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else every engine binds to the same cores
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(cores))
        actor = ray.remote(Engine).options(
            num_cpus=cores,
            num_gpus=gpus_per_engine,
            max_restarts=-1,
            max_task_retries=TRIES - 1,
            runtime_env={"env_vars": environment},
        )
        engines: list[Any] = []  # actor handles

        def generate(batches: Sequence[Batch]) -> Iterator[Sequence[Answer]]:
            engines.extend(actor.remote(start) for _ in range(min(num_engines, len(batches))))
            return _generate(engines, batches)

        try:
            yield generate
        finally:
            for engine in engines:
                ray.kill(engine)


def cores_per_engine(nodes: Sequence[Mapping[str, float]], num_engines: int, gpus_per_engine: int) -> int:
    """Returns the cores for each engine: one beside its GPUs, or without GPUs as many as all engines can have.

    Args:
        nodes: the resources of each machine, as Ray names them.
        num_engines: how many engines need room.
        gpus_per_engine: 0 on CPUs.

    Raises:
        UsageError: not all engines fit. Ray would wait for the missing ones, and the command with it.
    """

    def room(cores: int) -> int:
        by_gpus = (node.get("GPU", 0) // gpus_per_engine if gpus_per_engine else num_engines for node in nodes)
        return sum(int(min(node.get("CPU", 0) // cores, engines)) for node, engines in zip(nodes, by_gpus, strict=True))

    most = 1 if gpus_per_engine else int(sum(node.get("CPU", 0) for node in nodes)) // num_engines
    for cores in range(most, 0, -1):
        if room(cores) >= num_engines:
            return cores
    of_each = f"{gpus_per_engine} GPUs and a core" if gpus_per_engine else "a core"
    raise UsageError(f"--ray {num_engines}: with {of_each} for each engine the cluster has room for {room(1)}")


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    """Keeps this process connected with a cluster; if it is not yet, it connects for this long."""
    if ray.is_initialized():
        yield
    else:
        with ray.init():
            yield


def _generate(engines: Sequence[Any], batches: Sequence[Batch]) -> Iterator[Sequence[Answer]]:
    """Yields the answers to each batch, in order.

    Args:
        engines: handles of the actors.
        batches: all batches.
    """
    idle, begun = list(engines), 0
    running: dict[ray.ObjectRef[Any], tuple[int, Any]] = {}  # by the answers to come: a batch's number, and its engine
    finished: dict[int, Sequence[Answer]] = {}  # by the number of the batch
    for index in range(len(batches)):
        while index not in finished:
            while idle and begun < min(len(batches), index + _AHEAD * len(engines)):
                engine = idle.pop()
                running[engine.generate.remote(batches[begun])] = (begun, engine)
                begun += 1
            (done,), _ = ray.wait(list(running))
            number, engine = running.pop(done)
            finished[number] = _answers(done, batches[number])
            idle.append(engine)
        yield finished.pop(index)


def _answers(done: "ray.ObjectRef[Any]", batch: Batch) -> Sequence[Answer]:
    try:
        return ray.get(done)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise UsageError(
            f"input lines {batch[0].line} to {batch[-1].line}: their engine died {TRIES} times, its output above says "
            "why; the output has what comes before them, and the same command continues it"
        ) from error
