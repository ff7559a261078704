"""The JSONL part of ``vllm-qfilters generate``, with made-up engines."""

import functools
import json

import pytest

from vllm_qfilters.commands.generate import offline
from vllm_qfilters.commands.generate.offline import BadLine, Completion, OutputMismatch, Refusal, Request

INPUT = [
    {"prompt": "one", "id": "a"},
    {"messages": [{"role": "user", "content": "two"}], "id": 2},
    {"prompt": "refused", "id": None},
    {"prompt": "vier \u2028 größer"},
    "{not json",
    {"prompt": "six", "id": True, "max_tokens": 9, "temperature": 0.5, "kv_budget": 512},
    {"prompt": "seven"},
]


class Echo:
    """Answers with the prompt in capitals; counts starts and keeps the batches."""

    def __init__(self):
        self.starts = 0
        self.batches = []

    def start(self):
        self.starts += 1
        return functools.partial(map, self)

    def __call__(self, requests):
        self.batches.append([request.line for request in requests])
        return [self.answer(request) for request in requests]

    @staticmethod
    def answer(request):
        text = request.prompt or request.messages[-1]["content"]
        return Refusal("no such prompt") if text == "refused" else Completion(text.upper(), "stop", len(text), 3)

    @property
    def answered(self):
        return [line for batch in self.batches for line in batch]


def must_not_start():
    raise AssertionError("an engine was started")


def write_input(path, rows):
    path.write_bytes(b"".join((row if isinstance(row, str) else json.dumps(row)).encode() + b"\n" for row in rows))
    return offline.read_input(path)


@pytest.fixture
def lines(tmp_path):
    return write_input(tmp_path / "in.jsonl", INPUT)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


def test_every_line_is_answered_in_order(lines, output, capsys):
    engine = Echo()
    assert offline.run(lines, output, engine.start, batch_size=3) == (7, 0, 2)
    written = [json.loads(line) for line in output.read_text().removesuffix("\n").split("\n")]
    counts = {"finish_reason": "stop", "completion_tokens": 3}
    assert written == [
        {"line": 1, "id": "a", "text": "ONE", "prompt_tokens": 3, **counts},
        {"line": 2, "id": 2, "text": "TWO", "prompt_tokens": 3, **counts},
        {"line": 3, "id": None, "error": "no such prompt"},
        {"line": 4, "id": None, "text": "VIER \u2028 GRÖSSER", "prompt_tokens": 13, **counts},
        {"line": 5, "id": None, "error": "invalid JSON at column 2: Expecting property name enclosed in double quotes"},
        {"line": 6, "id": True, "text": "SIX", "prompt_tokens": 3, **counts},
        {"line": 7, "id": None, "text": "SEVEN", "prompt_tokens": 5, **counts},
    ]
    assert engine.starts == 1 and engine.batches == [[1, 2, 3], [4, 6], [7]]
    reported = capsys.readouterr().err
    assert "input line 3: no such prompt" in reported and "input line 5: invalid JSON at column 2" in reported


def test_options_of_a_line_reach_the_engine(lines):
    assert lines[5] == Request(6, True, "six", None, max_tokens=9, temperature=0.5, kv_budget=512)
    assert lines[1] == Request(2, 2, None, [{"role": "user", "content": "two"}])


def test_blank_lines_bom_and_crlf(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b", "id": null, "note": [1]}')
    assert offline.read_input(path) == [Request(1, None, "a"), Request(4, None, "b")]


def test_an_empty_input_gives_an_empty_output(tmp_path, output):
    lines = write_input(tmp_path / "in.jsonl", [])
    assert offline.run(lines, output, must_not_start, batch_size=3) == (0, 0, 0)
    assert output.read_bytes() == b""


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"prompt": "a"', "invalid JSON at column 15: Expecting ',' delimiter"),
        ('{"prompt": "a', "invalid JSON at column 12: Unterminated string"),
        ("[1]", "not a JSON object"),
        ("7", "not a JSON object"),
        ("[" * 100_000, "invalid JSON"),
        (b'{"prompt": "\xff"}', "invalid JSON: 'utf-8' codec"),
        ('{"prompt": "\\ud800"}', "surrogates"),
        ('{"prompt": "a", "temperature": NaN}', "invalid JSON"),
        ('{"prompt": "a", "id": 1e999}', "invalid JSON"),
        ("{}", "neither prompt nor messages"),
        ('{"prompt": null}', "neither prompt nor messages"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "both prompt and messages"),
        ('{"prompt": 5}', "prompt must be a string"),
        ('{"prompt": ["a"]}', "prompt must be a string"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": "hi"}', "at least one message"),
        ('{"messages": ["hi"]}', '"role" and "content"'),
        ('{"messages": [{"role": "user"}]}', '"role" and "content"'),
        ('{"messages": [{"role": "user", "content": "a", "tool_calls": []}]}', "nothing else"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "must be strings"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens must be an integer, not 1.5"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens must be an integer, not True"),
        ('{"prompt": "a", "max_tokens": 99999999999}', "at most 2147483647"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature must be a number"),
        ('{"prompt": "a", "kv_budget": "512"}', "kv_budget must be a number"),
        ('{"prompt": "a", "kv_budget": false}', "kv_budget must be a number"),
        ('{"prompt": "a", "id": [1]}', "id must be a string"),
    ],
)
def test_bad_lines_say_why(line, reason):
    bad = offline.parse_line(9, line if isinstance(line, bytes) else line.encode())
    assert isinstance(bad, BadLine) and bad.line == 9 and reason in bad.error


def test_a_bad_line_keeps_its_id():
    assert offline.parse_line(1, b'{"id": "x", "prompt": 5}').id == "x"


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_run_killed_at_any_byte_is_continued(lines, output, batch_size):
    offline.run(lines, output, Echo().start, batch_size)
    whole = output.read_bytes()
    for size in range(len(whole) + 1):
        output.write_bytes(whole[:size])
        done = whole[:size].count(b"\n")
        engine = Echo()
        assert offline.run(lines, output, engine.start, batch_size) == (7, done, 2)
        assert output.read_bytes() == whole
        assert engine.answered == [line.line for line in lines[done:] if isinstance(line, Request)]


def test_a_finished_output_is_left_alone(lines, output):
    offline.run(lines, output, Echo().start, batch_size=3)
    before = output.stat().st_mtime_ns
    assert offline.run(lines, output, must_not_start, batch_size=3) == (7, 7, 2)
    assert output.stat().st_mtime_ns == before


def test_no_engine_for_bad_lines_alone(tmp_path, output):
    lines = write_input(tmp_path / "in.jsonl", ["{", "{}"])
    assert offline.run(lines, output, must_not_start, batch_size=3) == (2, 0, 2)


def test_every_batch_is_on_disk_before_the_next_begins(lines, output):
    on_disk = []

    def generate(requests):
        on_disk.append(output.read_bytes().count(b"\n"))
        return [Echo.answer(request) for request in requests]

    offline.run(lines, output, lambda: functools.partial(map, generate), batch_size=2)
    assert on_disk == [0, 2, 4, 6]


def test_an_interrupted_run_keeps_its_batches(lines, output):
    def generate(requests):
        if requests[0].line > 3:
            raise KeyboardInterrupt
        return [Echo.answer(request) for request in requests]

    with pytest.raises(KeyboardInterrupt):
        offline.run(lines, output, lambda: functools.partial(map, generate), batch_size=3)
    engine = Echo()
    assert offline.run(lines, output, engine.start, batch_size=3) == (7, 3, 2)
    assert engine.answered == [4, 6, 7]


def test_lines_appended_to_the_input_are_generated(tmp_path, lines, output):
    offline.run(lines, output, Echo().start, batch_size=3)
    engine = Echo()
    longer = write_input(tmp_path / "in.jsonl", [*INPUT, {"prompt": "new"}])
    assert offline.run(longer, output, engine.start, batch_size=3) == (8, 7, 2)
    assert engine.answered == [8]


def result(number, identifier):
    return json.dumps({"line": number, "id": identifier, "text": ""}) + "\n"


@pytest.mark.parametrize(
    "content, reason",
    [
        (result(2, 2), "its line 1 is not the result of input line 1"),
        (result(1, "other id"), "its line 1 is not the result of input line 1"),
        (result(1, "a") + result(1, "a"), "its line 2 is not the result of input line 2"),
        (result(1, "a") + "\n", "its line 2 is not the result of input line 2"),
        (result(1, "a") + "[]\n", "its line 2 is not the result of input line 2"),
        ("my notes\n", "its line 1 is not the result of input line 1"),
        ("my notes", "its line 1 is not the beginning of a result"),
        (result(1, "a") + '{"line": 3', "its line 2 is not the beginning of a result"),
        (result(1, "a") * 8, "it has 8 lines, the input has 7"),
        (result(1, "a") * 7 + "x", "it has 8 lines, the input has 7"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_kept(lines, output, content, reason):
    output.write_text(content)
    with pytest.raises(OutputMismatch, match=reason):
        offline.run(lines, output, must_not_start, batch_size=3)
    assert output.read_text() == content


def test_output_must_be_a_regular_file(lines, tmp_path):
    with pytest.raises(OutputMismatch, match="not a regular file"):
        offline.run(lines, tmp_path, must_not_start, batch_size=3)
