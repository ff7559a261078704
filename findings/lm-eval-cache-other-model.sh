#!/usr/bin/env bash
# lm-eval 0.4.13, transformers 5.24.0, torch 2.13.0 for CPUs.
#
# `--use_cache FILE` keeps what a model answered, so that an evaluation that was broken off goes on. What is kept is found
# by the request alone: neither the model nor its dtype or other arguments are part of it. A second model that is evaluated
# with the same file is not asked. It gets the scores of the first one under its own name, and nothing warns.
#
# Seen: the log-likelihoods of two models with the file are equal; of the second one without it they are others.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" \
    lm-eval==0.4.13 transformers==5.24.0 torch==2.13.0+cpu accelerate==1.15.0
"$bin/uv" pip uninstall --quiet --python "$bin/python" torchvision 2> /dev/null || true  # one for GPUs ends transformers' import

cat > "$folder/evaluate.py" <<'PYTHON'
import json
import pathlib
import sys

import lm_eval
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = pathlib.Path(sys.argv[1])
letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE({**letters, "<end>": 256}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=257, max_position_embeddings=512, bos_token_id=256, eos_token_id=256, initializer_range=0.12,
)
for seed in (0, 1):
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder / f"model-{seed}")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>").save_pretrained(
        folder / f"model-{seed}"
    )
questions = [{"question": f"Is {number} even?", "answer": number % 2} for number in range(20)]
(folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
task = dict(
    task="even", dataset_path="json", dataset_kwargs={"data_files": {"test": str(folder / "questions.jsonl")}},
    test_split="test", output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice=["yes", "no"],
    doc_to_target="answer", metric_list=[{"metric": "acc"}],
)


def loglikelihoods(seed, cache):
    results = lm_eval.simple_evaluate(
        "hf", model_args=f"pretrained={folder / f'model-{seed}'}", tasks=[task], device="cpu", use_cache=cache
    )
    return [sample["filtered_resps"] for sample in results["samples"]["even"]]


cache = str(folder / "cache")
first, second, alone = loglikelihoods(0, cache), loglikelihoods(1, cache), loglikelihoods(1, None)
print("SEEN", "same" if second == first else "other", "same" if second == alone else "other")
PYTHON

found=$(HF_HOME="$folder/home" "$bin/python" "$folder/evaluate.py" "$folder" 2> "$folder/errors" | sed -n 's/^SEEN //p') ||
    { cat "$folder/errors" >&2; exit 1; }
echo "lm-eval 0.4.13, the second model with one cache file (next to the first, next to itself without a file): $found"
[ "$found" = "same other" ]
