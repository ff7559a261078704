"""Reads methods as the command line names them: ``qfilters:filter=static,granularity=head``."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from vllm_qfilters.config import KVCompressionConfig
from vllm_qfilters.methods.catalog import METHODS
from vllm_qfilters.policy import resolve

FULL = "full"  # stands in the place of a method for the uncompressed cache


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of KV compression with its options.

    Attributes:
        label: the text that named it.
        name: one of ``vllm_qfilters.methods.catalog.METHODS``.
        options: fields of ``KVCompressionConfig`` that are not at their defaults.
    """

    label: str
    name: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Method":
        """Reads ``name`` or ``name:option=value,option=value``; values are JSON, or else strings.

        Raises:
            ValueError: an unknown name or option, a value out of its range, or a budget, which is no part of a method
                here.
        """
        name, _, listed = text.partition(":")
        if name not in METHODS:
            raise ValueError(f"{name!r} is no method: choose among {', '.join(METHODS)}")
        options = {}
        for pair in filter(None, listed.split(",")):
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"{text!r}: {pair!r} is not option=value")
            options[key] = _json_or_string(value)
        if "budget" in options or "method" in options:
            raise ValueError(f"{text!r}: budgets are given by --budgets and --fractions, the method before the colon")
        resolve(KVCompressionConfig.from_dict({"method": name, **options, "budget": 1.0}))
        return cls(text, name, options)


def _json_or_string(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
