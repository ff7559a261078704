"""Does a budget nobody reaches leave plain vLLM's output as it is? Token ids and log-probabilities, bit by bit.

    python benchmarks/identity.py models/SmolLM2-135M-Instruct [--llm '{"block_size": 16}']

Two engines, one after the other, each in a process of its own, with whatever vLLM chooses on this machine: CUDA graphs,
asynchronous scheduling, an attention backend. Ends with status 1 if they differ.
"""

import argparse
import json
import os
import pathlib
import random
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"

from tests.run_engine import run_engine

LENGTHS = (900, 17, 300, 1)
NEW_TOKENS = 64
BUDGET = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--llm", type=json.loads, default={}, help="further arguments of vLLM's LLM, as JSON")
    arguments = parser.parse_args()
    numbers = random.Random(0)
    requests = [dict(prompt=[numbers.randrange(3, 500) for _ in range(length)], max_tokens=NEW_TOKENS) for length in LENGTHS]
    llm = {"max_model_len": BUDGET, "skip_tokenizer_init": True, "enforce_eager": False, **arguments.llm}
    print("plain vLLM ...", file=sys.stderr)
    plain = run_engine(arguments.model, requests, None, **llm)
    print("with KV compression ...", file=sys.stderr)
    compressed = run_engine(arguments.model, requests, dict(method="qfilters", budget=BUDGET), **llm)
    tokens = sum(len(result["token_ids"]) for result in plain)
    if compressed != plain:
        same = sum(a["token_ids"] == b["token_ids"] for a, b in zip(plain, compressed, strict=True))
        sys.exit(f"the output differs: {same} of {len(plain)} sequences have the same tokens")
    print(f"{len(plain)} sequences, {tokens} tokens: token ids and log-probabilities are those of plain vLLM, bit by bit")


if __name__ == "__main__":
    main()
