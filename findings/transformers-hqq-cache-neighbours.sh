#!/usr/bin/env bash
# transformers 5.24.0, hqq 0.2.8.post1, torch 2.13.0 for CPUs.
#
# Transformers' quantized cache with backend "hqq" quantizes along axis 0 unless told otherwise; the guide of caches
# recommends 1 for hqq. Along 0, 64 numbers that share a scale are spread evenly over the whole tensor, so over sequences,
# heads and tokens: what a sequence holds depends on its neighbours in the batch. And since all is quantized anew whenever
# `residual_length` tokens have come, over other groups each time, errors add up. Nothing warns.
#
# Seen, a Llama with random weights: beside another sequence, log-probabilities differ by up to 2.8 nats from those alone.
# Keys of the first 128 tokens are off by 8% when quantized once, and by 23% once quantized anew eight times. Along axis 1
# neither.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" \
    transformers==5.24.0 hqq==0.2.8.post1 torch==2.13.0+cpu
"$bin/uv" pip uninstall --quiet --python "$bin/python" torchvision 2> /dev/null || true  # one for GPUs ends transformers' import

cat > "$folder/neighbours.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import QuantizedCache

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    head_dim=64, vocab_size=512, max_position_embeddings=512, initializer_range=0.12,
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(3, 512, (2, 256))
PROMPT = 128


@torch.no_grad()
def read(ids, residual_length=PROMPT + 1, **axes):
    """Log-probabilities behind each token after the prompt, and what the first layer holds of the prompt at the end."""
    cache = QuantizedCache("hqq", config, q_group_size=64, residual_length=residual_length, **axes)
    model(ids[:, :PROMPT], past_key_values=cache)
    steps = [model(token, past_key_values=cache).logits[0, -1] for token in ids[:, PROMPT:].split(1, dim=1)]
    layer = cache.layers[0]
    return torch.stack(steps).log_softmax(-1), layer._dequantize(layer._quantized_keys)[:1, :, :PROMPT]


with torch.no_grad():
    keys = model(ids[:1, :PROMPT]).past_key_values.layers[0].keys
seen = []
for axes in ({}, dict(axis_key=1, axis_value=1)):
    (alone, once), (beside, _), (_, again) = read(ids[:1], **axes), read(ids, **axes), read(ids[:1], 16, **axes)
    nats = (alone - beside).abs().max().item()
    first, last = ((held - keys).norm().item() / keys.norm().item() for held in (once, again))
    print(f"{axes or 'default'}: beside another {nats:.1g} nats; keys off by {first:.0%}, quantized anew eight times {last:.0%}")
    seen.append((nats > 0.5, last > 2 * first))
sys.exit(seen != [(True, True), (False, False)])
PYTHON

echo "transformers 5.24.0 with hqq 0.2.8.post1:"
"$bin/python" "$folder/neighbours.py" 2> "$folder/errors" || { status=$?; cat "$folder/errors" >&2; exit $status; }
