#!/usr/bin/env bash
# kvpress 0.5.5, transformers 5.2.0, torch 2.13.0 for CPUs.
#
# kvpress compresses the cache while a prompt is read, and transformers' `generate(prefill_chunk_size=...)` reads a long one
# chunk by chunk, to need less memory. Together they are taken without a word. Compressed is the first chunk alone, since a
# later one does not begin at 0: of a ratio of 0.5 little is left. And the mask goes by places in a cache that has become
# shorter: tokens of the later chunks attend to tokens that come after them.
#
# Seen, 256 tokens at a ratio of 0.5: 128 are held where the prompt is read at once, 224 in chunks of 64. Another token 100
# changes what token 70 is, in the last layer, in chunks; at once, or in chunks without kvpress, it does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" \
    kvpress==0.5.5 transformers==5.2.0 torch==2.13.0+cpu
"$bin/uv" pip uninstall --quiet --python "$bin/python" torchvision 2> /dev/null || true  # one for GPUs ends transformers' import

cat > "$folder/chunks.py" <<'PYTHON'
import contextlib

import torch
from kvpress import KnormPress
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, max_position_embeddings=512, initializer_range=0.12,
)
model = LlamaForCausalLM(config).eval()
states = []
model.model.norm.register_forward_hook(lambda module, inputs, output: states.append(output[0]))


def read(ids, ratio, size):
    """Tokens held, and token 70 in the last layer."""
    states.clear()
    with KnormPress(ratio)(model) if ratio else contextlib.nullcontext():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, return_dict_in_generate=True,
            prefill_chunk_size=size,
        )
    return output.past_key_values.get_seq_length(), torch.cat(states)[70]


ids = torch.randint(3, 512, (1, 256))
other = ids.clone()
other[0, 100] = (ids[0, 100] + 1) % 512
for ratio, size in ((0, 64), (0.5, None), (0.5, 64)):
    held, token = read(ids, ratio, size)
    _, beside_other = read(other, ratio, size)
    print(ratio, size, held, "causal" if torch.allclose(token, beside_other, atol=1e-4) else "sees ahead")
PYTHON

found=$("$bin/python" "$folder/chunks.py" 2> "$folder/errors") || { cat "$folder/errors" >&2; exit 1; }
echo "kvpress 0.5.5 with transformers 5.2.0: ratio, size of a chunk, tokens held:"
echo "$found"
[ "$found" = "0 64 256 causal
0.5 None 128 causal
0.5 64 224 sees ahead" ]
