"""Calls in processes that have imported vLLM and done nothing else: forks of one that has, since importing it takes
longer than most of them live. No thread of that one is running, which a fork would miss.
"""

import itertools
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from vllm.model_executor.models import registry

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__, "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"])


def in_forks(function: Callable[..., Any], *calls: tuple) -> list:
    """What ``function`` returns of the arguments of each call; each in a process of its own, side by side, with the
    environment that this one has now."""
    with ProcessPoolExecutor(len(calls), mp_context=_FORKS, max_tasks_per_child=1) as processes:
        return list(processes.map(_call, itertools.repeat(dict(os.environ)), itertools.repeat(function), calls))


def _call(environment: Mapping[str, str], function: Callable[..., Any], arguments: tuple) -> Any:
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # which PyTorch has looked for before
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    registry._run_in_subprocess = lambda asked: asked()  # see tests/engines.py
    return function(*arguments)
