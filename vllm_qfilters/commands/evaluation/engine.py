"""Runs requests on an engine in a process of its own, so that one engine's memory is free before the next one
starts.
"""

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from vllm_qfilters.commands.evaluation.tasks import EvalAnswer, EvalRequest

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
    from vllm.engine.arg_utils import EngineArgs

PROGRESS_SECONDS = 0.5  # between two events that say how far an engine has come


class EngineError(Exception):
    """The engine did not start, or gave up; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class EngineStarted:
    """The engine runs.

    Attributes:
        configuration: what the engine was configured with, as JSON.
    """

    configuration: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the engine has come.

    Attributes:
        tokens: of prompts and answers of requests that are not finished, as many as were computed; fewer than before
            where one was preempted.
    """

    tokens: int


@dataclasses.dataclass(frozen=True)
class RequestFinished:
    """A request is answered.

    Attributes:
        index: the place of the request among those the engine was given.
    """

    index: int
    answer: EvalAnswer


@dataclasses.dataclass(frozen=True)
class EngineFinished:
    """All requests are answered.

    Attributes:
        evicted_tokens: tokens evicted, summed over all requests.
    """

    evicted_tokens: int


EngineEvent = EngineStarted | Progress | RequestFinished | EngineFinished


def run_engine(engine_args: "EngineArgs", requests: Sequence[EvalRequest]) -> Iterator[EngineEvent]:
    """Starts an engine with KV compression, runs ``requests`` on it, and ends it, also if the caller stops listening.

    Raises:
        EngineError: the engine does not start, refuses a request, or dies; what it printed is on stderr.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # for the child, whose log would break up the progress bar
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_child, args=(engine_args, requests, sender), name="vllm-qfilters-eval")
    process.start()
    sender.close()
    try:
        while True:
            try:
                event = receiver.recv()
            except EOFError:
                process.join()
                raise EngineError(
                    f"the engine died (exit status {process.exitcode}), its output above says why"
                ) from None
            if isinstance(event, EngineError):
                raise event
            yield event
            if isinstance(event, EngineFinished):
                process.join()
                return
    finally:
        if process.is_alive():
            process.terminate()
        process.join()


def serve(engine_args: "EngineArgs", requests: Sequence[EvalRequest]) -> Iterator[EngineEvent]:
    """Does what :func:`run_engine` does, in this process.

    Raises:
        ValueError, OSError: the engine does not start, or refuses a request.
    """
    from vllm import LLM, RequestOutput

    llm = LLM.from_engine_args(engine_args)
    yield EngineStarted(_configuration(llm))
    for index, request in enumerate(requests):
        _add(llm, index, request)
    core: Any = llm.llm_engine.engine_core  # holds the scheduler itself, since the engine runs in this process
    scheduler = core.engine_core.scheduler
    said = time.monotonic()
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            assert isinstance(output, RequestOutput), "the engine generates"
            if output.finished:
                yield RequestFinished(int(output.request_id), _answer(output))
        if time.monotonic() - said >= PROGRESS_SECONDS:
            yield Progress(sum(request.num_computed_tokens for request in scheduler.requests.values()))
            said = time.monotonic()
    yield EngineFinished(scheduler.compression_stats.evicted_tokens)


def _run_child(engine_args: "EngineArgs", requests: Sequence[EvalRequest], sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler is read from, and errors arrive as they are
    try:
        for event in serve(engine_args, requests):
            sender.send(event)
    except (ValueError, OSError) as error:
        sender.send(EngineError(" ".join(str(error).split())))


def _add(llm: "LLM", index: int, request: EvalRequest) -> None:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(
        max_tokens=request.max_tokens,
        prompt_logprobs=0 if request.wants_losses else None,  # those of the prompt's own tokens alone
        detokenize=not request.wants_losses,
        extra_args={"kv_budget": request.kv_budget},
        **request.sampling,
    )
    llm.llm_engine.add_request(str(index), TokensPrompt(prompt_token_ids=request.token_ids), params)


def _answer(output: "RequestOutput") -> EvalAnswer:
    completion = output.outputs[0]
    if completion.finish_reason in ("abort", "error"):
        raise ValueError(f"the engine gave up on a request ({completion.finish_reason}), its log says why")
    return EvalAnswer(
        token_ids=list(completion.token_ids),
        text=completion.text,
        finish_reason=completion.finish_reason,
        losses=_losses(output),
    )


def _losses(output: "RequestOutput") -> list[float]:
    """Returns the loss of each prompt token from the second on, in nats; none if the request did not ask for them."""
    if not output.prompt_logprobs:
        return []
    predicted = zip(output.prompt_token_ids or [], output.prompt_logprobs, strict=True)
    return [-logprobs[token].logprob for token, logprobs in predicted if logprobs is not None]  # the first has none


def _configuration(llm: "LLM") -> dict[str, Any]:
    from vllm_qfilters.kernels import IMPLEMENTATION
    from vllm_qfilters.policy import Policy

    config = llm.llm_engine.vllm_config
    policy = Policy.from_vllm_config(config)
    assert policy is not None, "every engine of an evaluation is started with KV compression"
    return {
        "kv_compression": policy.to_dict(),
        "kernels": IMPLEMENTATION,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "max_model_len": config.model_config.max_model_len,
        "block_size": config.cache_config.block_size,
        "num_gpu_blocks": config.cache_config.num_gpu_blocks,
        "enable_prefix_caching": config.cache_config.enable_prefix_caching,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "enforce_eager": config.model_config.enforce_eager,
    }
