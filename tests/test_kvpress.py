"""The same keys, scored and cut by kvpress (Apache-2.0, of PyPI) and by us, by head, as it does: the same tokens
stay.
"""

import importlib.machinery
import json
import pathlib
import sys
import types

import pytest
import torch

from tests.models import HEAD_SIZE, NUM_KV_HEADS, NUM_LAYERS, tiny_identity
from tests.paged import one_sequence
from tests.test_filters import random_filters
from tests.test_layout import Geometry, make_cache
from vllm_qfilters.filters import format
from vllm_qfilters.kernels import CPU_OPS
from vllm_qfilters.methods.base import Model, make
from vllm_qfilters.methods.catalog import entry

NUM_TOKENS, RATIO = 90, 0.6
KEPT = int(NUM_TOKENS * (1 - RATIO))


PRESSES = {
    "qfilters": ("qfilter_press", "QFilterPress"),
    "knorm": ("knorm_press", "KnormPress"),
    "keydiff": ("keydiff_press", "KeyDiffPress"),
    "streaming": ("streaming_llm_press", "StreamingLLMPress"),
}


@pytest.fixture
def presses(monkeypatch):
    """Modules of kvpress by name. The package itself imports what any of its presses needs: it is passed by."""
    (root,) = importlib.machinery.PathFinder.find_spec("kvpress").submodule_search_locations
    for package, path in (("kvpress", root), ("kvpress.presses", f"{root}/presses")):
        passed_by = types.ModuleType(package)
        passed_by.__path__ = [path]
        monkeypatch.setitem(sys.modules, package, passed_by)
    yield lambda name: importlib.import_module(f"kvpress.presses.{name}")
    for name in [name for name in sys.modules if name.startswith("kvpress.")]:
        del sys.modules[name]


def press_of(method: str, presses, folder: pathlib.Path):
    module, name = PRESSES[method]
    press = getattr(presses(module), name)(RATIO)
    if method == "qfilters":  # from a folder as published, with our file in it
        format.save(folder / "model.safetensors", random_filters(), tiny_identity())
        sizes = {"num_layers": NUM_LAYERS, "num_kv_heads": NUM_KV_HEADS, "kv_head_dim": HEAD_SIZE}
        (folder / "config.json").write_text(json.dumps(sizes))
        press.q_filters = presses(module).QFilters.from_pretrained(folder).q_filters.detach()
    return press


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", PRESSES)
def test_the_same_tokens_stay(method, seed, presses, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_LAYERS, NUM_KV_HEADS, NUM_TOKENS, HEAD_SIZE)
    keys = torch.randn(shape, generator=generator) + torch.randn(
        NUM_LAYERS, NUM_KV_HEADS, 1, HEAD_SIZE, generator=generator
    )

    _, cache = make_cache(Geometry(NUM_LAYERS, 8, NUM_KV_HEADS, 16, HEAD_SIZE))
    model = Model(cache, CPU_OPS, static_filters=lambda: random_filters().filters)
    ours = make(entry(method, "static"), model)
    pages = torch.tensor([6, 2, 7, 0, 3, 5])
    slots = (16 * pages[:, None] + torch.arange(16)).flatten()[:NUM_TOKENS]
    layer, head, token = torch.meshgrid(*map(torch.arange, shape[:3]), indexing="ij")
    places = (layer.flatten(), slots[token.flatten()] // 16, head.flatten(), slots[token.flatten()] % 16)
    cache.write(*places, keys.flatten(0, 2), keys.flatten(0, 2))
    for number in range(NUM_LAYERS):
        key = keys[number].transpose(0, 1)
        filters = None if ours.filters is None else ours.filters[number]
        CPU_OPS.write(ours.stat, key, key, None, cache.planes[number], slots, filters)
    scores = ours.scores(one_sequence(pages.tolist(), NUM_TOKENS), [None]).view(shape[:3])
    sinks, window = (4, KEPT - 4) if method == "streaming" else (0, 0)
    kept_by_us = CPU_OPS.functions.select_kept(scores, KEPT, sinks, window, shared_by_heads=False)

    press = press_of(method, presses, tmp_path)
    numbers = torch.arange(NUM_TOKENS).view(1, 1, -1, 1).expand(1, *shape[1:])
    for number in range(NUM_LAYERS):
        module = types.SimpleNamespace(layer_idx=number, head_dim=HEAD_SIZE)
        _, kept = press.compress(module, None, keys[None, number], numbers, None, {})
        theirs = torch.zeros(shape[1:3], dtype=torch.bool).scatter_(1, kept[0, ..., 0], True)
        assert torch.equal(kept_by_us[number], theirs)
        assert int(theirs.sum()) == NUM_KV_HEADS * KEPT
