#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 for CPUs.
#
# A prompt that is read in two pieces, the second behind the cache that the first left, is the same prompt: so it is for
# attention and for Mamba 2. Mamba keeps what its convolution saw and forgets the state: a piece of two tokens and more
# begins with a state of zeros. Nothing warns. A next turn behind the cache of the last one is such a piece. Token by token
# Mamba remembers, so what was generated does not show it.
#
# Seen: token by token behind 20 tokens, all three say the same as whole; read as 20 and 12 tokens, mamba does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" transformers==5.24.0 torch==2.13.0+cpu

cat > "$folder/pieces.py" <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config, MambaConfig

shape = dict(hidden_size=64, num_hidden_layers=2, vocab_size=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
configs = [
    LlamaConfig(**shape, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2),
    Mamba2Config(**shape, state_size=16, num_heads=8, head_dim=16, n_groups=1),
    MambaConfig(**shape, state_size=16),
]


def logits(model, ids, *pieces):
    cache = None
    for piece in ids.split(pieces, dim=1):
        output = model(piece, cache=cache, use_cache=True)
        cache = output.cache
    return output.logits[0, -1]


for config in configs:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 256, (1, 32))
    with torch.inference_mode():
        whole, stepped, pieces = (logits(model, ids, *split) for split in ((32,), (20, *[1] * 12), (20, 12)))
    is_same = [((found - whole).abs().max() < 1e-3 * whole.std()).item() for found in (stepped, pieces)]
    print(config.model_type, *("same" if same else "other" for same in is_same))
PYTHON

found=$("$bin/python" "$folder/pieces.py" 2> "$folder/errors") || { cat "$folder/errors" >&2; exit 1; }
echo "transformers 5.24.0, next to the prompt read whole, token by token and in two pieces:"
echo "$found"
[ "$found" = "llama same same
mamba2 same same
mamba same other" ]
