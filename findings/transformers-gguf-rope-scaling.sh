#!/usr/bin/env bash
# transformers 5.24.0, gguf 0.19.0, numpy 2.3.5, torch 2.13.0 for CPUs.
#
# A GGUF file says how RoPE is scaled (`*.rope.scaling.type`, `.factor`, `.original_context_length`); a model of 8,192
# positions that is served with 32,768 is nothing without it. Transformers reads such files (`gguf_file=`), and drops
# these keys without a warning: RoPE is `default`, while `max_position_embeddings` is the long one. For GPT-OSS it does
# read them, and takes the length of a key's name for its value: a factor of 32 becomes 27.
#
# Seen: Llama and Qwen2 with a factor of 4: type default, no factor, 32768 positions; GPT-OSS with a factor of 32 and
# 4096 original positions: 27.0 and 44.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" \
    transformers==5.24.0 gguf==0.19.0 numpy==2.3.5 torch==2.13.0+cpu

cat > "$folder/read.py" <<'PYTHON'
import pathlib
import sys

import gguf
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

folder = pathlib.Path(sys.argv[1])
SCALINGS = {
    "llama": (gguf.RopeScalingType.LINEAR, 4.0, 8192),
    "qwen2": (gguf.RopeScalingType.YARN, 4.0, 8192),
    "gpt-oss": (gguf.RopeScalingType.YARN, 32.0, 4096),
}
for architecture, (kind, factor, original) in SCALINGS.items():
    writer = gguf.GGUFWriter(folder / f"{architecture}.gguf", architecture)
    writer.add_context_length(32768)
    writer.add_block_count(2)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(256)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_scaling_type(kind)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(folder / f"{architecture}.gguf").fields
    assert fields[f"{architecture}.rope.scaling.factor"].contents() == factor
for architecture in ("llama", "qwen2"):
    config = AutoConfig.from_pretrained(folder, gguf_file=f"{architecture}.gguf")
    rope = config.rope_parameters
    print(architecture, rope["rope_type"], rope.get("factor"), config.max_position_embeddings)
rope = load_gguf_checkpoint(folder / "gpt-oss.gguf")["config"]["rope_scaling"]
print("gpt-oss", rope["factor"], rope["original_max_position_embeddings"])
PYTHON

found=$("$bin/python" "$folder/read.py" "$folder" 2> "$folder/errors") || { cat "$folder/errors" >&2; exit 1; }
echo "transformers 5.24.0 reads of GGUF files with scaled RoPE:"
echo "$found"
[ "$found" = "llama default None 32768
qwen2 default None 32768
gpt-oss 27.0 44" ]
