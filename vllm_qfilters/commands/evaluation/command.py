"""The command ``vllm-qfilters eval``: from arguments to a file of results, a table and plots."""

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm_qfilters.commands.arguments import UsageError, at_least, check_writable, temperature
from vllm_qfilters.commands.engine import read_engine_args
from vllm_qfilters.commands.evaluation import copying, generations, ruler, tasks, texts
from vllm_qfilters.commands.evaluation.engine import EngineError, run_engine
from vllm_qfilters.commands.evaluation.environment import describe_run
from vllm_qfilters.commands.evaluation.evaluate import evaluate, plan
from vllm_qfilters.commands.evaluation.judge import judge, unjudged
from vllm_qfilters.commands.evaluation.methods import Method
from vllm_qfilters.commands.evaluation.recall import recall_task
from vllm_qfilters.commands.evaluation.report import report
from vllm_qfilters.commands.evaluation.results import Results
from vllm_qfilters.methods.catalog import METHODS

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

DEFAULT_METHODS = ("qfilters", "qfilters:filter=static,granularity=head", "streaming", "knorm", "keydiff", "random")
TASKS = {
    "streaming": "loss over long texts, the cache cut to the budget after every --chunk tokens",
    "prompt": "loss of the tokens after a prompt that was cut to a fraction",
    "passkey": "a number hidden in a text, asked for at the end of the prompt",
    "kv": "one of several numbers hidden in a text, asked for at the end of the prompt",
    "generation": "repetition and endings of long generations",
    "ruler": "questions about long prompts, of the kinds of RULER",
    "recall": "a fact stated while text streams, asked for --distances tokens later",
    "copy": "a table or code of the prompt written out with one change",
}
DEFAULT_TASKS = ("streaming", "prompt", "passkey", "kv", "generation")
CONTINUATION_TOKENS = 256
HELD_BACK_SEEDS = 1 << 20  # what is added to the seed

_SEVERAL: dict[str, Any] = {"nargs": "+"}
_COUNT: dict[str, Any] = {"type": at_least(1), "metavar": "N"}

USAGE = "MODEL [--methods METHOD ...] [--tasks TASK ...] [-o FILE]"
ENGINE_DEFAULTS: dict[str, Any] = {
    "block_size": 32,  # budgets are met to the block, and an interval is one block
    "max_num_batched_tokens": 512,  # logits of as many positions are held at once
    "kv_cache_memory_bytes": 1 << 30,
    "enforce_eager": True,  # every method has an engine of its own to start
}
DESCRIPTION = (
    "Measures what compression costs in quality, on the engine itself: every method and the full\n"
    "cache, on the same requests. Writes a file of results (JSON) cell by cell, prints tables, and\n"
    "draws plots beside the file. The same command continues an interrupted run, and measures only\n"
    "what is missing after methods, tasks or budgets are added, whatever version measured the\n"
    "rest: give another file to measure it anew. A METHOD is one of\n"
    f"{', '.join(METHODS)}, with options as in\n"
    "qfilters:filter=static,granularity=head. The tasks:\n\n"
    + "\n".join(f"  {name:<11}{text}" for name, text in TASKS.items())
)
EXAMPLES = (
    "Examples:\n"
    "  vllm-qfilters eval Qwen/Qwen3-0.6B\n"
    "  vllm-qfilters eval Qwen/Qwen3-0.6B --methods qfilters qfilters:window=0.25 streaming \\\n"
    "      --tasks streaming --text prose novel.txt --budgets 512 -o windows.json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``eval``: what is measured, then how, task by task."""
    _add_choices(parser)
    _add_loss_options(parser)
    _add_prompt_options(parser)
    _add_generation_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measures what methods of compression cost in quality."""
    if args.kv_compression is not None or args.kv_compression_config is not None:
        raise UsageError(
            "name what to evaluate by --methods, e.g. qfilters:window=0.25: drop --kv-compression and its options"
        )
    if args.output is None:
        args.output = pathlib.Path(f"quality-{pathlib.Path(args.model).name}.json")
    check_writable(args.output)
    engine_args = read_engine_args(args)
    if not args.no_plots and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib: pip install 'vllm-qfilters[eval]', or give --no-plots")
    results = _measure(args, engine_args)
    print(report(results))
    print(f"Results are in {args.output}", file=sys.stderr)
    if not args.no_plots:
        from vllm_qfilters.commands.evaluation.plots import draw

        for path in draw(results):
            print(f"Plot in {path}", file=sys.stderr)
    return 0


def make_tasks(args: argparse.Namespace, model_config: Any, seed: int) -> list[tasks.Task]:
    """Makes the tasks that are asked for.

    Args:
        args: the options of ``eval``.
        model_config: vLLM's configuration of the model.
        seed: chooses needles, and samples generations.

    Raises:
        ValueError: there is not enough text for a task, or the model takes fewer tokens than it needs.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    read = texts.read_texts(args.text)
    budgets, fractions = list(dict.fromkeys(args.budgets)), list(dict.fromkeys(args.fractions))
    chosen: list[tasks.Task] = []
    if "streaming" in args.tasks:
        chosen.append(
            _loss_task("streaming", tokenizer, read, args.sequences, args.tokens, args.chunk, args.loss_from, budgets)
        )
    for length in dict.fromkeys(args.lengths):
        if "prompt" in args.tasks:
            tokens = length + CONTINUATION_TOKENS
            chosen.append(
                _loss_task(f"prompt-{length}", tokenizer, read, args.prompts, tokens, length, length, fractions)
            )
        for name in ("passkey", "kv"):
            if name in args.tasks:
                trials, filler = (args.depths, args.trials, seed), read[0].content
                chosen.append(tasks.retrieval_task(name, tokenizer, filler, length, *trials, fractions))
        if "ruler" in args.tasks:
            kinds, filler = list(dict.fromkeys(args.ruler)), read[0].content
            chosen.append(ruler.ruler_task(tokenizer, filler, length, kinds, args.repeats, seed, fractions))
        if "copy" in args.tasks:
            kinds = list(dict.fromkeys(args.copy))
            chosen.append(copying.copy_task(tokenizer, length, kinds, args.repeats, seed, fractions))
    if "recall" in args.tasks:
        for distance in dict.fromkeys(args.distances):
            streamed = (read[0].content, distance, args.chunk)
            chosen.append(recall_task(tokenizer, *streamed, args.repeats, seed, budgets))
    if "generation" in args.tasks:
        lengths = (args.generations, args.generation_tokens)
        options = {"context": args.generation_context, "temperature": args.generation_temperature}
        options |= {"penalty": args.generation_penalty, "ignore_eos": args.generation_full_length}
        options["is_held_back"] = args.held_back
        chosen.append(generations.generation_task(tokenizer, *lengths, seed, budgets, read, **options))
    for task in chosen:
        most = model_config.max_model_len
        if task.max_length > most:
            raise ValueError(f"{task.name} needs {task.max_length} tokens, the model takes {most}: ask for less")
    return chosen


def _measure(args: argparse.Namespace, engine_args: "EngineArgs") -> Results:
    """Measures the cells that the file of results does not have yet.

    Args:
        args: the options of ``eval``, and ``model``.
        engine_args: the arguments of all engines, without KV compression.

    Raises:
        UsageError: arguments do not fit together, or an engine does not start.
    """
    try:
        methods = [Method.parse(text) for text in dict.fromkeys(args.methods)]
        results = Results(args.output, args.model)
        assert engine_args.block_size is not None, "ENGINE_DEFAULTS has one"
        model_config = engine_args.create_model_config()
        seed = engine_args.seed + HELD_BACK_SEEDS * args.held_back
        chosen = make_tasks(args, model_config, seed)
        results.check_settings(chosen)
        results.check_dtype(str(model_config.dtype).removeprefix("torch."))
        jobs = plan(methods, chosen, results, engine_args.block_size)
    except (ValueError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if jobs:
        if engine_args.max_model_len is None:
            engine_args.max_model_len = _max_model_len(model_config, chosen)
        results.start_run(describe_run())
        try:
            evaluate(jobs, results, engine_args, run_engine)
        except EngineError as error:
            raise UsageError(f"{error}; the same command continues") from error
        except KeyboardInterrupt:
            print(f"{args.output} has what was measured; the same command continues", file=sys.stderr)
            raise
    else:
        print(f"{args.output} has all of this already: nothing is measured", file=sys.stderr)
    if args.judge and unjudged(results, args.judge):
        if not jobs:
            results.start_run(describe_run())
        try:
            judge(results, engine_args, args.judge, run_engine)
        except (EngineError, ValueError, OSError) as error:
            raise UsageError(f"--judge {args.judge}: {' '.join(str(error).split())}") from error
    return results


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose methods, tasks, budgets and texts."""
    add = parser.add_argument
    add(
        "--methods", **_SEVERAL, default=DEFAULT_METHODS, metavar="METHOD", help=f"default: {' '.join(DEFAULT_METHODS)}"
    )
    default_tasks = f"default: {' '.join(DEFAULT_TASKS)}"
    add("--tasks", **_SEVERAL, default=list(DEFAULT_TASKS), choices=TASKS, metavar="TASK", help=default_tasks)
    add("-o", "--output", type=pathlib.Path, metavar="FILE", help="results; default quality-MODEL.json")
    add("--no-plots", action="store_true", help="draw none: needs no matplotlib")
    held_back = "other needles, facts, tables and prompts of generation, to confirm what was chosen on the usual ones"
    add("--held-back", action="store_true", help=held_back)
    budgets = "of streaming, recall and generation, tokens; default 256 512 1024"
    add("--budgets", **_SEVERAL, **_COUNT, default=[256, 512, 1024], help=budgets)
    fractions = "budgets of the other tasks, fractions of the prompt; default .5 .25 .125"
    add("--fractions", **_SEVERAL, type=_fraction, metavar="F", default=[0.5, 0.25, 0.125], help=fractions)
    described = "; ".join(f"{name}: {text}" for name, text in texts.DESCRIPTIONS.items())
    files = f"files, or some of {described}; default: these"
    add("--text", **_SEVERAL, default=list(texts.TEXTS), metavar="TEXT", help=files)


def _add_loss_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the tasks ``streaming`` and ``recall``."""
    add = parser.add_argument
    add("--sequences", **_COUNT, default=5, help="of streaming, taken from the texts in turn; default %(default)s")
    add("--tokens", **_COUNT, default=4096, help="of such a sequence; default %(default)s")
    add("--loss-from", **_COUNT, default=1024, help="position in it from which loss is measured; default %(default)s")
    add("--chunk", **_COUNT, default=128, help="tokens between two cuts of both; default %(default)s")
    distances = "tokens between the fact and the question of recall; default 2048"
    add("--distances", **_SEVERAL, **_COUNT, default=[2048], help=distances)


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the tasks with questions at the end of a prompt, and of ``prompt``."""
    add = parser.add_argument
    lengths = "tokens, of the prompts of prompt, passkey, kv, ruler and copy; default 1024"
    add("--lengths", **_SEVERAL, **_COUNT, default=[1024], help=lengths)
    add("--prompts", **_COUNT, default=8, help="number of prompts of prompt; default %(default)s")
    depths: dict[str, Any] = {
        "default": [0, 0.2, 0.4, 0.6, 0.8, 1],
        "metavar": "D",
        "help": "of passkey and kv, 0 to 1",
    }
    add("--depths", **_SEVERAL, type=_depth, **depths)
    add("--trials", **_COUNT, default=4, help="of passkey and kv, per depth; default %(default)s")
    add("--ruler", **_SEVERAL, choices=ruler.KINDS, default=list(ruler.KINDS), metavar="KIND", help=_kinds(ruler.KINDS))
    kinds_to_copy = _kinds(copying.KINDS)
    add("--copy", **_SEVERAL, choices=copying.KINDS, default=list(copying.KINDS), metavar="KIND", help=kinds_to_copy)
    add("--repeats", **_COUNT, default=8, help="prompts of each kind of ruler, copy and recall; default %(default)s")


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the task ``generation``."""
    add = parser.add_argument
    add("--generations", **_COUNT, default=4, help="number of prompts of generation; default %(default)s")
    add("--generation-tokens", **_COUNT, default=512, help="most tokens of a generation; default %(default)s")
    context = "tokens of the texts, taken in turn, before each prompt of generation; default %(default)s"
    add("--generation-context", type=at_least(0), metavar="N", default=0, help=context)
    sampling: dict[str, Any] = {
        "default": generations.TEMPERATURE,
        "help": "of sampling in generation; default %(default)s",
    }
    add("--generation-temperature", type=temperature, metavar="T", **sampling)
    penalty = "repetition penalty of sampling in generation; default %(default)s, none"
    add("--generation-penalty", type=_penalty, metavar="P", default=generations.PENALTY, help=penalty)
    full_length = "generate --generation-tokens tokens, whether the model would end or not"
    add("--generation-full-length", action="store_true", help=full_length)
    judged_by = "a model that says how likely the last third of each generation is, in bits per byte; default none"
    add("--judge", metavar="MODEL", help=judged_by)


def _max_model_len(model_config: Any, chosen: Sequence[tasks.Task]) -> int:
    """Returns the context that engines need. Filters calibrated here stay for other engines, so whole calibration
    sequences fit into it.
    """
    from vllm_qfilters.filters.calibrate import SEQUENCE_TOKENS

    return min(int(model_config.max_model_len), max(SEQUENCE_TOKENS + 1, *(task.max_length for task in chosen)))


def _loss_task(
    name: str,
    tokenizer: Any,
    read: Sequence[texts.Text],
    num_sequences: int,
    num_tokens: int,
    chunk: int,
    loss_from: int,
    budgets: Sequence[int | float],
) -> tasks.LossTask:
    if loss_from >= num_tokens:
        raise ValueError(f"--loss-from {loss_from} is not within sequences of --tokens {num_tokens}")
    settings = {
        "sequences": num_sequences,
        "tokens": num_tokens,
        "chunk": chunk,
        "loss_from": loss_from,
        "texts": {text.name: texts.digest(text.content) for text in read[:num_sequences]},
    }
    sequences = texts.cut(read, tokenizer, num_sequences, num_tokens)
    return tasks.LossTask(name, budgets, sequences, chunk, loss_from, settings)


def _fraction(text: str) -> float:
    return _number(text, "fraction", lambda value: 0 < value <= 1, "0 < F <= 1")


def _kinds(kinds: Iterable[str]) -> str:
    return f"kinds, some of {', '.join(kinds)}; default: all"


def _penalty(text: str) -> float:
    return _number(text, "repetition penalty", lambda value: 0 < value < float("inf"), "P > 0")


def _depth(text: str) -> float:
    return _number(text, "depth", lambda value: 0 <= value <= 1, "0 <= D <= 1")


def _number(text: str, name: str, is_good: Any, valid: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not is_good(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no {name}: {valid}")
    return value
