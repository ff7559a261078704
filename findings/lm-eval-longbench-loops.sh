#!/usr/bin/env bash
# lm-eval 0.4.13, rouge 1.0.1.
#
# LongBench scores its summaries by ROUGE-L, an F measure: we guessed that an answer that says its first sentence again and
# again until it is cut off loses precision. The package `rouge`, which LongBench chose and lm-eval took over, counts words
# as a set, once each: fifty times the sentence score what one does, to the last digit. With `exclusive=False` it counts each
# as often as it is said, divides what all the repetitions match by the length of the reference, and finds an F beyond 1.
# That a long answer turns in circles, which is what eviction often does to it, is not seen by this score at all. A score as
# good as the full cache's is no proof of sound answers then; loops have to be counted beside it.
#
# Seen, one sentence of a reference of two, said once and 50 times: 0.839 and 0.839; with `exclusive=False` 0.839 and 1.946.
# By definition (13 of 650 words, and 13 of 18) the second is 0.04.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet --no-deps lm-eval==0.4.13 rouge==1.0.1 six==1.17.0 fuzzywuzzy==0.18.0  # its scores need no torch

cat > "$folder/loops.py" <<'PYTHON'
import importlib.util
import pathlib
import sys
import types

from rouge import Rouge

sys.modules["jieba"] = types.ModuleType("jieba")  # splits Chinese, and that alone
package = pathlib.Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0])
spec = importlib.util.spec_from_file_location("metrics", package / "tasks/longbench/metrics.py")
longbench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(longbench)

sentence = "The committee found that the agency did not keep records of its spending."
reference = sentence + " It asked for yearly reports."
counting = Rouge(metrics=["rouge-l"], exclusive=False)
for times in (1, 50):
    answer = " ".join([sentence] * times)
    score = longbench.get_rouge_score({"answers": [reference]}, [answer])["rouge_score"]
    print(f"{times} {score:.3f} {counting.get_scores(answer, reference)[0]['rouge-l']['f']:.3f}")
PYTHON

found=$("$bin/python" "$folder/loops.py" 2> "$folder/errors") || { cat "$folder/errors" >&2; exit 1; }
echo "lm-eval 0.4.13, rouge 1.0.1: times a sentence is said, ROUGE-L of LongBench, ROUGE-L with exclusive=False:"
echo "$found"
awk '{ row[NR] = $2; other[NR] = $3 } END { exit !(NR == 2 && row[1] == row[2] && row[1] > 0.8 && other[1] > 0.8 && other[2] > 1) }' <<< "$found"
