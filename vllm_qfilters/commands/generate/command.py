"""The command ``vllm-qfilters generate``: from arguments to engines that answer batches of requests."""

import argparse
import contextlib
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from vllm_qfilters.commands.arguments import UsageError, at_least, check_writable, temperature
from vllm_qfilters.commands.engine import one_line, read_engine_args, start_engine
from vllm_qfilters.commands.generate import offline

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

USAGE = "MODEL --input FILE --output FILE"
DESCRIPTION = (
    "Generates a completion for every line of a JSONL file, with compressed KV caches:\n"
    "--kv-compression is qfilters unless given. A line is one of\n\n"
    '  {"prompt": "..."}\n'
    '  {"messages": [{"role": "user", "content": "..."}]}\n\n'
    'and may also have an "id", "max_tokens", "temperature", and "kv_budget" (tokens, or a\n'
    "fraction of the prompt, or 0 for no compression). The output has one line for each, in\n"
    "the same order:\n\n"
    '  {"line": 1, "id": ..., "text": "...", "finish_reason": "stop" or "length",\n'
    '   "prompt_tokens": 9, "completion_tokens": 64}\n'
    '  {"line": 2, "id": ..., "error": "..."}\n\n'
    "A line that fails does not stop the others; the exit status is then 1. The same command,\n"
    "run again after an interruption, continues the output."
)
EXAMPLES = (
    "Example:\n"
    "  vllm-qfilters generate Qwen/Qwen3-0.6B --input prompts.jsonl --output answers.jsonl \\\n"
    "      --kv-compression-config.budget 1024 --max-tokens 512 --max-model-len 32768\n"
    "  RAY_ADDRESS=auto vllm-qfilters generate ... --ray 8"
)
ENGINE_DEFAULTS: dict[str, Any] = {"kv_compression": "qfilters"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``generate``."""
    parser.add_argument("--input", type=pathlib.Path, required=True, metavar="FILE", help="JSONL, one request per line")
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="FILE", help="JSONL, one result per line")
    parser.add_argument(
        "--max-tokens",
        type=at_least(1),
        default=256,
        metavar="N",
        help="tokens to generate for a line without its own max_tokens, at most; default %(default)s",
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="of sampling, for a line without its own; default 0, always the most likely token",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=64,
        metavar="N",
        help="lines generated at once and then written; default %(default)s",
    )
    parser.add_argument(
        "--ray",
        type=at_least(1),
        metavar="N",
        help="N engines on a Ray cluster (RAY_ADDRESS, or one that is started here), a batch at a time each; "
        "batches of an\nengine that dies are generated again",
    )


def run(args: argparse.Namespace) -> int:
    """Generates a completion for every line of the input."""
    if args.ray is not None and importlib.util.find_spec("ray") is None:
        raise UsageError("--ray needs Ray: pip install 'vllm-qfilters[ray]'")
    engine_args = read_engine_args(args)
    if args.ray is not None and engine_args.distributed_executor_backend == "ray":
        raise UsageError("--ray starts engines that each fit into one machine: drop --distributed-executor-backend ray")
    try:
        lines = offline.read_input(args.input)
    except OSError as error:
        raise UsageError(one_line(error)) from error
    check_writable(args.output)
    if args.output.exists() and args.output.samefile(args.input):
        raise UsageError(f"--output {args.output} is the input")
    with contextlib.ExitStack() as stack:
        start_engines = functools.partial(_start_engines, stack, args, engine_args)
        try:
            total, resumed, failed = offline.run(lines, args.output, start_engines, args.batch_size)
        except offline.OutputMismatch as error:
            raise UsageError(str(error)) from error
    before = f", {resumed} of them before" if resumed else ""
    print(f"{args.output} has all {total} lines{before}; {failed} failed", file=sys.stderr)
    return 1 if failed else 0


def batch_generator(llm: "LLM", max_tokens: int, temperature: float) -> offline.GenerateBatch:
    """Returns a function that generates with ``llm``. A request that the engine refuses is answered with the reason;
    the others of its batch run together.

    Args:
        max_tokens, temperature: apply to requests without their own.
    """
    from vllm import RequestOutput
    from vllm.exceptions import VLLMClientError

    def generate_batch(requests: Sequence[offline.Request]) -> list[offline.Answer]:
        refusals: list[offline.Refusal | None] = []
        for request in requests:
            try:
                _enqueue(llm, request, _sampling_params(request, max_tokens, temperature))
            except (ValueError, VLLMClientError) as error:
                refusals.append(offline.Refusal(one_line(error)))
            else:
                refusals.append(None)
        outputs = iter(llm.wait_for_completion(RequestOutput, use_tqdm=False))  # in the order of enqueueing
        return [refusal or _answer(next(outputs)) for refusal in refusals]

    return generate_batch


def _start_engines(
    stack: contextlib.ExitStack, args: argparse.Namespace, engine_args: "EngineArgs"
) -> offline.GenerateBatches:
    """Starts one engine here, or with ``--ray`` several on a cluster; ``stack`` ends them."""
    start = functools.partial(_batch_engine, engine_args, args.max_tokens, args.temperature)
    if args.ray is None:
        return functools.partial(map, stack.enter_context(start()))
    from vllm_qfilters.commands.generate.ray import ray_engines

    return stack.enter_context(ray_engines(start, args.ray, _gpus_per_engine(engine_args)))


@contextlib.contextmanager
def _batch_engine(engine_args: "EngineArgs", max_tokens: int, temperature: float) -> Iterator[offline.GenerateBatch]:
    with start_engine(engine_args) as llm:
        yield batch_generator(llm, max_tokens, temperature)


def _gpus_per_engine(engine_args: "EngineArgs") -> int:
    from vllm.platforms import current_platform

    return 0 if current_platform.is_cpu() else engine_args.tensor_parallel_size * engine_args.pipeline_parallel_size


def _enqueue(llm: "LLM", request: offline.Request, params: "SamplingParams") -> None:
    if request.prompt is not None:
        llm.enqueue(request.prompt, params, use_tqdm=False)
    else:
        messages = cast("Any", request.messages)
        llm.enqueue_chat(messages, params, use_tqdm=False)


def _sampling_params(request: offline.Request, max_tokens: int, temperature: float) -> "SamplingParams":
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens if request.max_tokens is None else request.max_tokens,
        temperature=temperature if request.temperature is None else request.temperature,
        extra_args=None if request.kv_budget is None else {"kv_budget": request.kv_budget},
    )


def _answer(output: "RequestOutput") -> offline.Answer:
    """Makes an answer from what the engine returned for a request."""
    completion = output.outputs[0]
    if completion.finish_reason in ("abort", "error"):
        return offline.Refusal(f"the engine gave up on it ({completion.finish_reason}), its log says why")
    return offline.Completion(
        text=completion.text,
        finish_reason=completion.finish_reason,
        prompt_tokens=len(output.prompt_token_ids or ()),
        completion_tokens=len(completion.token_ids),
    )
