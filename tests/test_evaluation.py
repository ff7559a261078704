"""The evaluation without an engine: texts, needles, numbers, results, planning, tables."""

import io
import json
import math
import random
import re
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from vllm_qfilters.commands.evaluation import (
    copying,
    environment,
    generations,
    needles,
    ruler,
    statistics,
    tasks,
    texts,
)
from vllm_qfilters.commands.evaluation.engine import (
    EngineError,
    EngineFinished,
    EngineStarted,
    Progress,
    RequestFinished,
    run_engine,
)
from vllm_qfilters.commands.evaluation.evaluate import engine_options, evaluate, plan
from vllm_qfilters.commands.evaluation.methods import FULL, Method
from vllm_qfilters.commands.evaluation.needles import PromptFrame
from vllm_qfilters.commands.evaluation.recall import recall_task
from vllm_qfilters.commands.evaluation.report import loss_increase, ratio_to_reference, report, table
from vllm_qfilters.commands.evaluation.results import Results
from vllm_qfilters.commands.evaluation.tasks import EvalAnswer, LossTask, RetrievalTask
from vllm_qfilters.commands.evaluation.texts import Text, TextSequence

BLOCK = 32


class CharacterTokenizer:
    """A token per character, and a BOS token where special tokens are asked for."""

    BOS = 0

    def __init__(self, has_template=True):
        self.chat_template = "a template" if has_template else None

    def encode(self, text, add_special_tokens=True):
        return [self.BOS] * add_special_tokens + [ord(character) for character in text]

    def decode(self, token_ids):
        return "".join(chr(token) for token in token_ids if token != self.BOS)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return f"\0<user>{messages[0]['content']}</user>\n<assistant>"


@pytest.mark.parametrize(
    "text, options",
    [
        ("qfilters", {}),
        ("streaming:sinks=16", {"sinks": 16}),
        (
            "qfilters:filter=static,granularity=head,window=0.25",
            {"filter": "static", "granularity": "head", "window": 0.25},
        ),
        ("qfilters:filters=/a/b.safetensors", {"filters": "/a/b.safetensors"}),
    ],
)
def test_methods_are_read(text, options):
    method = Method.parse(text)
    assert (method.label, method.name, dict(method.options)) == (text, text.partition(":")[0], options)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("magic", "'magic' is no method"),
        ("full", "'full' is no method"),
        ("qfilters:window", "'window' is not option=value"),
        ("qfilters:widow=3", "unknown KV compression option widow"),
        ("qfilters:window=-1", "window=-1"),
        ("qfilters:budget=512", "budgets are given by --budgets"),
        ("qfilters:method=knorm", "the method before the colon"),
    ],
)
def test_bad_methods_say_why(text, reason):
    with pytest.raises(ValueError, match=reason):
        Method.parse(text)


def test_texts_of_every_machine():
    read = texts.read_texts(["technical", "code", "manual"])
    assert [text.name for text in read] == ["technical", "code", "manual"]
    assert all(len(text.content) > 50_000 for text in read)
    assert set(texts.DESCRIPTIONS) == set(texts.TEXTS)


def test_prose_is_the_book_without_numbers():
    pytest.importorskip(texts.BOOK_PACKAGE)
    content = texts.read_text("prose").content
    assert content.startswith("In the beginning God created the heavens and the earth.\nAnd the earth was without form")
    assert len(content) > 3_000_000 and "\n1:2" not in content


def test_prose_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(texts, "BOOK_PACKAGE", "no_such_package_here")
    with pytest.raises(ValueError, match=r"pip install 'vllm-qfilters\[eval\]'"):
        texts.read_text("prose")


def test_files_are_texts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("größer", encoding="utf-8")
    assert texts.read_text(str(path)) == Text("a.txt", "größer")
    with pytest.raises(ValueError, match=r"two texts are named a\.txt"):
        texts.read_texts([str(path), str(path)])
    with pytest.raises(ValueError, match=r"no\.txt is none of prose, .*No such file"):
        texts.read_text("no.txt")
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not a UTF-8 text"):
        texts.read_text(str(path))


def test_texts_are_cut_in_turn_and_apart():
    read = [Text("a", "abcdefghij"), Text("b", "ABCDEFGHIJ")]
    cut = texts.cut(read, CharacterTokenizer(), 3, 4)
    decoded = [(sequence.text, CharacterTokenizer().decode(sequence.token_ids)) for sequence in cut]
    assert decoded == [("a", "bcd"), ("b", "DEF"), ("a", "ghi")]
    assert all(sequence.token_ids[0] == CharacterTokenizer.BOS and len(sequence.token_ids) == 4 for sequence in cut)
    with pytest.raises(ValueError, match="a has 10 tokens, 2 sequences of 8 are to come from it"):
        texts.cut(read, CharacterTokenizer(), 3, 8)


def test_pieces_of_short_texts_overlap_and_differ():
    read = [Text("a", "abcdefghij"), Text("b", "ABCDEFGHIJ")]
    cut = [decode(piece.token_ids) for piece in texts.pieces(read, CharacterTokenizer(), 5, 2)]
    assert cut == ["bc", "CD", "ef", "GH", "gh"]
    cut = [decode(piece.token_ids) for piece in texts.pieces(read[:1], CharacterTokenizer(), 3, 7)]
    assert cut == ["abcdefg", "bcdefgh", "cdefghi"]
    with pytest.raises(ValueError, match="a has 10 tokens, 3 pieces of 8 are to come from it"):
        texts.pieces(read[:1], CharacterTokenizer(), 3, 8)


FILLER = [ord(character) for character in "Some words. " * 300]


def decode(token_ids):
    return CharacterTokenizer().decode(token_ids)


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_passkey(has_template, depth):
    frame = PromptFrame(CharacterTokenizer(has_template))
    made = needles.passkey(frame, FILLER, 1500, depth, random.Random(1))
    text = decode(made.token_ids)
    assert len(made.token_ids) == 1500 and len(made.answer) == 5
    assert text.count(made.answer) == 2 and text.endswith("The pass key is the number")
    assert text.startswith("<user>There is") if has_template else text.startswith("There is")
    assert ("</user>\n<assistant>The pass key is the number" in text) == has_template
    before, _, after = text.partition(f"\nThe pass key is the number {made.answer}.")
    filler_before, filler_after = before.count("Some words."), after.count("Some words.")
    assert filler_before / (filler_before + filler_after) == pytest.approx(depth, abs=0.02)
    if 0 < depth < 1:
        assert before.rstrip().endswith(".")


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_key_value(has_template, depth):
    frame = PromptFrame(CharacterTokenizer(has_template))
    made = needles.key_value(frame, FILLER, 1500, depth, random.Random(1))
    text = decode(made.token_ids)
    assert len(made.token_ids) == 1500
    lines = [line for line in text.splitlines() if line.startswith("The number of the ") and line.endswith(".")]
    assert len(set(lines)) == len(lines) == needles.NUM_KEYS
    asked = text.rpartition("The number of the ")[2].removesuffix(" is")
    (place,) = (i for i, line in enumerate(lines) if line == f"The number of the {asked} is {made.answer}.")
    assert place / (len(lines) - 1) == pytest.approx(depth, abs=0.1)
    if depth == 0.5:
        assert 0.4 < text.index(lines[place]) / len(text) < 0.7


@pytest.mark.parametrize("make", [needles.passkey, needles.key_value])
def test_prompts_too_short_for_a_needle_are_refused(make):
    with pytest.raises(ValueError, match="give a longer length"):
        make(PromptFrame(CharacterTokenizer()), FILLER, 100, 0.5, random.Random(0))


@pytest.mark.parametrize(
    "text, is_answered",
    [(" 12345.", True), (" is 12345 or 6", True), ("6, 12345", False), ("123456", False), ("none", False)],
)
def test_the_first_number_counts(text, is_answered):
    assert needles.is_answered(text, "12345") == is_answered


def test_needles_are_the_same_in_every_run_and_differ_by_seed():
    def answers(seed):
        task = tasks.retrieval_task("kv", CharacterTokenizer(), "Some words. " * 300, 1500, [0, 1], 3, seed, [0.5])
        return [needle.answer for _, needle in task.needles]

    assert answers(0) == answers(0) != answers(1)
    assert len(set(answers(0))) == 6


TASKS_OF_QUESTIONS = [
    lambda seed: ruler.ruler_task(CharacterTokenizer(), "Some words. " * 500, 3000, list(ruler.KINDS), 2, seed, [0.5]),
    lambda seed: copying.copy_task(CharacterTokenizer(), 1500, list(copying.KINDS), 2, seed, [0.5]),
    lambda seed: recall_task(CharacterTokenizer(), "Some words. " * 500, 2048, 128, 3, seed, [512]),
]


@pytest.mark.parametrize("make", TASKS_OF_QUESTIONS)
def test_questions_are_the_same_in_every_run_and_differ_by_seed(make):
    task, other = make(0), make(1)
    assert task.questions == make(0).questions
    assert all(one.token_ids != of_other.token_ids for one, of_other in zip(task.questions, other.questions))
    assert len({tuple(question.token_ids) for question in task.questions}) == len(task.questions)
    assert [len(set(question.expected)) for question in task.questions] == [len(q.expected) for q in task.questions]


@pytest.mark.parametrize("make", TASKS_OF_QUESTIONS)
def test_right_answers_score_one_and_wrong_ones_nothing(make):
    task = make(0)

    def measure(answer):
        return task.measure([EvalAnswer([], answer(question), "length", []) for question in task.questions])

    right = measure(lambda question: ",\n".join(line.rstrip("\n,") for line in question.expected))
    if task.name.startswith("copy"):
        right = measure(lambda question: "".join(question.expected) + "and more")
    wrong = measure(lambda question: "9" + "\n9".join(question.expected))
    assert (right["mean"], right["error"], right["trials"]) == (1, 0, len(task.questions)) and wrong["mean"] == 0
    assert set(right["kinds"]) == set(task.settings["kinds"]) and set(right["scores"]) == {1}


@pytest.mark.parametrize("kind", ruler.KINDS)
@pytest.mark.parametrize("length", [2500, 9000])
def test_ruler_prompts_hold_what_they_ask_for(kind, length):
    task = ruler.ruler_task(CharacterTokenizer(), "Some words. " * 1000, length, [kind], 3, 0, [0.5])
    for question in task.questions:
        prompt, _, tail = decode(question.token_ids).rpartition("</user>")
        assert length - 30 * 10 < len(question.token_ids) <= length and prompt.startswith("<user>") and tail
        assert all(word in prompt for word in question.expected)
        if kind in ("single", "multi-key", "multi-value", "multi-query"):
            assert len(question.expected) == (1 if kind in ("single", "multi-key") else ruler.NEEDLES)
            keys = re.findall(r"A number of the (\w+ \w+) is (\d{7})\.\n", prompt)
            assert len(keys) == {"single": 1}.get(kind, ruler.NEEDLES)
            asked = prompt.rpartition("\n\n")[2]
            assert [number for key, number in keys if key in asked] == sorted(
                question.expected, key=[number for _, number in keys].index
            )
        elif kind == "variables":
            held = dict(re.findall(r"VAR ([A-Z]{5}) = (.+)\n", prompt))
            assert list(held) == question.expected and len(held) == ruler.HOPS + 1
            number = held[question.expected[0]]
            assert number.isdigit() and f"hold the number {number}?" in prompt
            assert [held[name] for name in question.expected[1:]] == [f"VAR {name}" for name in question.expected[:-1]]
        else:
            listed = re.findall(r"\b[a-z]+-[a-z]+\b" if kind == "common-words" else r"\b[a-z]{6}\b", prompt)
            most = Counter(listed).most_common(len(question.expected) + 1)
            assert {word for word, _ in most[:-1]} == set(question.expected) and most[-2][1] > most[-1][1] - (
                kind == "frequent-words"
            )


def test_ruler_counts_whole_words():
    assert tasks.found("1234567, 7654321", ["1234567", "765432"]) == 0.5
    assert (
        tasks.found("old-apple and red-old-apple", ["old-apple"]) == 1 and tasks.found("red-old-apple", ["apple"]) == 0
    )


@pytest.mark.parametrize("kind", copying.KINDS)
def test_what_is_copied_has_one_change(kind):
    (question,) = copying.copy_task(CharacterTokenizer(), 1500, [kind], 1, 0, [0.5]).questions
    text = decode(question.token_ids)
    in_prompt = [line for line in text.splitlines() if re.search(r"\d{5}", line)][:-1]
    expected = [line.rstrip("\n") for line in question.expected]
    changed = [(before, after) for before, after in zip(in_prompt, expected, strict=True) if before != after]
    assert len(changed) == 1 and len(expected) > 10
    name, number = re.search(r"the number of (\S+(?: \S+)?) is now (\d{5})\.", text).groups()
    assert all(name in line for line in changed[0]) and number in changed[0][1]
    assert 1500 - 50 < len(question.token_ids) <= 1500 and text.endswith(copying.KINDS[kind].head)


def test_copied_lines_count_in_their_order():
    expected = ["| a | 1 |\n", "| b | 2 |\n", "| c | 3 |\n"]
    for text, score in [
        ("| a | 1 |\n| b | 2 |\n| c | 3 |", 1),
        ("Here:\n| a | 1 |\n| c | 3 |", 2 / 3),
        ("| c | 3 |\n| b | 2 |\n| a | 1 |", 1 / 3),
        ("| a | 11 |\n| b |", 0),
        ("| a | 1 |\n" * 3, 1 / 3),
    ]:
        assert copying.lines_in_order(text, expected) == pytest.approx(score), text


def test_a_fact_is_stated_far_from_the_beginning_and_the_question():
    for question in recall_task(CharacterTokenizer(), "Some words. " * 500, 2048, 128, 3, 0, [512]).questions:
        text = decode(question.token_ids)
        place, asked = text.index("\nThe number of the "), text.index("\n\nWhat is the number of the ")
        assert question.expected[0] in text[place:asked] and text.count(question.expected[0]) == 1
        assert place - len("<user>") == pytest.approx(512, abs=12) and asked - place == pytest.approx(2090, abs=60)
    assert recall_task(CharacterTokenizer(), "Some words. " * 500, 2048, 64, 1, 0, [512]).cuts["prefill_interval"] == 64


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: ruler.ruler_task(CharacterTokenizer(), "Few.", 500, ["single"], 1, 0, [0.5]), "give a longer one"),
        (lambda: recall_task(CharacterTokenizer(), "Few.", 500, 128, 1, 0, [512]), "give a longer one"),
        (lambda: copying.copy_task(CharacterTokenizer(), 100, ["table"], 1, 0, [0.5]), "give a longer length"),
        *[
            (
                lambda kind=kind: ruler.ruler_task(CharacterTokenizer(), "Many. " * 99, 250, [kind], 1, 0, [0.5]),
                "give a longer length",
            )
            for kind in ruler.KINDS
        ],
    ],
)
def test_questions_without_room_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_statistics():
    mean, error = statistics.paired_increase([1.0, 2.0, 6.0], [1.0, 1.0, 3.0])
    assert mean == pytest.approx(4 / 3) and error == pytest.approx(math.sqrt(7 / 3 / 3))
    assert math.isnan(statistics.estimate([1.0]).error)
    assert statistics.share(3, 4) == (0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 4)))
    assert statistics.block_means([1, 3, 5, 7, 9], 2) == [2, 6, 9]
    assert statistics.repeated_ngrams([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert statistics.repeated_ngrams([1, 2]) == 0
    with pytest.raises(ValueError):
        statistics.paired_increase([1.0], [1.0, 2.0])


def loss_task(name="streaming", budgets=(96, 128), num_texts=2, tokens=600, loss_from=256, chunk=64):
    sequences = [TextSequence(f"text{index}", list(range(tokens))) for index in range(num_texts)]
    return LossTask(name, list(budgets), sequences, chunk, loss_from, {"tokens": tokens, "loss_from": loss_from})


def retrieval_task(budgets=(0.5,)):
    made = [(depth, needles.Needle([1] * 400, "123")) for depth in (0.0, 1.0) for _ in range(2)]
    return RetrievalTask("passkey-400", list(budgets), made, {"depths": [0.0, 1.0]})


def question_task():
    asked = [tasks.Question(kind, [1] * 400, [expected], 4) for kind in "ab" for expected in ("123", "4")]
    return tasks.QuestionTask("ruler-400", [0.5], asked, tasks.found, {"kinds": ["a", "b"], "repeats": 2})


def losses(tokens, value):
    return EvalAnswer([], "", "length", [99.0] * 255 + [value] * (tokens - 256))


def test_loss_is_measured_from_its_position_on():
    measured = loss_task().measure([losses(600, 2.0), losses(600, 4.0)])
    assert measured["loss"] == 3.0 and measured["texts"] == ["text0", "text1"]
    assert measured["block_losses"] == [[2.0] * 3, [4.0] * 3]


def test_fractions_of_a_loss_task_are_of_what_is_cut():
    (request, _) = loss_task(budgets=[0.25]).requests(0.25)
    assert request.kv_budget == 64 and request.wants_losses
    assert [request.kv_budget for request in loss_task().requests(0)] == [0, 0]


def test_retrieval_by_depth():
    answers = [EvalAnswer([], text, "length", []) for text in (" 123", "no", "the 123.", "123")]
    measured = retrieval_task().measure(answers)
    assert (measured["found"], measured["trials"]) == (3, 4)
    assert measured["depths"] == [{"depth": 0.0, "found": 1, "trials": 2}, {"depth": 1.0, "found": 2, "trials": 2}]


def test_generation():
    task = generations.generation_task(CharacterTokenizer(), 2, 100, 7, [64, 10_000])
    assert task.budgets == [64], "the larger one evicts nothing"
    assert [request.sampling["seed"] for request in task.requests(64)] == [7, 8]
    answers = [EvalAnswer([1] * 9, "a", "stop", []), EvalAnswer(list(range(9)), "b", "length", [])]
    measured = task.measure(answers)
    assert measured["repeated_4grams"] == [pytest.approx(5 / 6, abs=1e-4), 0]
    assert measured["finished"] == 1 and measured["lengths"] == [9, 9]


def test_loops_are_found_in_the_last_third():
    task = generations.generation_task(CharacterTokenizer(), 3, 100, 7, [64])
    beginning, end = [*[1] * 20, *range(100, 110)], list(range(200, 215))
    token_ids = [beginning + end, list(range(30)) + [1, 2, 3] * 5, [1] * 5]
    measured = task.measure([EvalAnswer(generated, "", "length", []) for generated in token_ids])
    assert measured["repeated_4grams_last_third"] == [0, 0.75, 0], "12 4-grams of 15 tokens, 3 of them different"
    assert measured["loops"] == 1
    assert measured["distinct_last_third"][1] == 0.2
    by_third = measured["repeated_4grams_thirds"]
    assert by_third[1] == [0, 0, 0.75] and by_third[0][0] > by_third[0][1] > by_third[0][2] == 0
    first, _, last = generations.repeated_by_third(measured)
    assert last.mean == 0.25 and first.mean == pytest.approx(statistics.estimate([s[0] for s in by_third]).mean)
    full = {"repeated_4grams_last_third": [0, 0.5, 0]}
    assert generations.more_repeats(measured, full) == (pytest.approx(0.25 / 3), pytest.approx(0.25 / 3))
    assert measured["repeated_4grams"][0] > 0.3, "that the beginning repeats counts there alone"


CONTEXTS = [Text(name, "".join(f"{name}{number:04} " for number in range(300))) for name in ("a", "b")]


@pytest.mark.parametrize("has_template", [True, False])
def test_generations_behind_a_context_each_have_a_text_of_their_own(has_template):
    task = generations.generation_task(CharacterTokenizer(has_template), 16, 100, 7, [64, 400], CONTEXTS, 50, 1.0)
    assert len(task.prompts) == 16 and task.budgets == [64] and task.max_length < 400
    pieces = set()
    for index, prompt in enumerate(task.prompts):
        before, _, instruction = decode(prompt).removeprefix("<user>").partition("\n\n")
        assert len(before) == 50 and before in CONTEXTS[index % 2].content
        pieces.add(before)
        assert instruction.startswith(generations.INSTRUCTIONS[index % 16])
        assert prompt[0] == CharacterTokenizer.BOS and prompt.count(CharacterTokenizer.BOS) == 1
    assert len(pieces) == 16
    assert {request.sampling["temperature"] for request in task.requests(64)} == {1.0}


def test_held_back_generations_have_other_prompts_and_sampling_can_be_set():
    usual, held_back = (
        generations.generation_task(CharacterTokenizer(), 16, 90, 7, [64], CONTEXTS, context, is_held_back=is_held_back)
        for context, is_held_back in [(50, False), (50, True)]
    )
    assert not {tuple(prompt) for prompt in usual.prompts} & {tuple(prompt) for prompt in held_back.prompts}
    assert len(set(generations.INSTRUCTIONS + generations.HELD_BACK_INSTRUCTIONS)) == 32
    task = generations.generation_task(CharacterTokenizer(), 1, 90, 7, [64], penalty=1.1, ignore_eos=True)
    expected = {"temperature": 0.7, "top_p": 0.95, "seed": 7, "repetition_penalty": 1.1, "ignore_eos": True}
    assert task.requests(64)[0].sampling == expected


def test_without_a_context_generations_are_those_of_before():
    tokenizer = CharacterTokenizer()
    task = generations.generation_task(tokenizer, 8, 100, 7, [64], CONTEXTS)
    assert [decode(prompt) for prompt in task.prompts] == [
        f"<user>{instruction}</user>\n<assistant>" for instruction in generations.INSTRUCTIONS[:8]
    ]
    assert task.requests(64)[0].sampling == {"temperature": 0.7, "top_p": 0.95, "seed": 7}
    with pytest.raises(ValueError, match="there are 16 prompts to generate from, not 17"):
        generations.generation_task(tokenizer, 17, 100, 7, [64], CONTEXTS)
    with pytest.raises(ValueError, match="a has 1800 tokens, 1 pieces of 2000 are to come from it"):
        generations.generation_task(tokenizer, 2, 100, 7, [64], CONTEXTS, 2000)


def test_engine_options():
    method = Method.parse("qfilters:window=0.25")
    assert engine_options(method, loss_task(), BLOCK) == {
        "window": 0.25, "interval": BLOCK, "prefill": "chunked", "scope": "all", "chunk": 64, "prefill_interval": 64,
        "budget": 1.0, "max_budget": "unlimited", "allow_kv_budget_off": True,
    }  # fmt: skip
    assert engine_options(Method.parse("knorm:interval=64"), retrieval_task(), BLOCK) == {
        "interval": 64, "budget": 1.0, "max_budget": "unlimited", "allow_kv_budget_off": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "method, task, reason",
    [
        ("qfilters:chunk=128", loss_task(), "chunk is set by streaming itself"),
        ("qfilters:prefill=full", loss_task("prompt-1"), "prefill is set by prompt-1 itself"),
        ("qfilters:granularity=page", loss_task(), "qfilters:granularity=page, streaming: kv_budget=96: at least"),
        ("qfilters:window=64", loss_task(), "qfilters:window=64, streaming: kv_budget=96: at least 100 tokens"),
        ("qfilters:window=200", retrieval_task(), "0.5 of a prompt of 400 tokens is 200, at least 236 are"),
        ("knorm:interval=48", retrieval_task(), "interval=48 is not a multiple of the block size 32"),
        ("knorm", loss_task(chunk=48), "chunk=48 is not a multiple of the block size 32"),
    ],
)
def test_what_does_not_fit_together_is_refused(method, task, reason):
    with pytest.raises(ValueError, match=reason):
        engine_options(Method.parse(method), task, BLOCK)


class FakeEngine:
    """Stands for ``run_engine``: loses 2 nats with the full cache, 3 with streaming, 2.5 with others. Finishes
    backwards.
    """

    def __init__(self, die_after=None):
        self.starts, self.requests, self.die_after = [], [], die_after

    def __call__(self, engine_args, requests):
        compression = engine_args.additional_config["kv_compression"]
        self.starts.append(compression)
        yield EngineStarted({"kv_compression": compression, "block_size": BLOCK})
        for index, request in reversed(list(enumerate(requests))):
            if self.die_after is not None and len(self.requests) >= self.die_after:
                raise EngineError("the engine died")
            self.requests.append(request)
            loss = 2.0 if request.kv_budget == 0 else 3.0 if compression["method"] == "streaming" else 2.5
            answer = losses(len(request.token_ids), loss)
            yield RequestFinished(index, EvalAnswer([1, 2], "123" if loss < 3 else "", "stop", answer.losses))
        yield EngineFinished(evicted_tokens=1234)


ENGINE_ARGS = SimpleNamespace(scheduler_cls=None, worker_cls="auto", additional_config={})
METHODS = [Method.parse("qfilters"), Method.parse("streaming")]


def run(path, engine, methods=METHODS, chosen=None, model="model"):
    chosen = chosen or [loss_task(), retrieval_task()]
    results = Results(path, model)
    results.check_settings(chosen)
    jobs = plan(methods, chosen, results, BLOCK)
    if jobs:
        results.start_run({"commit": "abc"})
        evaluate(jobs, results, ENGINE_ARGS, engine)
    return Results(path, model)


def test_the_bar_moves_while_no_request_is_finished(tmp_path, monkeypatch):
    shown = []

    class Bar(tqdm):
        def update(self, n=1):
            super().update(n)
            shown.append(self.n)

    monkeypatch.setattr("vllm_qfilters.commands.evaluation.evaluate.tqdm", Bar)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    task = loss_task()
    of_requests = [request.most_tokens for budget in (0, *task.budgets) for request in task.requests(budget)]

    def engine(engine_args, requests):
        yield EngineStarted({})
        for tokens in (100, 250, 50):  # one request is preempted
            yield Progress(tokens)
        for index, request in enumerate(requests):
            yield RequestFinished(index, losses(len(request.token_ids), 2.0))
            yield Progress(1 if index + 1 < len(requests) else 0)
        yield EngineFinished(evicted_tokens=0)

    run(tmp_path / "r.json", engine, METHODS[:1], [task])
    assert shown[:3] == [100, 250, 50]
    behind = [sum(of_requests[: index + 1]) for index in range(len(of_requests))]
    assert shown[4::2] == [tokens + 1 for tokens in behind[:-1]] + behind[-1:]


def test_every_cell_is_measured_once(tmp_path):
    engine = FakeEngine()
    results = run(tmp_path / "r.json", engine)
    assert [start["method"] for start in engine.starts] == ["qfilters", "qfilters", "streaming", "streaming"]
    assert len(engine.requests) == 2 * (1 + 2 * 2) + 4 * (1 + 2), "the full cache once"
    assert results.methods("streaming") == ["qfilters", "streaming"] and results.budgets("streaming") == [96, 128]
    cell, full = results.get("streaming", "streaming", 96), results.get("streaming", FULL, 0)
    assert loss_increase(cell, full) == (1.0, 0.0)
    assert ratio_to_reference(results, "streaming", results.get("streaming", "qfilters", 96)) == 0.5
    written = json.loads((tmp_path / "r.json").read_text())
    engine_of_cell = written["engines"][cell["engine"]]
    assert engine_of_cell["kv_compression"]["method"] == "streaming" and engine_of_cell["evicted_tokens"] == 1234
    assert written["runs"] == [{"commit": "abc"}]


@pytest.mark.parametrize("die_after", [0, 1, 5, 13, 21])
def test_an_interrupted_run_is_continued(tmp_path, die_after):
    first, second, whole = FakeEngine(die_after), FakeEngine(), FakeEngine()
    with pytest.raises(EngineError):
        run(tmp_path / "r.json", first)
    results = run(tmp_path / "r.json", second)
    expected = run(tmp_path / "whole.json", whole)
    assert report(results) == report(expected)
    redone = len(first.requests) + len(second.requests) - len(whole.requests)
    assert 0 <= redone < 4, "at most an unfinished cell"
    third = FakeEngine()
    run(tmp_path / "r.json", third)
    assert not third.starts


def test_added_methods_and_budgets_alone_are_measured(tmp_path):
    path = tmp_path / "r.json"
    run(path, FakeEngine(), METHODS, [loss_task()])
    engine = FakeEngine()
    results = run(path, engine, [*METHODS, Method.parse("knorm")], [loss_task(budgets=(128, 256))])
    budgets = [request.kv_budget for request in engine.requests]
    assert sorted(budgets) == [128] * 2 + [256] * 6
    assert results.budgets("streaming") == [96, 128, 256]
    assert "-" in report(results), "knorm was not measured at 96"


def test_a_file_that_does_not_fit_is_refused_and_kept(tmp_path):
    path = tmp_path / "r.json"
    run(path, FakeEngine(), METHODS, [loss_task()])
    before = path.read_text()
    with pytest.raises(ValueError, match=r"has streaming with other settings \(tokens\)"):
        run(path, FakeEngine(), METHODS, [loss_task(tokens=700)])
    results = Results(path, "model")
    results.start_engine("streaming", {"dtype": "bfloat16"})
    results.check_dtype("bfloat16")
    with pytest.raises(ValueError, match="in bfloat16, and this run is in float32: give --dtype bfloat16, or"):
        results.check_dtype("float32")
    with pytest.raises(ValueError, match="has results of model, not of other"):
        run(path, FakeEngine(), METHODS, [loss_task()], model="other")
    assert path.read_text() == before
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no file of results"):
        Results(path, "model")
    path.write_text("my notes")
    with pytest.raises(ValueError, match="is not JSON"):
        Results(path, "model")


@pytest.mark.parametrize(
    "changed, names",
    [({"context": 60}, "context"), ({"temperature": 1.0}, "temperature"), ({"texts": CONTEXTS[:1]}, "texts")],
)
def test_generations_with_another_context_or_temperature_are_refused(tmp_path, changed, names):
    def task(**options):
        return generations.generation_task(CharacterTokenizer(), 2, 100, 7, [64], **options)

    options = {"context": 50, "temperature": 0.5, "texts": CONTEXTS}
    results = run(tmp_path / "r.json", FakeEngine(), METHODS[:1], [task(**options)])
    assert "generation: share of repeated 4-grams" in report(results) and " 2/2 2 0/2" in report(results)
    results.check_settings([task(**options)])
    with pytest.raises(ValueError, match=rf"has generation with other settings \({names}\)"):
        results.check_settings([task(**{**options, **changed})])


def test_generations_of_before_there_was_a_context_are_continued(tmp_path):
    path = tmp_path / "r.json"
    run(path, FakeEngine(), METHODS[:1], [generations.generation_task(CharacterTokenizer(), 2, 100, 7, [64])])
    values = json.loads(path.read_text())
    values["tasks"]["generation"] = {"prompts": 2, "tokens": 100, "seed": 7}
    for cell in values["cells"]:
        for new in ("loops", "repeated_4grams_last_third", "repeated_4grams_thirds", "distinct_last_third"):
            del cell[new]
    path.write_text(json.dumps(values))
    results = Results(path, "model")
    results.check_settings([generations.generation_task(CharacterTokenizer(), 2, 100, 7, [64])])
    assert "full cache 0.000 2/2 2 -" in report(results)
    with pytest.raises(ValueError, match=r"has generation with other settings \(context, texts\)"):
        results.check_settings([generations.generation_task(CharacterTokenizer(), 2, 100, 7, [64], CONTEXTS, 50)])


def test_report(tmp_path):
    printed = report(run(tmp_path / "r.json", FakeEngine()))
    assert "streaming: full cache 2.0000 nats per token (perplexity 7.389)" in printed
    row = next(line for line in printed.splitlines() if line.startswith("qfilters"))
    assert row.split() == ["qfilters", *["+0.5000", "(0.0000)", "0.50"] * 2]
    assert "streaming: difference to streaming (paired standard error)" in printed
    assert "\nqfilters  -0.5000 (0.0000)  -0.5000 (0.0000)\n" in printed
    assert "budget 128, increase by text" in printed and "text1" in printed
    assert "passkey-400: share found of 4 by budget (standard error); full cache 1.00 (0.00)" in printed


def test_report_of_scores(tmp_path):
    printed = report(run(tmp_path / "r.json", FakeEngine(), chosen=[question_task()]))
    assert "ruler-400: mean score of 4 questions by budget, over the full cache (paired standard error); " in printed
    assert "qfilters   0.500 +0.000 (0.000)" in printed and "streaming  0.000 -0.500 (0.289)" in printed
    assert "ruler-400, budget 0.5, score by kind" in printed


def test_table_is_aligned():
    assert table("t", ["", "12"], [["long", "3"], ["a", "456"]]) == "t\n       12\nlong    3\na     456"


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from vllm_qfilters.commands.evaluation.plots import draw

    chosen = [loss_task(), loss_task("prompt-256", [0.5]), retrieval_task(), question_task()]
    paths = draw(run(tmp_path / "r.json", FakeEngine(), METHODS, chosen))
    assert [path.name for path in paths] == ["r-loss.png", "r-retrieval.png", "r-score.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_an_engine_that_does_not_start_says_why(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineError, match="model") as raised:
        list(run_engine(EngineArgs(model=str(tmp_path)), []))
    assert "\n" not in str(raised.value) and "died" not in str(raised.value)


def test_the_commit_is_marked_where_more_than_results_has_changed(tmp_path):
    package, results = tmp_path / "package", tmp_path / environment.RESULTS
    for folder in (package, results):
        folder.mkdir(parents=True)
    (package / "__init__.py").touch()
    (results / "decode.json").write_text("{}")
    author = ("-c", "user.name=one", "-c", "user.email=one@example.com")
    for command in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "one")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    commit = environment.describe_run(package)["commit"]
    assert commit and "+" not in commit
    (results / "decode.json").write_text("{1: 2}")
    assert environment.describe_run(package)["commit"] == commit
    (package / "__init__.py").write_text("# another program")
    assert environment.describe_run(package)["commit"] == commit + "+changes"
