"""The command ``vllm-qfilters calibrate``: makes filters for a model by running token sequences through it."""

import argparse
import itertools
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_qfilters.commands.arguments import UsageError, at_least, check_writable
from vllm_qfilters.commands.engine import one_line, read_engine_args, start_engine
from vllm_qfilters.frontend.engine_args import apply_kv_compression
from vllm_qfilters.policy import Policy

if TYPE_CHECKING:
    from vllm import LLM

MIN_TEXT_TOKENS = 256
_TOKEN_CHARACTERS = 16  # the most that tokens have on average: it bounds how much of a text is read
_DEFAULT_BLOCK_SIZE = 128  # tokens; vLLM's default on CPUs

USAGE = "MODEL [--text FILE ...] [--rank N] [-o FILE]"
DESCRIPTION = (
    "Makes the Q-Filters of a model by running random token ids, or your texts, through it.\n"
    "It is needed once per model. --seed picks other random ids."
)
EXAMPLES = (
    "Examples:\n"
    "  vllm-qfilters calibrate Qwen/Qwen3-0.6B\n"
    "  vllm-qfilters calibrate Qwen/Qwen3-0.6B --text novel.txt manual.txt -o qwen3.safetensors"
)
ENGINE_DEFAULTS: dict[str, Any] = {"enforce_eager": True}  # compiling takes longer than calibrating


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``calibrate``."""
    from vllm_qfilters.filters.format import STORED_RANK

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
    at_most: dict[str, Any] = {"type": at_least(1), "metavar": "N"}
    parser.add_argument("--sequences", help="sequences to run, at most; default: one, or one of each text", **at_most)
    parser.add_argument("--tokens", default=2048, help="tokens per sequence, at most; default %(default)s", **at_most)
    parser.add_argument(
        "--rank",
        default=STORED_RANK,
        help="the largest option rank that the filters are to be used with; default %(default)s",
        **at_most,
    )


def run(args: argparse.Namespace) -> int:
    """Makes filters for a model from forward passes over random token ids or texts."""
    if args.kv_compression is not None or args.kv_compression_config is not None:
        raise UsageError("calibration needs no --kv-compression: drop it and its options")
    if args.load_format == "dummy" and args.output is None:
        raise UsageError(
            "filters of random weights are not for the cache: name a file (-o), or drop --load-format dummy"
        )
    args.sequences = args.sequences or max(1, len(args.text))
    texts = {path: _read_text(path, args.sequences * args.tokens * _TOKEN_CHARACTERS) for path in args.text}
    if args.output is not None:
        check_writable(args.output)
    engine_args = read_engine_args(args)
    block_size = engine_args.block_size or _DEFAULT_BLOCK_SIZE
    # Nothing is generated: with the smallest budget any cache is large enough.
    smallest = {"budget": 2 * block_size, "interval": block_size, "chunk": block_size, "window": 0, "sinks": 0}
    try:
        apply_kv_compression(engine_args, "random", smallest)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with start_engine(engine_args) as llm:
        sequences, description = _calibration_sequences(llm, args, texts)
        output = "" if args.output is None else str(args.output.absolute())
        path = llm.collective_rpc("calibrate_filters", args=(sequences, description, output, args.rank))[0]
    print(_said_after(args, path, description))
    return 0


def text_sequences(texts: Mapping[pathlib.Path, Sequence[int]], num_sequences: int, num_tokens: int) -> list[list[int]]:
    """Cuts texts into sequences, taking one from each text in turn.

    Args:
        texts: the token ids of each text.
        num_sequences: how many sequences there are at most.
        num_tokens: tokens per sequence; the rest of a text, if it has ``MIN_TEXT_TOKENS`` at least, is a sequence too.

    Raises:
        UsageError: a text is too short, or there are more texts than ``num_sequences``.
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
    llm: "LLM", args: argparse.Namespace, texts: Mapping[pathlib.Path, str]
) -> tuple[list[list[int]], str]:
    """Returns the token ids to calibrate with, no longer than model and cache allow, and a description of them."""
    from vllm_qfilters.filters.calibrate import describe, random_sequences

    cache = llm.llm_engine.vllm_config.cache_config
    assert cache.num_gpu_blocks is not None, "a running engine knows the size of its cache"
    policy = Policy.from_vllm_config(llm.llm_engine.vllm_config)
    assert policy is not None, "the command switches KV compression on"
    num_pages = (cache.num_gpu_blocks - 1) // (1 + policy.beside.number)  # of each group; one is vLLM's null block
    cache_tokens = num_pages * cache.block_size
    num_tokens = min(args.tokens, llm.model_config.max_model_len - 1, cache_tokens)
    if num_tokens < args.tokens:
        print(
            f"Sequences are {num_tokens} tokens long, not {args.tokens}: model or cache hold no more.", file=sys.stderr
        )
    if not texts:
        sequences = random_sequences(llm.model_config.get_vocab_size(), args.sequences, num_tokens, args.seed)
        return sequences, f"{describe(sequences)} (seed {args.seed})"
    tokenizer = llm.get_tokenizer()
    token_ids = {path: tokenizer.encode(text) for path, text in texts.items()}
    sequences = text_sequences(token_ids, args.sequences, num_tokens)
    names = ", ".join(path.name for path in texts)
    return sequences, f"{len(sequences)} sequences, {sum(map(len, sequences))} tokens, of {names}"


def _said_after(args: argparse.Namespace, path: str, description: str) -> str:
    """Returns where the filters are and how they are used."""
    how = f"vllm serve {shlex.quote(args.model)} --kv-compression qfilters"
    if args.output is None:
        how += "\nIt finds them by itself, as long as the weights are these."
    else:
        how += f" --kv-compression-config.filters {shlex.quote(str(args.output))}"
    return f"\nCalibrated with {description}. The filters are in\n  {args.output or path}\nUse them with\n  {how}"


def _read_text(path: pathlib.Path, num_characters: int) -> str:
    """Reads the first ``num_characters`` of a text."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(num_characters)
    except OSError as error:
        raise UsageError(one_line(error)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a UTF-8 text: {error}") from error
