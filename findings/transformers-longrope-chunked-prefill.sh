#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 for CPUs.
#
# `generate(prefill_chunk_size=...)` reads a prompt piece by piece, to need less memory. Models with longrope (Phi-3 with a
# long context) have two RoPE tables, and the length of what is read chooses one. Piece by piece, keys up to
# original_max_position_embeddings are turned by the short table and stay so, those behind by the long one: the prompt is
# another than the one that is read whole. `generate` does know that the table changes (it reads all anew when an answer
# crosses that length), but looks at the length of a piece for it.
#
# Seen, with 64 original positions: Phi-3 says the same of 48 tokens in pieces as whole, and something else of 96; Llama
# with YaRN says the same of both.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" transformers==5.24.0 torch==2.13.0+cpu

cat > "$folder/chunks.py" <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

shape = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, max_position_embeddings=256, initializer_range=0.12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
common = {"rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 4.0}
factors = {"short_factor": [1.0] * 16, "long_factor": [1 + i / 4 for i in range(16)]}
configs = [
    LlamaConfig(**shape, rope_parameters={**common, "rope_type": "yarn"}),
    Phi3Config(
        **shape, original_max_position_embeddings=64, rope_parameters={**common, **factors, "rope_type": "longrope"}
    ),
]
for config in configs:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for length in (48, 96):
        ids = torch.randint(3, 256, (1, length))
        settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=1, return_dict_in_generate=True)
        whole, pieces = (
            model.generate(ids, **settings, do_sample=False, output_logits=True, prefill_chunk_size=size).logits[0][0]
            for size in (None, 32)
        )
        is_same = (pieces - whole).abs().max() < 1e-3 * whole.std()
        print(config.model_type, length, "same" if is_same else "other")
PYTHON

found=$("$bin/python" "$folder/chunks.py" 2> "$folder/errors") || { cat "$folder/errors" >&2; exit 1; }
echo "transformers 5.24.0, a prompt in pieces of 32 next to the same prompt whole:"
echo "$found"
[ "$found" = "llama 48 same
llama 96 same
phi3 48 same
phi3 96 other" ]
