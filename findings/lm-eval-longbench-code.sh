#!/usr/bin/env bash
# lm-eval 0.4.13.
#
# LongBench's tasks of code (lcc, repobench-p) ask for the next line, and score how like it the first line of the answer is.
# We guessed that the line itself scores 1. A line that has `#`, `//` or a backquote anywhere in it is passed over as if it
# were a comment, and the line after it is scored instead: integer division in Python, a comment behind a statement, a URL
# or `#include` can't be answered right. Of two caches, the one that makes the model get such lines wrong may score higher.
#
# Seen, each line as the answer to itself, alone and with "return middle" behind it: 1.00 and 1.00 for a division by `/`;
# 0.00 and below 0.6 for a division by `//`, a comment at the end, `#include` and a URL. A wrong answer scores 0.98.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet --no-deps lm-eval==0.4.13 rouge==1.0.1 six==1.17.0 fuzzywuzzy==0.18.0  # its scores need no torch

cat > "$folder/code.py" <<'PYTHON'
import importlib.util
import pathlib
import sys
import types

sys.modules["jieba"] = types.ModuleType("jieba")  # splits Chinese, and that alone
package = pathlib.Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0])
spec = importlib.util.spec_from_file_location("metrics", package / "tasks/longbench/metrics.py")
longbench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(longbench)


def score(line, answer):
    return longbench.get_code_sim_score({"answers": [line]}, [answer])["code_sim_score"]


lines = [
    "    middle = (low + high) / 2",
    "    middle = (low + high) // 2",
    "    return total  # in tokens",
    "#include <vector>",
    'url = "https://example.org/data"',
]
for line in lines:
    print(f"{score(line, line):.2f} {score(line, line + chr(10) + '    return middle'):.2f} {line}")
print(f"{score(lines[1], lines[0]):.2f} 0.00 a wrong answer to the second")
PYTHON

found=$("$bin/python" "$folder/code.py" 2> "$folder/errors") || { cat "$folder/errors" >&2; exit 1; }
echo "lm-eval 0.4.13, scores of a line as its own answer, alone and with another line behind it:"
echo "$found"
awk 'NR == 1 { if ($1 != 1 || $2 != 1) wrong = 1 } NR > 1 && NR < 6 { if ($1 != 0 || $2 > 0.6) wrong = 1 }
    NR == 6 { if ($1 < 0.9) wrong = 1 } END { exit wrong || NR != 6 }' <<< "$found"
