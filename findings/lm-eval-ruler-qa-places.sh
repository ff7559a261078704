#!/usr/bin/env bash
# lm-eval 0.4.13, transformers 5.5.4.
#
# RULER's questions about SQuAD (ruler_qa_squad) put the paragraph that has the answer among others, and fill each length up
# with them. We guessed that it stands at another place in every sample. lm-eval makes a list that begins with the right
# paragraph, and shuffles the list of every sample with the same seed: where the paragraph ends up follows from how many there
# are, and all samples of a length have it at the same one, two or three places. A cache that keeps the later half of a prompt holds
# every answer at one length and none at the next; one that keeps the earlier half, the other way round. For methods that evict
# tokens, a score of this task at one length says little about the method, and neither does how it changes with the length.
#
# Seen, for paragraphs of 70 to 190 words, 500 samples of each length: of 4,096 tokens, all answers are in the later half (19th of
# 20 paragraphs); of 8,192, none is (27th of 60 or 20th of 50); of 16,384, all are (77th of 110); of 32,768, none is (82nd of 240,
# 89th of 250 or 76th of 230).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
"$bin/uv" pip install --quiet --python "$bin/python" lm-eval==0.4.13 transformers==5.5.4  # its samples need no torch

cat > "$folder/places.py" <<'PYTHON'
import collections
import random
import sys

import lm_eval.tasks.ruler.qa_utils as ruler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

folder = sys.argv[1]
tokenizer = Tokenizer(models.WordLevel({"word": 0}, "word"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word").save_pretrained(folder)


def paragraph(name):
    return {
        "context": f"Town {name} lies by a river." + " No more is known." * random.randint(16, 46),
        "qas": [{"question": f"Where is town {name}", "answers": [{"text": "by a river"}], "is_impossible": False}],
    }


random.seed(0)  # as lm-eval does
articles = [{"paragraphs": [paragraph(f"{article}-{number}") for number in range(30)]} for article in range(40)]
ruler.download_json = lambda url: {"data": articles}  # of SQuAD's form
for length in (4096, 8192, 16384, 32768):
    places, later = collections.Counter(), 0
    samples = ruler.get_squad(tokenizer=folder, max_seq_lengths=[length])["test"]
    for sample in samples:
        paragraphs = sample["input"].split("\nDocument ")[1:]
        name = sample["input"].split()[-1]
        place = next(place for place, text in enumerate(paragraphs, 1) if f"Town {name} lies" in text)
        places[place, len(paragraphs)] += 1
        later += place > len(paragraphs) / 2
    listed = ", ".join(f"{place} of {count} ({samples})" for (place, count), samples in places.most_common())
    print(f"{length} tokens, in the later half {later} of {len(samples)}: {listed}")
PYTHON

found=$("$bin/python" "$folder/places.py" "$folder/tokenizer" 2> "$folder/errors") || { cat "$folder/errors" >&2; exit 1; }
echo "lm-eval 0.4.13, ruler_qa_squad: place of the paragraph that has the answer, and in how many samples:"
echo "$found"
[ "$(sed 's/:.*//' <<< "$found")" = "4096 tokens, in the later half 500 of 500
8192 tokens, in the later half 0 of 500
16384 tokens, in the later half 500 of 500
32768 tokens, in the later half 0 of 500" ] && ! grep -q "of.*of.*of.*of.*of" <<< "$found"  # three places at most
