"""The command ``vllm-qfilters``: calibrates filters, generates from files, evaluates methods, and shows what they keep.

Its engine arguments are vLLM's.

Exit status: 0; 1 if lines of the input failed; 2 for what the user has to change, said in one line; 130 when
interrupted. vLLM is imported only once a subcommand is named.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_qfilters import __version__
from vllm_qfilters.commands.arguments import UsageError, at_least
from vllm_qfilters.commands.evaluation import command as evaluation
from vllm_qfilters.commands.generate import offline
from vllm_qfilters.commands.inspection import command as inspection
from vllm_qfilters.frontend.engine_args import apply_kv_compression

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

MIN_TEXT_TOKENS = 256
_TOKEN_CHARACTERS = 16  # at most, on average: bounds how much of a text is read
_DEFAULT_BLOCK_SIZE = 128  # of vLLM on CPUs
_SHUTDOWN_SECONDS = 30.0


class Subcommand(NamedTuple):
    usage: str
    summary: str
    description: str
    examples: str
    add_options: Callable[[argparse.ArgumentParser], None]
    defaults: dict[str, Any]  # of engine arguments, where they differ from vLLM's
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status. Exits by itself after help and for arguments that cannot be
    parsed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in SUBCOMMANDS:
        _top_parser().parse_args(argv)  # help, version, or an error: exits in any case
    name = argv[0]
    try:
        return SUBCOMMANDS[name].run(parse(name, argv[1:]))
    except UsageError as error:
        print(f"vllm-qfilters {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vllm-qfilters {name}: interrupted", file=sys.stderr)
        return 130


def parse(name: str, argv: Sequence[str]) -> argparse.Namespace:
    """The options of subcommand ``name`` and vLLM's engine arguments. Exits after help, and for what cannot be
    parsed.
    """
    parser = _parser(name)
    try:
        args = parser.parse_args(list(argv))
    except (ValueError, OSError) as error:
        parser.error(_one_line(error))
    except IndexError:
        parser.error(f"{argv[-1]} needs a value")  # vLLM's parser does not check dotted keys
    if (args.model is None) == (args.model_tag is None):
        parser.error(
            "which MODEL?" if args.model is None else f"name one model, not both {args.model_tag} and {args.model}"
        )
    args.model = args.model or args.model_tag
    return args


def calibrate(args: argparse.Namespace) -> int:
    """Makes filters for a model from forward passes over random token ids or texts."""
    if args.kv_compression is not None or args.kv_compression_config is not None:
        raise UsageError("calibration needs no --kv-compression: drop it and its options")
    texts = {path: _read_text(path, args.sequences * args.tokens * _TOKEN_CHARACTERS) for path in args.text}
    if args.output is not None:
        _check_writable(args.output)
    engine_args = _engine_args(args)
    block_size = engine_args.block_size or _DEFAULT_BLOCK_SIZE
    # Nothing is generated: the smallest budget, so that any cache will do.
    smallest = {"budget": 2 * block_size, "interval": block_size, "chunk": block_size, "window": 0, "sinks": 0}
    try:
        apply_kv_compression(engine_args, "random", smallest)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with _engine(engine_args) as llm:
        sequences, description = _calibration_sequences(llm, args, texts)
        output = "" if args.output is None else str(args.output.absolute())
        path = llm.collective_rpc("calibrate_filters", args=(sequences, description, output))[0]
    print(_after_calibration(args, path, description))
    return 0


def generate(args: argparse.Namespace) -> int:
    """Generates a completion for every line of the input."""
    if args.ray is not None and importlib.util.find_spec("ray") is None:
        raise UsageError("--ray needs Ray: pip install 'vllm-qfilters[ray]'")
    engine_args = _engine_args(args)
    if args.ray is not None and engine_args.distributed_executor_backend == "ray":
        raise UsageError("--ray starts engines that each fit into one machine: drop --distributed-executor-backend ray")
    try:
        lines = offline.read_input(args.input)
    except OSError as error:
        raise UsageError(_one_line(error)) from error
    _check_writable(args.output)
    if args.output.exists() and args.output.samefile(args.input):
        raise UsageError(f"--output {args.output} is the input")
    start = functools.partial(_batch_engine, engine_args, args.max_tokens, args.temperature)
    with contextlib.ExitStack() as stack:

        def start_engines() -> offline.GenerateBatches:
            if args.ray is None:
                return functools.partial(map, stack.enter_context(start()))
            from vllm_qfilters.commands.generate.ray import ray_engines

            return stack.enter_context(ray_engines(start, args.ray, _gpus_per_engine(engine_args)))

        try:
            total, resumed, failed = offline.run(lines, args.output, start_engines, args.batch_size)
        except offline.OutputMismatch as error:
            raise UsageError(str(error)) from error
    before = f", {resumed} of them before" if resumed else ""
    print(f"{args.output} has all {total} lines{before}; {failed} failed", file=sys.stderr)
    return 1 if failed else 0


def evaluate(args: argparse.Namespace) -> int:
    """Measures what methods of compression cost in quality."""
    if args.kv_compression is not None or args.kv_compression_config is not None:
        raise UsageError(
            "name what to evaluate by --methods, e.g. qfilters:window=0.25: drop --kv-compression and its options"
        )
    if args.output is None:
        args.output = pathlib.Path(f"quality-{pathlib.Path(args.model).name}.json")
    _check_writable(args.output)
    evaluation.run(args, _engine_args(args))
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Shows on a page which tokens of a prompt the cache kept."""
    from vllm.exceptions import VLLMClientError

    prompt = inspection.read_prompt(args)
    _check_writable(args.output)
    with _engine(_engine_args(args)) as llm:
        token_ids = llm.get_tokenizer().encode(prompt)
        most = llm.model_config.max_model_len - args.max_tokens
        if len(token_ids) > most:
            raise UsageError(
                f"the prompt has {len(token_ids)} tokens, and {most} fit beside --max-tokens {args.max_tokens}: shorten it, or "
                "raise --max-model-len where the model allows it"
            )
        try:
            found = inspection.inspect(llm, token_ids, args.max_tokens)
        except (ValueError, VLLMClientError) as error:
            raise UsageError(_one_line(error)) from error
    print(inspection.write(found, args.output))
    return 0


def batch_generator(llm: "LLM", max_tokens: int, temperature: float) -> offline.GenerateBatch:
    """Generates with ``llm``. A request that it refuses is answered with the reason; the others of the batch run
    together.

    Args:
        max_tokens, temperature: for requests without their own.
    """
    from vllm import RequestOutput
    from vllm.exceptions import VLLMClientError

    def generate_batch(requests: Sequence[offline.Request]) -> list[offline.Completion | offline.Refusal]:
        refusals: list[offline.Refusal | None] = []
        for request in requests:
            try:
                params = _sampling_params(request, max_tokens, temperature)
                if request.messages is None:
                    llm.enqueue(request.prompt, params, use_tqdm=False)
                else:
                    llm.enqueue_chat(request.messages, params, use_tqdm=False)
            except (ValueError, VLLMClientError) as error:
                refusals.append(offline.Refusal(_one_line(error)))
            else:
                refusals.append(None)
        outputs = iter(llm.wait_for_completion(RequestOutput, use_tqdm=False))  # in the order of enqueueing
        return [refusal or _answer(next(outputs)) for refusal in refusals]

    return generate_batch


def text_sequences(texts: dict[pathlib.Path, Sequence[int]], num_sequences: int, num_tokens: int) -> list[list[int]]:
    """Cuts texts into sequences, taking from each in turn.

    Args:
        texts: token ids of each.
        num_sequences: at most.
        num_tokens: per sequence; the rest of a text, if it has ``MIN_TEXT_TOKENS`` at least, is a sequence too.

    Raises:
        UsageError: a text is too short, or there are more than ``num_sequences``.
    """
    if len(texts) > num_sequences:
        raise UsageError(
            f"{len(texts)} texts for {num_sequences} sequences: raise --sequences to {len(texts)} at least"
        )
    least = min(MIN_TEXT_TOKENS, num_tokens)
    cut = []
    for path, token_ids in texts.items():
        if len(token_ids) < least:
            raise UsageError(f"{path} has {len(token_ids)} tokens, a text needs {least} at least: give a longer one")
        pieces = [list(token_ids[start : start + num_tokens]) for start in range(0, len(token_ids), num_tokens)]
        cut.append([piece for piece in pieces if len(piece) >= least])
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*cut))
    return [sequence for sequence in in_turn if sequence is not None][:num_sequences]


def _calibration_sequences(
    llm: "LLM", args: argparse.Namespace, texts: dict[pathlib.Path, str]
) -> tuple[list[list[int]], str]:
    """Token ids to calibrate with, no longer than model and cache allow, and a description of them."""
    from vllm_qfilters.filters.calibrate import random_sequences

    cache = llm.llm_engine.vllm_config.cache_config
    cache_tokens = (cache.num_gpu_blocks - 1) * cache.block_size  # one page is vLLM's null block
    num_tokens = min(args.tokens, llm.model_config.max_model_len - 1, cache_tokens)
    if num_tokens < args.tokens:
        print(
            f"Sequences are {num_tokens} tokens long, not {args.tokens}: model or cache hold no more.", file=sys.stderr
        )
    if not texts:
        sequences = random_sequences(llm.model_config.get_vocab_size(), args.sequences, num_tokens, args.seed)
        return sequences, f"{len(sequences)} sequences of {num_tokens} random token ids (seed {args.seed})"
    tokenizer = llm.get_tokenizer()
    token_ids = {path: tokenizer.encode(text) for path, text in texts.items()}
    sequences = text_sequences(token_ids, args.sequences, num_tokens)
    names = ", ".join(path.name for path in texts)
    return sequences, f"{len(sequences)} sequences, {sum(map(len, sequences))} tokens, of {names}"


def _after_calibration(args: argparse.Namespace, path: str, description: str) -> str:
    how = f"vllm serve {shlex.quote(args.model)} --kv-compression qfilters"
    if args.output is None:
        how += "\nIt finds them by itself, as long as the model is given by this name."
    else:
        how += f" --kv-compression-config.filters {shlex.quote(str(args.output))}"
    return f"\nCalibrated with {description}. The filters are in\n  {args.output or path}\nUse them with\n  {how}"


def _sampling_params(request: offline.Request, max_tokens: int, temperature: float) -> "SamplingParams":
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens if request.max_tokens is None else request.max_tokens,
        temperature=temperature if request.temperature is None else request.temperature,
        extra_args=None if request.kv_budget is None else {"kv_budget": request.kv_budget},
    )


def _answer(output: Any) -> offline.Completion | offline.Refusal:
    """From vLLM's RequestOutput."""
    completion = output.outputs[0]
    if completion.finish_reason in ("abort", "error"):
        return offline.Refusal(f"the engine gave up on it ({completion.finish_reason}), its log says why")
    return offline.Completion(
        text=completion.text,
        finish_reason=completion.finish_reason,
        prompt_tokens=len(output.prompt_token_ids),
        completion_tokens=len(completion.token_ids),
    )


def _engine_args(args: argparse.Namespace) -> "EngineArgs":
    from vllm.engine.arg_utils import EngineArgs

    is_local = args.model.startswith((".", "/", "~"))
    if is_local and not pathlib.Path(args.model).exists():
        raise UsageError(f"{args.model}: no such model folder")
    try:
        return EngineArgs.from_cli_args(args)
    except ValueError as error:
        raise UsageError(_one_line(error)) from error
    except OSError as error:  # from the hub, which does not always say for which model
        raise UsageError(f"{args.model}: {_one_line(error)}") from error


@contextlib.contextmanager
def _engine(engine_args: "EngineArgs") -> Iterator["LLM"]:
    """Starts an engine, and ends it so that nothing is printed behind the result."""
    from vllm import LLM
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    cli_env_setup()
    try:
        llm = LLM.from_engine_args(engine_args)
    except (ValueError, OSError) as error:
        raise UsageError(_one_line(error)) from error
    except RuntimeError as error:
        if not str(error).startswith("Engine core initialization failed"):
            raise
        raise UsageError("the engine did not start, the first error above says why") from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=_SHUTDOWN_SECONDS)


@contextlib.contextmanager
def _batch_engine(engine_args: "EngineArgs", max_tokens: int, temperature: float) -> Iterator[offline.GenerateBatch]:
    with _engine(engine_args) as llm:
        yield batch_generator(llm, max_tokens, temperature)


def _gpus_per_engine(engine_args: "EngineArgs") -> int:
    from vllm.platforms import current_platform

    return 0 if current_platform.is_cpu() else engine_args.tensor_parallel_size * engine_args.pipeline_parallel_size


def _read_text(path: pathlib.Path, num_characters: int) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(num_characters)
    except OSError as error:
        raise UsageError(_one_line(error)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a UTF-8 text: {error}") from error


def _check_writable(path: pathlib.Path) -> None:
    """Before the time of a model load is spent."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder: make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written")


def _one_line(error: Exception) -> str:
    from pydantic import ValidationError

    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    message = (
        error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else str(error)
    )
    return " ".join(message.split())


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number >= 0")
    return value


def _parser(name: str) -> argparse.ArgumentParser:
    """vLLM's parser: its plain help lists engine arguments by group only, so our options are part of the
    description.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_qfilters.frontend.plugin import register

    subcommand = SUBCOMMANDS[name]
    options = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    options.add_argument(
        "model_tag", metavar="MODEL", nargs="?", help="folder or Hugging Face repository; also as --model"
    )
    subcommand.add_options(options)
    parser = FlexibleArgumentParser(
        prog=f"vllm-qfilters {name}",
        usage=f"vllm-qfilters {name} {subcommand.usage} [any engine argument of vLLM]",
        description=f"{subcommand.description}\n\n{options.format_help()}",
        epilog=f"{subcommand.examples}\n\nEngine arguments: --help=all shows every one, --help=WORD those of a group or name.",
        parents=[options],
    )
    load_general_plugins()
    register()  # also where VLLM_PLUGINS leaves it out
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=None, **subcommand.defaults)
    return parser


def _add_calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        type=pathlib.Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"UTF-8 texts of {MIN_TEXT_TOKENS} tokens at least, instead of random token ids",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=pathlib.Path,
        metavar="FILE",
        help="filters file to write (safetensors); without it they go where --kv-compression qfilters looks for them",
    )
    at_most = {"type": at_least(1), "metavar": "N"}
    parser.add_argument("--sequences", default=4, help="sequences to run, at most; default %(default)s", **at_most)
    parser.add_argument("--tokens", default=2048, help="tokens per sequence, at most; default %(default)s", **at_most)


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
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
        type=_temperature,
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
        help="N engines on a Ray cluster (RAY_ADDRESS, or one that is started here), a batch at a time each; batches of an\n"
        "engine that dies are generated again",
    )


def _top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-qfilters",
        description="Tools around vLLM's --kv-compression, which keeps the KV cache of every sequence within a budget.",
        epilog="Example: vllm-qfilters calibrate Qwen/Qwen3-0.6B, then vllm serve Qwen/Qwen3-0.6B --kv-compression qfilters",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands, each with its own --help", metavar="COMMAND", required=True)
    for name, subcommand in SUBCOMMANDS.items():
        commands.add_parser(name, help=subcommand.summary)
    return parser


SUBCOMMANDS = {
    "calibrate": Subcommand(
        usage="MODEL [--text FILE ...] [-o FILE]",
        summary="make the Q-Filters of a model",
        description="Makes the Q-Filters of a model by running random token ids, or your texts, through it.\n"
        "It is needed once per model. --seed picks other random ids.",
        examples="Examples:\n"
        "  vllm-qfilters calibrate Qwen/Qwen3-0.6B\n"
        "  vllm-qfilters calibrate Qwen/Qwen3-0.6B --text novel.txt manual.txt -o qwen3.safetensors",
        add_options=_add_calibrate_options,
        defaults={"enforce_eager": True},  # compiling takes longer than calibrating
        run=calibrate,
    ),
    "generate": Subcommand(
        usage="MODEL --input FILE --output FILE",
        summary="generate completions for a JSONL file, with compressed KV caches",
        description="Generates a completion for every line of a JSONL file, with compressed KV caches:\n"
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
        "run again after an interruption, continues the output.",
        examples="Example:\n"
        "  vllm-qfilters generate Qwen/Qwen3-0.6B --input prompts.jsonl --output answers.jsonl \\\n"
        "      --kv-compression-config.budget 1024 --max-tokens 512 --max-model-len 32768\n"
        "  RAY_ADDRESS=auto vllm-qfilters generate ... --ray 8",
        add_options=_add_generate_options,
        defaults={"kv_compression": "qfilters"},
        run=generate,
    ),
    "eval": Subcommand(
        usage="MODEL [--methods METHOD ...] [--tasks TASK ...] [-o FILE]",
        summary="measure what compression costs in quality",
        description=evaluation.DESCRIPTION,
        examples=evaluation.EXAMPLES,
        add_options=evaluation.add_options,
        defaults=evaluation.ENGINE_DEFAULTS,
        run=evaluate,
    ),
    "inspect": Subcommand(
        usage="MODEL --prompt-file FILE [-o FILE]",
        summary="show on a page which tokens of a prompt the cache keeps",
        description=inspection.DESCRIPTION,
        examples=inspection.EXAMPLES,
        add_options=inspection.add_options,
        defaults=inspection.ENGINE_DEFAULTS,
        run=inspect,
    ),
}
