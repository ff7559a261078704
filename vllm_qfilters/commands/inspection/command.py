"""The command ``vllm-qfilters inspect``: runs a prompt on the engine and shows what the workers kept of it."""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_qfilters.commands.arguments import UsageError, at_least, check_writable
from vllm_qfilters.commands.engine import one_line, read_engine_args, start_engine
from vllm_qfilters.commands.inspection.page import Inspection, render
from vllm_qfilters.policy import Policy

if TYPE_CHECKING:
    from vllm import LLM

STANDARD_INPUT = pathlib.Path("-")

USAGE = "MODEL --prompt-file FILE [-o FILE]"
ENGINE_DEFAULTS: dict[str, Any] = {"kv_compression": "qfilters", "enforce_eager": True, "max_num_seqs": 1}
DESCRIPTION = (
    "Runs a prompt with a compressed KV cache, and writes one HTML page that shows which of its\n"
    "tokens the cache still holds: every token shaded by how many layers and KV heads kept it,\n"
    "each layer (and with granularity head each head) by itself on demand, with sinks and window\n"
    "marked. It is the engine itself that runs, and the page shows what its workers kept.\n"
    "--kv-compression is qfilters unless given; a prompt no longer than the budget is kept whole."
)
EXAMPLES = (
    "Examples:\n"
    "  vllm-qfilters inspect Qwen/Qwen3-0.6B --prompt-file article.txt -o page.html \\\n"
    "      --kv-compression-config.budget 512\n"
    "  git log | vllm-qfilters inspect Qwen/Qwen3-0.6B --prompt-file - --kv-compression streaming \\\n"
    "      --kv-compression-config.budget 1024 --max-tokens 200"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``inspect``."""
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt itself, instead of --prompt-file")
    text = "UTF-8 text of the prompt; - reads standard input"
    parser.add_argument("--prompt-file", type=pathlib.Path, metavar="FILE", help=text)
    parser.add_argument(
        "-o",
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("inspection.html"),
        metavar="FILE",
        help="page to write; default %(default)s",
    )
    parser.add_argument(
        "--max-tokens",
        type=at_least(2),
        default=2,
        metavar="N",
        help="tokens to generate before the look, which then stand behind the prompt; default %(default)s: "
        "as decoding begins",
    )


def run(args: argparse.Namespace) -> int:
    """Shows on a page which tokens of a prompt the cache kept."""
    from vllm.exceptions import VLLMClientError

    prompt = read_prompt(args)
    check_writable(args.output)
    with start_engine(read_engine_args(args)) as llm:
        token_ids = llm.get_tokenizer().encode(prompt)
        most = llm.model_config.max_model_len - args.max_tokens
        if len(token_ids) > most:
            raise UsageError(
                f"the prompt has {len(token_ids)} tokens, and {most} fit beside --max-tokens {args.max_tokens}: "
                "shorten it, or raise --max-model-len where the model allows it"
            )
        try:
            found = inspect(llm, token_ids, args.max_tokens)
        except (ValueError, VLLMClientError) as error:
            raise UsageError(one_line(error)) from error
    print(write(found, args.output))
    return 0


def read_prompt(args: argparse.Namespace) -> str:
    """Reads the prompt that ``args`` name.

    Raises:
        UsageError: no prompt or two are named, or it cannot be read, or is empty.
    """
    if (args.prompt is None) == (args.prompt_file is None):
        raise UsageError("which prompt? Give one of --prompt TEXT and --prompt-file FILE")
    prompt: str | None = args.prompt
    if prompt is None:
        try:
            is_stdin = args.prompt_file == STANDARD_INPUT
            prompt = (sys.stdin.buffer.read() if is_stdin else args.prompt_file.read_bytes()).decode("utf-8")
        except OSError as error:
            raise UsageError(f"{args.prompt_file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{args.prompt_file} is not a UTF-8 text: {error}") from error
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    return prompt


def inspect(llm: "LLM", token_ids: Sequence[int], max_tokens: int) -> Inspection:
    """Runs a prompt and asks the workers what they kept.

    Args:
        llm: an idle engine with KV compression.
        token_ids: the prompt.
        max_tokens: tokens to generate, 2 at least: a prompt is last cut when the first of them is computed.

    Raises:
        ValueError: the engine refuses the prompt.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    llm.reset_prefix_cache()  # what is known of cached pages is what was recorded
    llm.collective_rpc("record_kept_tokens")
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    (output,) = llm.generate(TokensPrompt(prompt_token_ids=list(token_ids)), params)
    # The last token has been sampled, but not computed.
    computed = [*token_ids, *output.outputs[0].token_ids[:-1]]
    layers, kept, end = assemble(llm.collective_rpc("take_kept_tokens"), len(computed))

    vllm_config = llm.llm_engine.vllm_config
    has_tokenizer = not vllm_config.model_config.skip_tokenizer_init
    policy, block_size = Policy.from_vllm_config(vllm_config), vllm_config.cache_config.block_size
    assert policy is not None, "the engine was started with KV compression"
    limits = policy.request_limits(None, len(token_ids), block_size)
    assert limits is not None, "only a request's own budget switches compression off"
    # The endpoint is left out, as it changes nothing of what is kept.
    options = {name: value for name, value in policy.to_dict().items() if name != "endpoint"}
    num_kept = int(kept[0, 0, :end].sum())
    sinks, window = (
        limits.protected(num_kept, end, len(token_ids), end - num_kept, block_size) if end else (limits.sinks, 0)
    )
    return Inspection(
        texts=token_texts(llm.get_tokenizer(), computed) if has_tokenizer else [""] * len(computed),
        prompt_tokens=len(token_ids),
        layers=layers,
        kept=kept,
        sinks=sinks,
        window=range(end - window, end),
        budget=limits.budget,
        model=pathlib.PurePath(vllm_config.model_config.model).name,
        configuration={**options, "block size": block_size, "tokens generated": max_tokens},
    )


def assemble(ranks: Sequence[Mapping[str, Any]], num_tokens: int) -> tuple[list[int], np.ndarray, int]:
    """Puts together what the ranks answered.

    Args:
        ranks: what ``take_kept_tokens`` of each worker returned, after one request.
        num_tokens: tokens of the sequence.

    Returns:
        The layers that are compressed, by their indices; what is kept in them, shape
        ``[num_layers, num_kv_heads, num_tokens]``, bool; and the position of the last eviction, or 0 without one.
    """
    layers = sorted({layer for rank in ranks for layer in rank["layers"]})
    num_heads = max(rank["first_kv_head"] + rank["num_kv_heads"] for rank in ranks)
    kept, end = np.ones((len(layers), num_heads, num_tokens), dtype=bool), 0
    for rank in ranks:
        for end, packed in rank["requests"].values():
            shape = (len(rank["layers"]), rank["num_kv_heads"], end)
            mask = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=int(np.prod(shape))).reshape(shape)
            first = rank["first_kv_head"]
            kept[np.searchsorted(layers, rank["layers"]), first : first + rank["num_kv_heads"], :end] = mask
    return layers, kept, end


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Returns what each token adds to the text; a token whose last character goes on in the next one adds nothing."""
    texts: list[str] = []
    before = start = 0
    for end in range(1, len(token_ids) + 1):
        # The token before is decoded too, since some tokenizers drop the space a text begins with.
        shown, text = tokenizer.decode(token_ids[before:start]), tokenizer.decode(token_ids[before:end])
        if text.endswith("\ufffd") and end - start < 4:
            texts.append("")
            continue
        texts.append(text[len(shown) :])
        before, start = start, end
    return texts


def write(inspection: Inspection, path: pathlib.Path) -> str:
    """Writes the page, and returns what the command says about it."""
    path.write_text(render(inspection), encoding="utf-8")
    num_tokens = inspection.kept.shape[2]
    said = f"{path} shows {num_tokens} tokens, of which every layer and head holds {inspection.resident_tokens}"
    if not inspection.evicted_tokens:
        said += (
            f"\nNothing was evicted, as the budget is {inspection.budget} tokens: give a smaller one "
            "(--kv-compression-config.budget N), or a longer prompt"
        )
    return said
