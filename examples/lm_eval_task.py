"""lm-eval on the engine: a number hidden in a long text, asked for at its end, within a budget.

    pip install 'lm-eval==0.4.13'
    python examples/lm_eval_task.py MODEL --budget 1024
    python examples/lm_eval_task.py MODEL --budget 0      # the full cache

lm-eval hands arguments that it does not know on to vLLM's LLM, so that what switches compression on is given with
them. Its own tasks take the same arguments; this one needs no hub.
"""

import argparse
import json
import pathlib
import random
import tempfile
from typing import Any

import lm_eval

from vllm_qfilters import kv_compression


def write_questions(path: pathlib.Path, count: int, words: int) -> None:
    """Writes prompts that hide a number in Python's own documentation, and the numbers, as lines of JSON."""
    from pydoc_data import topics

    numbers, text = random.Random(0), " ".join(topics.topics.values()).split()
    if count * words > len(text):
        raise SystemExit(f"{count} prompts of {words} words are more than the {len(text)} there are: ask for less")
    lines = []
    for index in range(count):
        number, place = str(numbers.randrange(10_000, 100_000)), words * (index + 1) // (count + 1)
        around = text[index * words : (index + 1) * words]
        hidden = [*around[:place], f"\n\nThe secret number is {number}. Remember it.\n\n", *around[place:]]
        lines.append({"prompt": " ".join(hidden) + "\n\nThe secret number is", "answer": number})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def evaluate(arguments: argparse.Namespace, questions: pathlib.Path, compression: dict[str, Any]) -> float:
    """Returns the share of the questions that the engine answers right."""
    task = {
        "task": "hidden_number",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "filter_list": [
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    # A word has two or three tokens, and lm-eval cuts the beginning off prompts that are too long.
    length = 4 * arguments.words
    engine = {"pretrained": arguments.model, "max_model_len": length, "enforce_eager": True, **compression}
    engine |= json.loads(arguments.llm)
    results = lm_eval.simple_evaluate(model="vllm", model_args=engine, tasks=[task], verbosity="ERROR")
    return results["results"]["hidden_number"]["exact_match,number"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("--budget", type=int, default=1024, help="tokens; 0: the full cache; default %(default)s")
    parser.add_argument("--words", type=int, default=1800, help="of a prompt; default %(default)s")
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--llm", default="{}", help="further arguments of vLLM's LLM, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        questions = pathlib.Path(folder, "questions.jsonl")
        write_questions(questions, arguments.questions, arguments.words)
        compression = kv_compression("qfilters", budget=arguments.budget) if arguments.budget else {}
        found = evaluate(arguments, questions, compression)
    print(f"found {found:.0%}", f"within {arguments.budget} tokens" if arguments.budget else "with the full cache")


if __name__ == "__main__":
    main()
