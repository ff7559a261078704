#!/usr/bin/env bash
# kvpress 0.5.5, transformers 5.2.0, torch 2.13.0 for CPUs.
#
# kvpress works with transformers' `generate`, as its README shows. Prompts of several lengths go into a batch with padding on
# the left, and a mask that hides it. kvpress takes the padding for tokens, among those that it scores and counts; and the mask,
# which goes by places in the cache, stays as long as the padded prompt. As many entries of the shorter prompt are hidden as it
# had padding, but from the front of what was kept: for most presses, these are the tokens of the highest scores. The first new
# token is right, those after it are not, and nothing warns. The longest prompt of the batch is answered as it would be alone.
#
# Seen at a ratio of 0.5, for a prompt beside one of 256: the second new token sees 121 entries, not 125, with 8 tokens of
# padding; 65, not 97, with 64; 1, itself, with 128, where nothing is left of the prompt. Without kvpress it sees what it should.
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

cat > "$folder/padding.py" <<'PYTHON'
import contextlib

import torch
from kvpress import KnormPress
from transformers import LlamaConfig, LlamaForCausalLM

LONGEST, PAD = 256, 0
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, max_position_embeddings=512, initializer_range=0.12, pad_token_id=PAD, bos_token_id=None,
    eos_token_id=None, attn_implementation="eager",
)
model = LlamaForCausalLM(config).eval()


def answer(prompts, ratio):
    """For each prompt, the logits of its first two new tokens, and how many entries the second one sees."""
    ids = torch.stack([torch.cat((torch.full((LONGEST - len(prompt),), PAD), prompt)) for prompt in prompts])
    ids = ids[:, LONGEST - max(map(len, prompts)) :]
    with KnormPress(ratio)(model) if ratio else contextlib.nullcontext():
        output = model.generate(
            ids, attention_mask=(ids != PAD).long(), max_new_tokens=2, do_sample=False, return_dict_in_generate=True,
            output_logits=True, output_attentions=True,
        )
    seen = (output.attentions[1][-1].amax((1, 2)) > 0).sum(-1)
    return [(torch.stack(output.logits)[:, row].log_softmax(-1), int(seen[row])) for row in range(len(prompts))]


longest = torch.randint(1, 512, (LONGEST,))
for padding in (8, 64, 128):
    prompt = torch.randint(1, 512, (LONGEST - padding,))
    for ratio in (0, 0.5):
        (alone, seen_alone), = answer([prompt], ratio)
        (batched, seen), (neighbour, _) = answer([prompt, longest], ratio)
        (neighbour_alone, _), = answer([longest], ratio)
        same = [torch.allclose(*pair, atol=1e-3) for pair in (*zip(alone, batched), (neighbour_alone, neighbour))]
        print(ratio, padding, seen_alone, seen, *("same" if equal else "other" for equal in same))
PYTHON

found=$("$bin/python" "$folder/padding.py" 2> "$folder/errors") || { cat "$folder/errors" >&2; exit 1; }
echo "kvpress 0.5.5 with transformers 5.2.0: ratio, padding of the shorter prompt, entries that its second new token sees alone"
echo "and in the batch; its first token's probabilities, its second one's, those of the longer prompt:"
echo "$found"
[ "$found" = "0 8 249 249 same same same
0.5 8 125 121 same other same
0 64 193 193 same same same
0.5 64 97 65 same other same
0 128 129 129 same same same
0.5 128 65 1 same other same" ]
