#!/usr/bin/env bash
# lm-eval 0.4.13, transformers 5.5.4, nltk 3.10.4, wonderwords 3.0.1.
#
# A question of SQuAD comes with several reference answers: what several people wrote for it. RULER, whose task this is, scores
# 1 for an answer that has one of them in it, and so we guessed for ruler_qa_squad in lm-eval. It gives the share of the
# references that are in the answer. An answer that is a reference word for word loses what the others have in addition, the
# shortest one most, and only an answer that says the same in all ways gets the whole point. The scores are no longer those of
# RULER's tables, and a cache that makes answers longer gains by that alone.
#
# Seen, each question with the references "in the year 1066", "1066", "the year 1066" and "year 1066 AD": as answers to all
# questions they score 0.75, 0.25, 0.50 and 0.50, and all four in a row 1.00.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
"$bin/uv" pip install --quiet --python "$bin/python" \
    lm-eval==0.4.13 transformers==5.5.4 nltk==3.10.4 wonderwords==3.0.1  # the answers come from no model: no torch

cat > "$folder/references.py" <<'PYTHON'
import sys
import types

import lm_eval
import nltk
import requests
from lm_eval.api.model import LM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

folder = sys.argv[1]
tokenizer = Tokenizer(models.WordLevel({"word": 0}, "word"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word").save_pretrained(folder)


class Answering(LM):
    """Answers each question with what is chosen of its references."""

    loglikelihood = loglikelihood_rolling = None

    def __init__(self, choose):
        super().__init__()
        self.choose = choose

    def generate_until(self, requests):
        return [self.choose(request.doc["outputs"]) for request in requests]


def paragraph(year):
    references = (f"in the year {year}", f"{year}", f"the year {year}", f"year {year} AD")
    answers = [{"text": reference} for reference in references]
    return {
        "context": f"Town {year} was founded in the year {year} AD." + " No more is known." * 30,
        "qas": [{"question": f"When was town {year} founded?", "answers": answers, "is_impossible": False}],
    }


articles = [{"paragraphs": [paragraph(1000 + 20 * article + number) for number in range(20)]} for article in range(30)]
reply = types.SimpleNamespace(raise_for_status=lambda: None, json=lambda: {"data": articles})  # of SQuAD's form
requests.get = lambda url, timeout: reply
nltk.data.find = lambda name: name  # what splits the essays of other tasks into sentences is not fetched
choices = {
    "first reference": lambda references: references[0],
    "second reference": lambda references: references[1],
    "third reference": lambda references: references[2],
    "fourth reference": lambda references: references[3],
    "all in a row": ", ".join,
}
for name, choose in choices.items():
    results = lm_eval.simple_evaluate(
        Answering(choose), tasks=["ruler_qa_squad"], bootstrap_iters=0,
        metadata={"tokenizer": folder, "max_seq_lengths": [4096]},
    )
    print(f"{name} {results['results']['ruler_qa_squad']['4096,none']:.2f}")
PYTHON

found=$("$bin/python" "$folder/references.py" "$folder/tokenizer" 2> "$folder/errors") || { cat "$folder/errors" >&2; exit 1; }
echo "lm-eval 0.4.13, ruler_qa_squad: score of answers that are"
echo "$found"
[ "$found" = "first reference 0.75
second reference 0.25
third reference 0.50
fourth reference 0.50
all in a row 1.00" ]
