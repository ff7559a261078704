#!/usr/bin/env bash
# kvpress 0.5.5, transformers 5.2.0, torch 2.13.0 for CPUs.
#
# StreamingLLM keeps the first tokens and the latest ones; kvpress has it for prompts and, in a DecodingPress, for what is
# generated. It scores 1 by place in the cache, and takes the tokens of the highest scores with torch.topk. All of these
# scores are equal, and topk returns equals in an order of its own: the cache is shuffled. The first compression is right,
# for the second one the first places of the cache are not the first tokens any more.
#
# Seen, with 4 first tokens and room for 32: 4 of 4 first tokens and 28 of 28 latest ones are kept at the first compression,
# 1 and 27 at the second one, 0 and 27 from the third one on.
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

cat > "$folder/decode.py" <<'PYTHON'
import torch
from kvpress import DecodingPress, StreamingLLMPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

SINKS, HELD, INTERVAL, PROMPT = 4, 32, 8, 40
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, max_position_embeddings=512,
)
model = LlamaForCausalLM(config).eval()
ids = torch.randperm(512)[None, : PROMPT + 8 * INTERVAL]  # no token twice: a value of the first layer tells which it is
press = DecodingPress(StreamingLLMPress(n_sink=SINKS), compression_interval=INTERVAL, target_size=HELD)
whole, cache = DynamicCache(), DynamicCache()
with torch.inference_mode():
    model(ids, past_key_values=whole)
    with press(model):
        model(ids[:, :PROMPT], past_key_values=cache)
        for position in range(PROMPT, ids.shape[1]):
            model(ids[:, position, None], past_key_values=cache, position_ids=torch.tensor([[position]]))
            if cache.get_seq_length() == HELD:
                distances = torch.cdist(cache.layers[0].values[0, 0], whole.layers[0].values[0, 0])
                kept = set(distances.argmin(-1).tolist())
                latest = range(position + 1 - (HELD - SINKS), position + 1)
                print(len(kept), len(kept & set(range(SINKS))), len(kept & set(latest)))
PYTHON

found=$("$bin/python" "$folder/decode.py" 2> "$folder/errors") || { cat "$folder/errors" >&2; exit 1; }
echo "kvpress 0.5.5, at each compression: tokens kept, first tokens among them (of 4), latest ones (of 28):"
echo "$found"
[ "$(head -1 <<< "$found")" = "32 4 28" ] && [ "$(sed -n 2p <<< "$found")" != "32 4 28" ] &&
    [ "$(tail -1 <<< "$found" | cut -d' ' -f2)" = 0 ]
