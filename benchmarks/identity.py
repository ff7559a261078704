"""Compares a budget that nobody reaches with plain vLLM: token ids and log-probabilities, bit by bit.

    python -m benchmarks identity models/SmolLM2-135M-Instruct [--llm '{"block_size": 16}']

Two engines run with whatever vLLM chooses on this machine: CUDA graphs, asynchronous scheduling, an attention backend.
The command ends with status 1 if they differ.
"""

import argparse
import random
from collections.abc import Mapping
from typing import Any

from benchmarks.case import Case, Numbers

LENGTHS = (900, 17, 300, 1)
NEW_TOKENS = 64


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    return {
        "plain": {"compression": None},
        "compressed": {"compression": {"method": "qfilters", "budget": arguments.budget}},
    }


def measure(job: dict[str, Any]) -> Numbers:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from vllm_qfilters import kv_compression

    compression = {} if job["compression"] is None else kv_compression(**{**job["options"], **job["compression"]})
    cache = {"kv_cache_memory_bytes": job["kv_cache_memory_bytes"] or None}
    given = {"max_model_len": job["budget"], "skip_tokenizer_init": True, **cache, **job["llm"]}
    llm = LLM(job["model"], **given, **compression)
    numbers = random.Random(0)
    prompts = [TokensPrompt(prompt_token_ids=[numbers.randrange(3, 500) for _ in range(length)]) for length in LENGTHS]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
    completions = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return {
        "sequences": len(completions),
        "tokens": sum(len(completion.token_ids) for completion in completions),
        "token_ids": [list(completion.token_ids) for completion in completions],
        "logprobs": [[step[t].logprob for t, step in zip(c.token_ids, c.logprobs, strict=True)] for c in completions],
    }


def problems(of_round: Mapping[str, Numbers]) -> list[str]:
    plain, compressed = of_round["plain"], of_round["compressed"]
    if plain == compressed:
        return []
    same = sum(a == b for a, b in zip(plain["token_ids"], compressed["token_ids"], strict=True))
    return [f"the output differs: {same} of {plain['sequences']} sequences have the same tokens"]


CASE = Case(
    name="identity",
    description=__doc__,
    add_options=lambda parser: parser.set_defaults(rounds=1),
    variants=variants,
    measure=measure,
    columns={"sequences": "sequences", "tokens": "tokens"},
    ratios=lambda of_round: {"identical, bit by bit": float(of_round["plain"] == of_round["compressed"])},
    problems=problems,
)
main = CASE.main
