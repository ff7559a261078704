"""Renders an inspection as one HTML page that needs no other file. Knows neither vLLM nor PyTorch."""

import base64
import dataclasses
import html
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Holds what the cache kept of a sequence.

    Attributes:
        texts: the text of each token that was computed; empty where a token is a part of a character.
        prompt_tokens: how many of them, from the first on, are the prompt.
        layers: the layers that are compressed, by their indices.
        kept: which tokens are resident; shape ``[num_layers, num_kv_heads, num_tokens]``, bool.
        sinks: the number of first tokens that cannot be evicted.
        window: positions of the tokens that could not be evicted when tokens were evicted last.
        budget: tokens; None if compression is off.
        model: the name of the model.
        configuration: name and value of what was configured.
    """

    texts: Sequence[str]
    prompt_tokens: int
    layers: Sequence[int]
    kept: np.ndarray
    sinks: int
    window: range
    budget: int | None
    model: str
    configuration: Mapping[str, Any]

    @property
    def resident_tokens(self) -> int:
        """Counts the resident tokens, which are as many in every layer and head."""
        return int(self.kept[0, 0].sum())

    @property
    def evicted_tokens(self) -> int:
        return int(self.kept.shape[2]) - self.resident_tokens


def render(inspection: Inspection) -> str:
    """Returns the page. Without scripts it still shows the share of all layers and heads that kept each token."""
    _, num_heads, num_tokens = inspection.kept.shape
    heads_differ = bool((inspection.kept != inspection.kept[:, :1]).any())
    is_generated = inspection.prompt_tokens < num_tokens
    data = {
        "layers": list(inspection.layers),
        "heads": num_heads,
        "tokens": num_tokens,
        "texts": list(inspection.texts),
        # For each layer there are its heads, one behind the other, with a bit per token, the highest of a byte first.
        "kept": [base64.b64encode(np.packbits(layer, axis=-1).tobytes()).decode() for layer in inspection.kept],
    }
    parts = {
        "TITLE": f"What {html.escape(inspection.model)} keeps in its KV cache",
        "SUMMARY": _summary(inspection),
        "CONFIGURATION": "\n".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in inspection.configuration.items()
        ),
        "LAYERS": _options(inspection.layers),
        "HEADS": _options(range(num_heads)),
        "HEADS_HIDDEN": "" if heads_differ else " hidden",
        "GENERATED_LEGEND": ' &ensp; <span class="t o" style="--k:0">generated</span>' if is_generated else "",
        "TOKENS": "".join(
            _token(inspection, index, count) for index, count in enumerate(inspection.kept.sum((0, 1)).tolist())
        ),
        "DATA": json.dumps(data).replace("<", "\\u003c"),
    }
    page = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    pieces = page.split("@@")  # text and names of parts in turn
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _summary(inspection: Inspection) -> str:
    num_layers, num_heads, num_tokens = inspection.kept.shape
    generated = num_tokens - inspection.prompt_tokens
    lines = [
        f"<p><strong>{inspection.prompt_tokens}</strong> tokens of prompt"
        + (f" and <strong>{generated}</strong> generated ones" if generated else "")
        + f": each of {num_layers} layers x {num_heads} KV heads holds "
        f"<strong>{inspection.resident_tokens}</strong> of them ({inspection.resident_tokens / num_tokens:.0%}), "
        f"<strong>{inspection.evicted_tokens}</strong> are evicted.</p>"
    ]
    if not inspection.evicted_tokens:
        why = "compression is off" if inspection.budget is None else f"the budget is {inspection.budget} tokens"
        lines.append(f'<p class="note">Nothing was evicted: {why}.</p>')
    else:
        counts = inspection.kept.sum((0, 1))
        all_pairs = num_layers * num_heads
        by_all, by_none = int((counts == all_pairs).sum()), int((counts == 0).sum())
        lines.append(
            f"<p>{by_all} tokens are kept everywhere, {by_none} nowhere, {num_tokens - by_all - by_none} by some; "
            "the stronger the shade, the more layers and heads kept a token.</p>"
        )
    return "\n".join(lines)


def _options(names: Sequence[int]) -> str:
    return "".join(f'<option value="{index}">{name}</option>' for index, name in enumerate(names))


def _token(inspection: Inspection, index: int, count: int) -> str:
    classes = ["t"]
    if count == 0:
        classes.append("gone")
    if index < inspection.sinks:
        classes.append("s")
    elif index in inspection.window:
        classes.append("w")
    if index >= inspection.prompt_tokens:
        classes.append("o")
    share = count / (inspection.kept.shape[0] * inspection.kept.shape[1])
    return (
        f'<span class="{" ".join(classes)}" style="--k:{share:.3f}" data-kept="{count}">'
        f"{html.escape(_visible(inspection.texts[index]))}</span>"
    )


def _visible(text: str) -> str:
    """Replaces line ends and control characters by signs, so that every token has something to shade."""
    controls = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    return text.translate(controls).replace("\n", "\u21b5\n") or "\u00b7"
