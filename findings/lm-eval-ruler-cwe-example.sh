#!/usr/bin/env bash
# lm-eval 0.4.13, transformers 5.5.4, wonderwords 3.0.1.
#
# RULER shows the model a short list of words with the ten most common of them before it asks for those of a long list: its own script
# (common_words_extraction.py, arXiv 2404.06654) joins example and question into one text. We guessed that lm-eval's ruler_cwe does
# the same, as its dataset has a field for the example (input_example), and the example is counted where it finds out how many words
# fit a length. The prompt that it sends is the field input alone. So the question is asked without an example of its answer, where
# ruler_vt has one in every prompt, and a prompt is shorter than its length by what the example takes: an eighth of 4,096 where each word
# and each number is a token. A score of this task is not comparable with those of the paper or of a tool that sends the example, and a
# cache that holds a fraction of 4,096 tokens holds a larger one of what is sent.
#
# Seen: none of 500 prompts of 4,096 tokens has its example, and none of 8,192; the first of either has 3,455 and 7,538 words, and its
# example has 447. Every prompt of ruler_vt has two questions.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
"$bin/uv" pip install --quiet --python "$bin/python" "lm-eval[ruler]==0.4.13" wonderwords==3.0.1 transformers==5.5.4  # needs no torch

cat > "$folder/example.py" <<'PYTHON'
import random
import sys

from lm_eval.tasks import TaskManager, get_task_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

folder = sys.argv[1]
tokenizer = Tokenizer(models.WordLevel({"word": 0}, "word"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word").save_pretrained(folder)
random.seed(0)  # as lm-eval does
manager = TaskManager(metadata={"tokenizer": folder, "max_seq_lengths": [4096, 8192]})
tasks = get_task_dict(["ruler_cwe", "ruler_vt"], manager)
docs = list(tasks["ruler_cwe"].test_docs())
prompts = [tasks["ruler_cwe"].doc_to_text(doc) for doc in docs]
for length in (4096, 8192):
    of_length = [(doc, text) for doc, text in zip(docs, prompts, strict=True) if doc["max_length"] == length]
    shown = sum(doc["input_example"] in text for doc, text in of_length)
    doc, text = of_length[0]
    words = f"{len(text.split())} words, {len(doc['input_example'].split())} in its example"
    print(f"{length} tokens: {shown} of {len(of_length)} prompts have the example; the first has {words}")
variables = [tasks["ruler_vt"].doc_to_text(doc) for doc in tasks["ruler_vt"].test_docs()]
print(f"variables: {min(text.count('Question:') for text in variables)} questions or more in every prompt")
PYTHON

seen=$(HF_HUB_OFFLINE=1 "$bin/python" "$folder/example.py" "$folder/tokenizer" 2> "$folder/log" | grep -E "^(4096|8192|variables)") || {
    tail -5 "$folder/log"
    exit 1
}
echo "lm-eval 0.4.13, ruler_cwe and ruler_vt:"
echo "$seen"
[ "$seen" = "4096 tokens: 0 of 500 prompts have the example; the first has 3455 words, 447 in its example
8192 tokens: 0 of 500 prompts have the example; the first has 7538 words, 447 in its example
variables: 2 questions or more in every prompt" ]
