"""Generates from a JSONL file of prompts into a JSONL file of completions, in order, and continues where a killed run
stopped.

This is the part of ``vllm-qfilters generate`` that knows no engine: :func:`run` is given one as a callable.
"""

import codecs
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

JsonScalar = str | int | float | bool | None
_MAX_NUMBER = 2**31 - 1  # the engine's messages cannot carry more


@dataclasses.dataclass(frozen=True)
class Request:
    """A good line of the input.

    Attributes:
        line: its number in the input, from 1 on; blank lines count.
        id: what the user calls it, or None.
        prompt, messages: one of them is None.
        max_tokens, temperature, kv_budget: None where the value of the command, or of the engine, applies. The engine
            checks their ranges.
    """

    line: int
    id: JsonScalar = None
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    kv_budget: int | float | None = None


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line of the input that never reaches the engine."""

    line: int
    id: JsonScalar
    error: str


@dataclasses.dataclass(frozen=True)
class Completion:
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Stands in the place of a completion, and says why the engine gives none."""

    error: str


Answer = Completion | Refusal
GenerateBatch = Callable[[Sequence[Request]], Sequence[Answer]]
GenerateBatches = Callable[[Sequence[Sequence[Request]]], Iterable[Sequence[Answer]]]


class OutputMismatch(Exception):
    """The output belongs to another input, or to another program."""


class Summary(NamedTuple):
    """Counts the lines that the output holds after a run."""

    total: int
    resumed: int  # lines that were there before
    failed: int


class _Progress(NamedTuple):
    done: int  # complete lines
    failed: int  # complete lines with an error
    end: int  # bytes that complete lines take


def read_input(path: pathlib.Path) -> list[Request | BadLine]:
    """Reads the lines of the input that are not blank.

    Raises:
        OSError: the input cannot be read.
    """
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [parse_line(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def parse_line(number: int, line: bytes) -> Request | BadLine:
    """Reads ``{"prompt": "..."}`` or ``{"messages": [...]}`` with options. Null counts as absent, other keys are
    ignored.
    """
    identifier = None
    try:
        values = {name: value for name, value in _json_object(line).items() if value is not None}
        if isinstance(values.get("id"), list | dict):
            raise ValueError("id must be a string, a number or a boolean")
        identifier = values.get("id")
        return Request(
            line=number,
            id=identifier,
            **_prompt_or_messages(values),
            max_tokens=_number(values, "max_tokens", int),
            temperature=_number(values, "temperature", int | float),
            kv_budget=_number(values, "kv_budget", int | float),
        )
    except ValueError as error:
        return BadLine(number, identifier, str(error))


def run(
    lines: Sequence[Request | BadLine],
    output: pathlib.Path,
    start_engines: Callable[[], GenerateBatches],
    batch_size: int,
) -> Summary:
    """Writes one line per line of the input to ``output``, behind those that an earlier run left there.

    A line that fails is reported on stderr and written with an ``error``; the others are not affected.

    Args:
        lines: the whole input.
        output: flushed after every batch.
        start_engines: called once, and only if a request remains; what it returns answers batches in their order, each
            of up to ``batch_size`` requests.
        batch_size: lines that are generated at once and then written.

    Raises:
        OutputMismatch: ``output`` is not the beginning of this input's output; it is left as it is.
        OSError: ``output`` cannot be read or written.
    """
    done, failed, end = _read_progress(output, lines)
    pending = lines[done:]
    if not pending and output.exists():
        return Summary(len(lines), done, failed)
    with open(output, "ab") as file:
        file.truncate(end)
        batches = [pending[start : start + batch_size] for start in range(0, len(pending), batch_size)]
        requests = [[line for line in batch if isinstance(line, Request)] for batch in batches]
        good = [batch for batch in requests if batch]
        answers = iter(start_engines()(good) if good else [])
        with tqdm(total=len(lines), initial=done, desc="Generating", unit="line") as bar:
            for batch, wanted in zip(batches, requests, strict=True):
                records = _records(batch, wanted, next(answers) if wanted else [])
                file.write(b"".join(_encode(record) for record in records))
                file.flush()
                for record in records:
                    if "error" in record:
                        failed += 1
                        bar.write(f"input line {record['line']}: {record['error']}", file=sys.stderr)
                bar.update(len(records))
    return Summary(len(lines), done, failed)


def _records(
    batch: Sequence[Request | BadLine], requests: Sequence[Request], answers: Sequence[Answer]
) -> list[dict[str, Any]]:
    """Makes the record of each line of a batch, whose ``requests`` were given these ``answers``."""
    by_line = {request.line: dataclasses.asdict(answer) for request, answer in zip(requests, answers, strict=True)}
    outcomes = ({"error": line.error} if isinstance(line, BadLine) else by_line[line.line] for line in batch)
    return [{"line": line.line, "id": line.id, **outcome} for line, outcome in zip(batch, outcomes, strict=True)]


def _read_progress(output: pathlib.Path, lines: Sequence[Request | BadLine]) -> _Progress:
    """Finds out how far an earlier run came. A last line that is cut off, since the run was killed, does not count."""
    if not output.exists():
        return _Progress(done=0, failed=0, end=0)
    if not output.is_file():
        raise OutputMismatch(f"{output} is not a regular file")
    complete, newline, cut_off = output.read_bytes().rpartition(b"\n")
    written = complete.split(b"\n") if newline else []
    if len(written) + bool(cut_off) > len(lines):
        raise _mismatch(output, f"it has {len(written) + bool(cut_off)} lines, the input has {len(lines)}")
    records = [_decode(text) for text in written]
    for number, (record, line) in enumerate(zip(records, lines, strict=False), start=1):
        if record.get("line") != line.line or record.get("id") != line.id:
            raise _mismatch(output, f"its line {number} is not the result of input line {line.line}")
    if cut_off:
        beginning = b'{"line": %d,' % lines[len(written)].line
        if not cut_off.startswith(beginning) and not beginning.startswith(cut_off):
            raise _mismatch(output, f"its line {len(written) + 1} is not the beginning of a result")
    return _Progress(len(records), sum("error" in record for record in records), len(complete) + len(newline))


def _mismatch(output: pathlib.Path, reason: str) -> OutputMismatch:
    return OutputMismatch(
        f"{output} cannot be continued, {reason}: choose another --output, or delete it to start over"
    )


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _decode(text: bytes) -> dict[str, Any]:
    """Returns the record of an output line, or {} if the line is no record."""
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8"))
        # Refuses NaN, infinity and lone surrogates.
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON at column {error.colno}: {error.msg.removesuffix(' starting at')}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError('not a JSON object such as {"prompt": "..."}')
    return values


def _prompt_or_messages(values: dict[str, Any]) -> dict[str, Any]:
    if "prompt" in values and "messages" in values:
        raise ValueError("both prompt and messages: give one of them")
    if "prompt" in values:
        if not isinstance(values["prompt"], str):
            raise ValueError("prompt must be a string")
        return {"prompt": values["prompt"]}
    if "messages" not in values:
        raise ValueError("neither prompt nor messages: give one of them")
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError('every message must be an object with "role" and "content", and nothing else')
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise ValueError("role and content of a message must be strings")
    return {"messages": messages}


def _number(values: dict[str, Any], name: str, kind: Any) -> Any:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} must be {'an integer' if kind is int else 'a number'}, not {value!r}")
    if abs(value) > _MAX_NUMBER:
        raise ValueError(f"{name} is {value}: at most {_MAX_NUMBER}")
    return value
