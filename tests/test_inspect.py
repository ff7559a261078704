"""The inspection page shows what the cache holds, down to the shade of every token."""

import base64
import html.parser
import json
import random
import re

import numpy as np
import pytest
import torch

from tests.models import NUM_KV_HEADS, NUM_LAYERS, random_prompt
from tests.oracle import teacher_forced_logprobs
from tests.paged import Geometry, make_cache
from tests.test_oracle import CASES, options_and_rule
from vllm_qfilters.commands.inspection.command import assemble, inspect, token_texts
from vllm_qfilters.commands.inspection.page import Inspection, render
from vllm_qfilters.kernels.layout import read_plane
from vllm_qfilters.kernels.reference import compact
from vllm_qfilters.plan import RequestCompaction
from vllm_qfilters.worker.kept_tokens import KeptTokens

BS = 16


def unpack(mask: tuple[int, bytes], *shape: int) -> np.ndarray:
    num_positions, packed = mask
    size = int(np.prod(shape)) * num_positions
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=size).reshape(*shape, num_positions).astype(bool)


@pytest.mark.parametrize("seed", range(4))
def test_positions_are_followed_through_the_cache(seed):
    """Rounds of evictions of random tokens, each token's position beside its key."""
    numbers, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    geometry = Geometry(num_layers=2, num_kv_heads=3, block_size=BS, num_blocks=40, num_planes=1)
    _, _, cache = make_cache(geometry, seed, torch.device("cpu"))
    recorded = KeptTokens(2, 3, BS)
    free, pages, resident, position = numbers.sample(range(40), 40), [], 0, 0
    for _ in range(4):
        for _ in range(numbers.randint(60, 100)):
            if resident % BS == 0:
                pages.append(free.pop())
            cache.planes[:, pages[resident // BS], 0, :, resident % BS] = position
            resident, position = resident + 1, position + 1
        sinks, evicted = numbers.randint(0, 20), BS * numbers.randint(1, 2)
        window = numbers.randint(0, resident - evicted - sinks)
        is_kept = torch.ones(2, 3, resident, dtype=torch.bool)
        for row in is_kept.view(-1, resident):
            out = torch.randperm(resident - sinks - window, generator=generator)[:evicted] + sinks
            row[out] = False
        first_out = (resident - evicted - window) // BS
        new_pages = pages[:first_out] + pages[first_out + evicted // BS :]
        compact(cache, torch.tensor(pages), torch.tensor(new_pages), is_kept, window)
        recorded.follow(RequestCompaction("r", position, resident, evicted, sinks, window, tuple(new_pages)), is_kept)
        pages, resident = new_pages, resident - evicted
        found = unpack(recorded.masks()["r"], 2, 3)
        held = read_plane(cache.scores, torch.tensor(pages), resident).long()
        assert np.array_equal(found, torch.zeros(2, 3, position, dtype=torch.bool).scatter_(-1, held, True).numpy())
    recorded.restart(["r"])
    assert recorded.masks() == {}


class Page(html.parser.HTMLParser):
    """Tokens of a page as (classes, share, count, text), and its data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens, self.data, self._inside = [], None, None
        self.external = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.external += [value for name, value in attrs.items() if name in ("src", "href")]
        self._inside = attrs.get("id") if tag == "script" else self._inside
        if "data-kept" in attrs:
            share = float(re.fullmatch(r"--k:([\d.]+)", attrs["style"])[1])
            self.tokens.append([attrs["class"].split(), share, int(attrs["data-kept"]), ""])
            self._inside = "token"

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "token":
            self.tokens[-1][3] += data
        elif self._inside == "data":
            self.data = json.loads(data)


@pytest.mark.parametrize("case", ["chunked-layer", "cut-often", "chunked-head", "page-chunked", "expected-observed"])
def test_the_page_shows_what_a_reference_keeps(case, engines, hf_model, tiny_filters):
    options, rule = options_and_rule(case)
    engine, prompt = engines.get(**options), random_prompt(CASES[case][1], seed=1)
    (output,) = engine.generate([prompt], max_tokens=40)
    inspection = inspect(engine.llm, prompt, max_tokens=40)  # finds the prompt in the prefix cache
    num_tokens, positions = len(prompt) + 39, []
    teacher_forced_logprobs(hf_model, prompt, list(output.outputs[0].token_ids), tiny_filters[1], rule, positions)
    expected = np.zeros((NUM_LAYERS, NUM_KV_HEADS, num_tokens), dtype=bool)
    for layer, rows in enumerate(positions):
        np.put_along_axis(expected[layer], rows.numpy(), True, axis=1)
    assert np.array_equal(inspection.kept, expected) and inspection.evicted_tokens >= 640

    page = Page(render(inspection))
    assert [count for _, _, count, _ in page.tokens] == expected.sum((0, 1)).tolist()
    np.testing.assert_allclose([share for _, share, _, _ in page.tokens], expected.mean((0, 1)), atol=6e-4)
    for layer, packed in enumerate(page.data["kept"]):
        bits = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(NUM_KV_HEADS, -1)
        assert np.array_equal(np.unpackbits(bits, axis=1, count=num_tokens).astype(bool), expected[layer])
    marked = {mark: [i for i, token in enumerate(page.tokens) if mark in token[0]] for mark in ("s", "w", "o", "gone")}
    assert marked["s"] == list(range(BS * 2 if rule.whole_pages else rule.sinks))
    assert len(marked["w"]) == rule.window and expected[..., marked["s"] + marked["w"]].all()
    assert marked["o"] == list(range(len(prompt), num_tokens))
    assert marked["gone"] == np.flatnonzero(~expected.any((0, 1))).tolist()
    assert engine.runner.kept_tokens is None, "nothing is recorded any more"
    engine.assert_idle()


def test_the_page_needs_nothing_beside_it_and_escapes_what_it_shows():
    kept = np.ones((2, 2, 4), dtype=bool)
    kept[1, :, 2] = False
    texts = ["</script>", "a&b\n", "", "\x1b"]
    page = render(Inspection(texts, 4, [0, 5], kept, 1, range(3, 4), 128, "<b>", {"budget": 128, "filters": "<i>"}))
    parsed = Page(page)
    assert [text for *_, text in parsed.tokens] == ["</script>", "a&b\u21b5\n", "\u00b7", "\u241b"]
    assert '<option value="1">5</option>' in page and parsed.data["layers"] == [0, 5]
    assert parsed.data["texts"] == texts and parsed.external == []
    assert "<b>" not in page and "<i>" not in page and "@@" not in page and "url(" not in page and "//" not in page
    assert "<label hidden>KV head" in page, "the heads agree"


def test_a_page_of_a_prompt_kept_whole_says_why():
    inspection = Inspection(["a"] * 9, 9, [0], np.ones((1, 1, 9), dtype=bool), 4, range(0), 2048, "m", {})
    assert "Nothing was evicted: the budget is 2048 tokens." in render(inspection)


def test_ranks_are_put_together_by_layers_and_heads():
    whole = np.random.default_rng(0).random((4, 2, 11)) < 0.5
    ranks = [
        {
            "layers": layers,
            "first_kv_head": head,
            "num_kv_heads": 1,
            "requests": {"r": (11, np.packbits(whole[layers, head]).tobytes())},
        }
        for layers in ([0, 1], [2, 3])
        for head in (0, 1)
    ]
    for rank in ranks:
        rank["layers"] = [5 + 6 * layer for layer in rank["layers"]]  # those between have a sliding window
    layers, kept, end = assemble(ranks, 13)
    assert layers == [5, 11, 17, 23]
    assert end == 11 and np.array_equal(kept[..., :11], whole) and kept[..., 11:].all()
    _, kept, end = assemble([{**rank, "requests": {}} for rank in ranks], 13)
    assert end == 0 and kept.all()


class Bytes:
    """A tokenizer whose tokens are bytes, and which drops the space a text begins with."""

    def decode(self, token_ids):
        return bytes(token_ids).decode("utf-8", "replace").removeprefix(" ")


def test_texts_of_tokens_are_those_of_the_text():
    text = "x \u00e9t\u00e9 \U0001f600 y"
    texts = token_texts(Bytes(), list(text.encode()))
    assert "".join(texts) == text and texts[:4] == ["x", " ", "", "\u00e9"] and texts.count("") == 5
    assert token_texts(Bytes(), [255, 255, 255, 255, 120])[-1] == "x", "no text at all goes on after four bytes"
