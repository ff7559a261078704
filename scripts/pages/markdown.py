"""Markdown tables, numbers as they are printed, and the generated parts of pages that are otherwise written by hand."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

NOT_MEASURED = "not measured"
_MAKER = "scripts/make_docs.py"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is aligned to the left and whose others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("|" + "|".join(_cell(text) for text in line) + "|" for line in (header, rule, *rows))


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are all aligned to the left, for text."""
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join("|" + "|".join(_cell(text) for text in line) + "|" for line in lines)


def number(value: Any) -> str:
    """Three significant digits and no fewer than the integer part has; thousands are set apart."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:#.3g}"
    return "0" if not value else text.rstrip(".")


def without_folders(text: str) -> str:
    """Absolute paths shortened to the last name in them: the rest belongs to the machine that measured."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+([\w.+-]+)", r"\1", text)


def fill_in(page: str, parts: Mapping[str, str]) -> str:
    """The page with the text between ``<!-- NAME: ... -->`` and ``<!-- /NAME -->`` replaced, for every name in it.

    Raises:
        ValueError: the page marks a part that nobody makes.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in parts:
            raise ValueError(f"a page marks the part {name!r}; the parts are {', '.join(parts)}")
        return f"<!-- {name}: {_MAKER} -->\n{parts[name]}\n<!-- /{name} -->"

    return _PART.sub(replaced, page)


def without_parts(page: str) -> str:
    """What is left of a page for people to write."""
    return _PART.sub("", page)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_PART = re.compile(rf"<!-- (?P<name>[\w-]+): {_MAKER} -->\n(?P<text>.*?)<!-- /(?P=name) -->", re.DOTALL)
