"""The page docs/options.md: the options and methods, from the configuration and the catalogue of methods."""

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scripts.pages.markdown import plain_table
from vllm_qfilters.config import REQUEST_BUDGET_KEY, REQUEST_EVICT_KEY, KVCompressionConfig
from vllm_qfilters.methods.catalog import METHODS, OPTIONS_OF_SOME, QFILTERS, Entry
from vllm_qfilters.policy import resolve

# Settings other than the default that do without some options.
_SETTINGS: dict[str, dict[str, Any]] = {
    "`scope` `all`": {"scope": "decode"},
    "`prefill` `chunked`": {"prefill": "full"},
    "`granularity` `layer` or `head`": {"granularity": "page"},
}

HEAD = f"""# Options

A server takes them behind `--kv-compression METHOD`, as one JSON object
(`--kv-compression-config '{{"budget": 1024}}'`) or one by one (`--kv-compression-config.budget 1024`). In Python they
are arguments of `kv_compression(METHOD, ...)`. A request sets its own budget as `{REQUEST_BUDGET_KEY}` in `vllm_xargs`
(over HTTP) or in `SamplingParams.extra_args`, up to `max_budget`, and asks for `evict` `always` as
`{REQUEST_EVICT_KEY}`. An option that nothing would read is refused. The [glossary](glossary.md) explains the words.

`scripts/make_docs.py` made this page from `vllm_qfilters/config.py`, `vllm_qfilters/policy.py` and
`vllm_qfilters/methods/catalog.py`.
"""


def page() -> str:
    """The whole page."""
    return "\n\n".join([HEAD.rstrip(), "## The options", _options(), "## The methods", _methods()]) + "\n"


def described() -> dict[str, str]:
    """What the docstring of the configuration says of each option."""
    text = inspect.getdoc(KVCompressionConfig) or ""
    section = text.partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.replace("``", "`").split()) for name, text in found}


def default(option: str) -> str:
    """What an option becomes if nobody gives it, as JSON has it."""
    if option == "max_budget":
        return "`budget`"
    value = getattr(resolve(KVCompressionConfig()), option)
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _options() -> str:
    texts = described()
    rows = [
        [f"`{field.name}`", default(field.name), _type(field.type), _sentence(texts[field.name]), _read_by(field.name)]
        for field in dataclasses.fields(KVCompressionConfig)
        if field.name != "method"
    ]
    return plain_table(["option", "default", "type", "meaning", "read by"], rows)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _type(kind: Any) -> str:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return " or ".join(names[kind] for kind in kinds if kind is not types.NoneType)


def _read_by(option: str) -> str:
    """Which methods and settings read an option, the latter as the policy says."""
    if option in OPTIONS_OF_SOME:
        filters = [name for name, entry in QFILTERS.items() if option in entry.options]
        of_filter = "" if len(filters) in (0, len(QFILTERS)) else f" with `filter` {_any_of(filters)}"
        others = [name for name, entry in METHODS.items() if option in entry.options and name != "qfilters"]
        readers = ", ".join([f"`qfilters`{of_filter}"] * bool(filters) + [f"`{name}`" for name in others])
    else:
        readers = "all methods"
    needed = [text for text, settings in _SETTINGS.items() if not _is_read(option, settings)]
    return f"{readers}, with {_all_of(needed)}" if needed else readers


def _is_read(option: str, settings: Mapping[str, Any]) -> bool:
    return option in resolve(KVCompressionConfig(**settings)).to_dict()


def _all_of(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _any_of(names: Iterable[str]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _methods() -> str:
    named = {f"`qfilters`, `filter` `{name}`": entry for name, entry in QFILTERS.items()}
    named |= {f"`{name}`": entry for name, entry in METHODS.items() if name != "qfilters"}
    rows = [
        [
            name,
            _sentence(entry.summary),
            ", ".join(f"`{option}`" for option in sorted(entry.options)) or "none",
            "yes" if entry.scores_are_final else "no",
            _sentence(_needs(entry)),
        ]
        for name, entry in named.items()
    ]
    header = ["method", "which tokens stay", "options of its own", "works with `granularity` `page`", "needs"]
    return plain_table(header, rows)


def _needs(entry: Entry) -> str:
    needs = []
    if entry.needs_query_statistics:
        needs.append("filters from a calibration")
    elif entry.needs_filters:
        needs.append("filters, published or from a calibration")
    observed = entry.observed_queries(resolve(KVCompressionConfig()).observed)
    if observed:
        queries = "the last query" if observed == 1 else f"the last {observed} queries"
        whose = "of the prompt and of what is generated" if entry.follows_decoding else "of the prompt"
        needs.append(f"memory for {queries} {whose} of every sequence")
    return "; ".join(needs) or "nothing"
