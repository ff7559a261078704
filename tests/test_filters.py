"""Filters: their file, where they are looked for, and how they are made from statistics."""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import pathlib
import pickle
import queue
import random
import shutil
import stat
import threading
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LongcatFlashConfig, MiMoV2FlashConfig, MiniCPM3Config

from tests.models import (
    HEAD_SIZE,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    layer_names,
    make_tiny_adapter,
    make_tiny_llama,
    save_version_2,
    tiny_identity,
)
from tests.run_engine import run_engine
from tests.test_refusals import nemotron_nas
from vllm_qfilters.filters import calibrate, format, load, reader
from vllm_qfilters.filters import fingerprint as fingerprint_module
from vllm_qfilters.filters.calibrate import make_filters, random_sequences
from vllm_qfilters.filters.fingerprint import fingerprint
from vllm_qfilters.filters.format import HORIZON, STORED_RANK, Filters, ModelIdentity, Part
from vllm_qfilters.filters.load import FiltersFile, cache_path, cached_file, given_file, keep, part_of
from vllm_qfilters.filters.rotary import Rotation
from vllm_qfilters.filters.statistics import LayerStatistics, Moments
from vllm_qfilters.methods.catalog import entry
from vllm_qfilters.worker import runner as runner_module
from vllm_qfilters.worker.worker import CompressedWorker

SHAPE = (NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE)
QUERY_SHAPE = (NUM_LAYERS, NUM_HEADS, HEAD_SIZE)
RANK = 12
TENSORS = {
    "filters": SHAPE,
    "query_mean_before_rope": QUERY_SHAPE,
    "query_factors": (*QUERY_SHAPE[:2], RANK, HEAD_SIZE),
    "score_mean": SHAPE[:2],
    "score_std": SHAPE[:2],
}
BEFORE_VERSION_3 = {  # beside the filters
    "query_mean_before_rope": QUERY_SHAPE,
    "query_second_before_rope": (*QUERY_SHAPE, HEAD_SIZE),
    "query_mean_after_rope": QUERY_SHAPE,
    "query_second_after_rope": (*QUERY_SHAPE, HEAD_SIZE),
    "score_mean": SHAPE[:2],
    "score_std": SHAPE[:2],
}


def random_filters(seed: int = 0) -> Filters:
    """Filters with all statistics."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in TENSORS.items()}
    tensors["score_std"].abs_()
    return Filters(layers=layer_names(), **tensors, calibration="4 sequences of noise")


def random_statistics(seed: int = 0) -> dict[str, torch.Tensor]:
    """Of a file of version 2."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in BEFORE_VERSION_3.items()}


def assert_same(found: Filters, expected: Filters) -> None:
    assert found.calibration == expected.calibration and found.layers == expected.layers
    for name in (*TENSORS, "query_second_before_rope"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or (ours.dtype == torch.float32 and torch.equal(ours, theirs)), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "filters.safetensors"


@pytest.mark.parametrize("has_statistics", [True, False], ids=["statistics", "filters-alone"])
def test_what_is_saved_is_loaded(path, has_statistics):
    filters = random_filters() if has_statistics else Filters(random_filters().filters, layer_names())
    format.save(path, filters, tiny_identity())
    assert_same(reader.load(path, tiny_identity()), filters)


def test_the_file_has_the_published_name_and_sign(path):
    filters = random_filters()
    format.save(path, filters, tiny_identity())
    assert torch.equal(load_file(path)["q_filters"], -filters.filters)


def test_a_view_is_saved_whole(path):
    filters = random_filters().filters.transpose(0, 1).contiguous().transpose(0, 1)
    format.save(path, Filters(filters, layer_names()), tiny_identity())
    assert torch.equal(reader.load(path, tiny_identity()).filters, filters)


def test_folders_are_made_and_others_may_read_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "filters.safetensors"
    format.save(path, random_filters(), tiny_identity())
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    format.save(path, random_filters(seed=1), tiny_identity())

    def fail(tensors, filename, metadata):
        pathlib.Path(filename).write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(format, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        format.save(path, random_filters(seed=2), tiny_identity())
    assert os.listdir(path.parent) == [path.name]
    assert_same(reader.load(path, tiny_identity()), random_filters(seed=1))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_a_published_file_is_loaded_negated_as_float32(path, dtype):
    """It has filters alone, in any floating-point type, and names no model."""
    published = random_filters().filters.to(dtype)
    save_file({"q_filters": published}, path)
    assert_same(reader.load(path, tiny_identity()), Filters(-published.to(torch.float32)))


def test_a_model_that_was_moved_keeps_its_filters(path):
    format.save(path, random_filters(), tiny_identity("here/tiny"))
    assert_same(reader.load(path, tiny_identity("there/tiny")), random_filters())


OTHER_MODEL = {
    "num_layers": NUM_LAYERS + 1,
    "num_heads": 2 * NUM_HEADS,
    "num_kv_heads": 2 * NUM_KV_HEADS,
    "head_size": 2 * HEAD_SIZE,
    "architecture": "Qwen3ForCausalLM",
    "rope": {"rope_theta": 500000.0, "rope_type": "default"},
}


@pytest.mark.parametrize("field", OTHER_MODEL)
def test_filters_made_for_another_model_are_refused_naming_both(path, field):
    made_for, value = tiny_identity("maker/tiny"), OTHER_MODEL[field]
    format.save(path, random_filters(), made_for)
    with pytest.raises(ValueError) as refusal:
        reader.load(path, dataclasses.replace(made_for, name="user/other", **{field: value}))
    for part in (str(path), f"maker/tiny ({field} {getattr(made_for, field)})", f"user/other has {field} {value}"):
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((NUM_LAYERS - 1, NUM_KV_HEADS, HEAD_SIZE), id="layers"),
        pytest.param((NUM_LAYERS, NUM_HEADS, HEAD_SIZE), id="heads"),
        pytest.param((NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE // 2), id="head-size"),
        pytest.param((NUM_LAYERS, NUM_KV_HEADS * HEAD_SIZE), id="flat"),
    ],
)
def test_a_published_file_of_another_shape_is_refused_naming_both(path, shape):
    save_file({"q_filters": torch.zeros(shape)}, path)
    with pytest.raises(ValueError) as refusal:
        reader.load(path, tiny_identity("user/tiny"))
    for part in (str(path), f"q_filters has shape {shape}", f"user/tiny needs {SHAPE}"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("name", [name for name in BEFORE_VERSION_3 if "after" not in name])
def test_statistics_of_another_shape_are_refused_naming_both(path, name):
    save_file({"q_filters": torch.zeros(SHAPE), name: torch.zeros(2, 3)}, path)
    with pytest.raises(ValueError) as refusal:
        reader.load(path, tiny_identity())
    assert f"{name} has shape (2, 3)" in str(refusal.value) and f"needs {BEFORE_VERSION_3[name]}" in str(refusal.value)


@pytest.mark.parametrize("name", format.BY_LAYER)
def test_a_layer_of_another_shape_or_type_or_with_bad_numbers_is_refused_naming_it(path, name):
    """Whatever part of the file is asked for, unless it is another layer."""
    format.save(path, random_filters(), tiny_identity())
    tensors, key = load_file(path), f"{layer_names()[1]}.{name}"
    needed = tuple(TENSORS[name][1:])
    for damaged, message in (
        (torch.zeros(2, 3), f"{key} has shape (2, 3), but tiny needs ({', '.join(map(str, needed[:1]))}"),
        (torch.zeros(needed[0] + 1, *needed[1:]), f"{key} has shape ({needed[0] + 1}"),
        (torch.zeros(needed, dtype=torch.int32), f"{key} must hold floating-point numbers"),
        (torch.full(needed, torch.nan), f"{key} must hold finite numbers"),
    ):
        save_file({**tensors, key: damaged}, path, header_of(path))
        for part in (Part(), Part(layers=layer_names()[1:2]), Part(rank=1)):
            with pytest.raises(ValueError) as refusal:
                reader.load(path, tiny_identity(), part)
            assert message in str(refusal.value)
        reader.load(path, tiny_identity(), Part(layers=layer_names()[2:]))
    del tensors[key]
    save_file(tensors, path, header_of(path))
    with pytest.raises(ValueError, match=f"lacks {key}, which others have"):
        reader.load(path, tiny_identity())


@pytest.mark.parametrize("length", [0, 4, 8, 40, -1000, -1], ids=lambda length: f"bytes{length}")
def test_a_truncated_file_is_refused(path, length):
    format.save(path, random_filters(), tiny_identity())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        reader.load(path, tiny_identity())


def test_garbage_is_refused(path):
    path.write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        reader.load(path, tiny_identity())


def test_a_pickle_is_refused_unread(path, tmp_path):
    torch.save({"q_filters": torch.zeros(SHAPE), "touch": _Touch(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        reader.load(path, tiny_identity())
    assert not (tmp_path / "ran").exists()


def test_a_file_too_large_for_the_model_is_refused_unread(path, monkeypatch):
    most = reader.max_file_bytes(tiny_identity())
    numbers = math.prod(SHAPE) + sum(math.prod(shape) for shape in BEFORE_VERSION_3.values())
    assert most == 8 * numbers + reader.MAX_HEADER_BYTES
    path.touch()
    os.truncate(path, most + 1)
    monkeypatch.setattr(reader.safetensors, "safe_open", None)
    with pytest.raises(ValueError, match=rf"{most + 1} bytes, a filters file of tiny at most {most}"):
        reader.load(path, tiny_identity())


def test_what_is_no_regular_file_is_refused_and_not_waited_for(path):
    os.mkfifo(path)
    for other in (path, path.parent, "/dev/zero"):
        with pytest.raises(ValueError, match="is not a regular file"):
            reader.load(other, tiny_identity())


def test_a_header_of_absurd_length_is_refused_unparsed(path, monkeypatch):
    monkeypatch.setattr(reader.safetensors, "safe_open", None)
    for length in (reader.MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match=f"its header would have {length} bytes"):
            reader.load(path, tiny_identity())


GOOD = {"dtype": "F32", "shape": list(SHAPE), "data_offsets": [0, 4 * math.prod(SHAPE)]}


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xff\xfe{}", id="not-utf8"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"a":' * 100_000, id="nested-without-end"),
        pytest.param({"q_filters": {**GOOD, "data_offsets": [0, 2**40]}}, id="beyond-the-file"),
        pytest.param({"q_filters": {**GOOD, "data_offsets": [-4, 764]}}, id="before-the-data"),
        pytest.param({"q_filters": {**GOOD, "data_offsets": [768, 0]}}, id="end-before-begin"),
        pytest.param({"q_filters": {**GOOD, "data_offsets": [2**64 - 768, 2**64]}}, id="offsets-that-overflow"),
        pytest.param({"q_filters": {**GOOD, "data_offsets": [0]}}, id="one-offset"),
        pytest.param({"q_filters": {**GOOD, "shape": [2**32, 2**32, 2**32]}}, id="a-size-that-overflows"),
        pytest.param({"q_filters": {**GOOD, "shape": [-3, 2, -32]}}, id="negative-dimensions"),
        pytest.param({"q_filters": {**GOOD, "shape": [3.0, 2, 32]}}, id="dimension-no-integer"),
        pytest.param({"q_filters": {**GOOD, "shape": [1] * 100_000 + [192]}}, id="absurdly-many-dimensions"),
        pytest.param({"q_filters": {**GOOD, "shape": [0, 2, 32], "data_offsets": [0, 0]}}, id="empty"),
        pytest.param({"q_filters": {**GOOD, "dtype": "PICKLE"}}, id="dtype-unknown"),
        pytest.param({"q_filters": {**GOOD, "dtype": ["F32"]}}, id="dtype-a-list"),
        pytest.param({"q_filters": {**GOOD, "dtype": "F4", "shape": [3, 2, 256]}}, id="dtype-of-half-a-byte"),
        pytest.param({"q_filters": {**GOOD, "dtype": "F16"}}, id="size-of-another-dtype"),
        pytest.param({"q_filters": {"dtype": "F32"}}, id="fields-missing"),
        pytest.param({"q_filters": GOOD, "twin": GOOD}, id="two-tensors-in-one-place"),
        pytest.param({"q_filters": GOOD, "__metadata__": {"format": 7}}, id="metadata-no-string"),
        pytest.param({"q_filters": GOOD, "__metadata__": []}, id="metadata-a-list"),
    ],
)
def test_a_hostile_header_is_refused_in_one_line(path, header):
    write_safetensors(path, header)
    with pytest.raises(ValueError) as refusal:
        reader.load(path, tiny_identity())
    assert str(path) in str(refusal.value) and str(refusal.value).isprintable() and len(str(refusal.value)) < 600


def test_the_same_header_undamaged_is_loaded(path):
    write_safetensors(path, {"q_filters": GOOD})
    assert not reader.load(path, tiny_identity()).filters.any()


def test_nothing_but_the_filters_is_read_of_a_file_that_holds_more(path):
    save_file({"q_filters": torch.zeros(SHAPE), "other": torch.full((4,), torch.nan)}, path)
    assert_same(reader.load(path, tiny_identity()), Filters(torch.zeros(SHAPE)))


@pytest.mark.parametrize("text", ["\x1b[2Jgone\nINFO all is well", "x" * 10_000], ids=["control-characters", "long"])
def test_what_a_file_says_of_itself_is_shown_in_one_short_line(path, text):
    other = dataclasses.replace(tiny_identity(text), head_size=2 * HEAD_SIZE)
    format.save(path, random_filters(), other)
    with pytest.raises(ValueError, match="was made for .*head_size 64") as refusal:
        reader.load(path, tiny_identity())
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 600
    save_file({text: torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no tensor 'q_filters', only") as refusal:
        reader.load(path, tiny_identity())
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 600


@pytest.mark.parametrize(
    "tensors", [{}, {"filters": torch.zeros(SHAPE), "weight": torch.zeros(3)}], ids=["empty", "others"]
)
def test_a_file_without_filters_is_refused_naming_what_it_has(path, tensors):
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"no tensor 'q_filters', only {', '.join(tensors)}"):
        reader.load(path, tiny_identity())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e13, -1e13], ids=str)
@pytest.mark.parametrize("name", ["q_filters", "score_std"])
def test_numbers_that_are_not_finite_are_refused(path, name, value):
    tensors = {"q_filters": torch.zeros(SHAPE), "score_std": torch.zeros(SHAPE[:2])}
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{name} must hold finite"):
        reader.load(path, tiny_identity())


def test_a_negative_deviation_is_refused(path):
    save_file({"q_filters": torch.zeros(SHAPE), "score_std": torch.full(SHAPE[:2], -1.0)}, path)
    with pytest.raises(ValueError, match="score_std has negative numbers"):
        reader.load(path, tiny_identity())


def test_numbers_too_large_for_float32_are_refused(path):
    save_file({"q_filters": torch.full(SHAPE, 1e300, dtype=torch.float64)}, path)
    with pytest.raises(ValueError, match="q_filters must hold finite"):
        reader.load(path, tiny_identity())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64], ids=str)
def test_numbers_that_are_not_floating_point_are_refused_naming_their_type(path, dtype):
    save_file({"q_filters": torch.zeros(SHAPE, dtype=dtype)}, path)
    with pytest.raises(ValueError, match=r"q_filters must hold floating-point numbers \(F64, .*\), not [A-Z]"):
        reader.load(path, tiny_identity())


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param({"model": None}, id="no-model"),
        pytest.param({"model": "tiny"}, id="model-not-json"),
        pytest.param({"model": "[1, 2]"}, id="model-no-object"),
        pytest.param({"model": "7"}, id="model-a-number"),
        pytest.param({"model": "[" * 100_000}, id="model-nested-without-end"),
        pytest.param({"version": None}, id="no-version"),
        pytest.param({"version": "one"}, id="version-no-number"),
        pytest.param({"version": "-1"}, id="version-negative"),
        pytest.param({"version": "9" * 10_000}, id="version-of-many-digits"),
        pytest.param({"layers": None}, id="no-layers"),
        pytest.param({"layers": "7"}, id="layers-a-number"),
        pytest.param({"layers": "[" * 100_000}, id="layers-nested-without-end"),
        pytest.param({"layers": '["a", "b"]'}, id="layers-too-few"),
        pytest.param({"layers": '["a", "b", "b"]'}, id="layers-twice"),
        pytest.param({"layers": '["a", "b", "c", "c"]'}, id="layers-too-many"),
        pytest.param({"layers": '["a", "b", ["c"]]'}, id="layers-no-names"),
        pytest.param({"layers": '{"a": 1, "b": 2, "c": 3}'}, id="layers-an-object"),
        pytest.param({"horizon": None}, id="no-horizon"),
        pytest.param({"horizon": "far"}, id="horizon-no-number"),
    ],
)
def test_a_damaged_header_is_refused(path, damage):
    save_with_header(path, damage)
    with pytest.raises(ValueError, match="has a damaged header .*: calibrate it again"):
        reader.load(path, tiny_identity())


def test_a_model_with_fields_missing_is_refused(path):
    save_with_header(path, {"model": "{}"})
    with pytest.raises(ValueError, match="made for None"):
        reader.load(path, tiny_identity())


def test_a_newer_version_is_refused_naming_both(path):
    save_with_header(path, {"version": str(format.VERSION + 1)})
    with pytest.raises(ValueError, match=rf"has version {format.VERSION + 1}, .* up to {format.VERSION}: update"):
        reader.load(path, tiny_identity())


def test_factors_of_other_coming_positions_are_refused_naming_both(path):
    save_with_header(path, {"horizon": "512"})
    with pytest.raises(ValueError, match=f"averaged over 512 positions, this package needs {HORIZON}"):
        reader.load(path, tiny_identity())


def test_a_missing_file_is_an_os_error(path):
    with pytest.raises(OSError):
        reader.load(path, tiny_identity())


STAGE = layer_names()[1:]
PARTS = {
    "whole": Part(),
    "stage": Part(STAGE, (1, 2)),
    "heads": Part(layer_names(), (0, 1, 2), heads=slice(2, 4), kv_heads=slice(1, 2), rank=5),
    "shared-kv-head": Part(layer_names()[::2], (0, 2), heads=slice(3, 4), kv_heads=slice(1, 2), rank=1),
    "without-factors": Part(STAGE, (1, 2), heads=slice(0, 2), kv_heads=slice(0, 1), rank=0),
    "full-rank": Part(rank=RANK),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_rank_reads_its_layers_and_heads(path, part):
    filters = random_filters()
    format.save(path, filters, tiny_identity())
    found = reader.load(path, tiny_identity(), part)
    assert_same(found, filters.of(part))
    layers = slice(None) if part.layers is None else list(part.indices)
    assert torch.equal(found.filters, filters.filters[layers][:, part.kv_heads])
    assert torch.equal(found.query_mean_before_rope, filters.query_mean_before_rope[layers][:, part.heads])
    rank = RANK if part.rank is None else part.rank
    assert torch.equal(found.query_factors, filters.query_factors[layers][:, part.heads, RANK - rank :])
    assert torch.equal(found.score_std, filters.score_std[layers][:, part.kv_heads])


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_rank_reads_its_part_of_a_file_of_version_2(path, part):
    """Of second moments nothing where nobody scores by them, and of what is after RoPE nothing at all."""
    statistics = random_statistics()
    statistics["query_mean_after_rope"].fill_(torch.nan)
    save_version_2(path, tiny_identity(), random_filters().filters, **statistics)
    found = reader.load(path, tiny_identity(), part)
    layers = slice(None) if part.layers is None else list(part.indices)
    assert torch.equal(found.filters, random_filters().filters[layers, part.kv_heads])
    assert torch.equal(found.query_mean_before_rope, statistics["query_mean_before_rope"][layers][:, part.heads])
    assert torch.equal(found.score_mean, statistics["score_mean"][layers][:, part.kv_heads])
    assert found.query_factors is None and found.calibration == "long ago"
    if part.rank == 0:
        assert found.query_second_before_rope is None
    else:
        assert torch.equal(
            found.query_second_before_rope, statistics["query_second_before_rope"][layers][:, part.heads]
        )


def test_nothing_is_read_of_other_layers_and_heads(path):
    """What lies there may be anything: a rank never sees it."""
    filters, part = random_filters(), PARTS["heads"]
    filters.query_factors[:, :2], filters.query_factors[:, :, : RANK - 5] = torch.nan, torch.nan
    filters.query_mean_before_rope[:, :2], filters.filters[:, 0], filters.score_mean[:, 0] = (torch.nan,) * 3
    format.save(path, filters, tiny_identity())
    assert_same(reader.load(path, tiny_identity(), part), filters.of(part))
    with pytest.raises(ValueError, match="must hold finite numbers"):
        reader.load(path, tiny_identity())


def test_a_file_without_the_layers_of_a_model_is_refused(path):
    format.save(path, random_filters(), tiny_identity())
    with pytest.raises(ValueError, match=r"has no layer text.layers.0.attn, only model.layers.0.self_attn.attn"):
        reader.load(path, tiny_identity(), Part(("text.layers.0.attn",)))


@pytest.mark.parametrize(("rank", "needed"), [(RANK + 1, RANK + 1), (HEAD_SIZE + 100, HEAD_SIZE)])
def test_a_higher_rank_than_stored_is_refused_naming_both(path, rank, needed):
    format.save(path, random_filters(), tiny_identity())
    with pytest.raises(ValueError, match=f"holds {RANK} factors per query head, and rank={rank} needs {needed}") as no:
        given_file(str(path), tiny_identity(), rank)
    assert f"set rank to {RANK} at most" in str(no.value) and f"calibrate --rank {needed}`" in str(no.value)


def test_of_layers_that_store_other_ranks_as_many_factors_are_read_as_all_have(path):
    format.save(path, random_filters(), tiny_identity())
    tensors, key = load_file(path), f"{layer_names()[1]}.query_factors"
    save_file({**tensors, key: tensors[key][:, -5:].contiguous()}, path, header_of(path))
    assert_same(reader.load(path, tiny_identity()), random_filters().of(Part(rank=5)))
    with pytest.raises(ValueError, match="holds 5 factors"):
        reader.load(path, tiny_identity(), Part(rank=6))


def test_the_table_of_longrope_is_part_of_the_model_and_not_before_version_3(path):
    """Factors are averaged over rotations by it, moments before RoPE are not."""
    is_long = dataclasses.replace(tiny_identity(), has_long_rope=True)
    format.save(path, random_filters(), tiny_identity())
    with pytest.raises(ValueError, match="tiny has has_long_rope True"):
        reader.load(path, is_long)
    save_version_2(path, tiny_identity(), random_filters().filters, **random_statistics())
    reader.load(path, is_long)


BYTES = {  # of version 2: layers, query heads, KV heads, MiB
    "Llama-3-8B": (32, 32, 8, 129),
    "Qwen3-32B": (64, 64, 8, 516),
    "Llama-3.1-405B": (126, 128, 8, 2032),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_file_takes_an_eighth_of_the_bytes_of_version_2(name, path):
    num_layers, num_heads, num_kv_heads, before = BYTES[name]
    model = ModelIdentity(name, "", num_layers, num_heads, num_kv_heads, head_size=128, rope={})
    version_2 = 4 * sum(math.prod(shape) for shape in reader.shapes_before_version_3(model).values())
    assert version_2 // 2**20 == before
    version_3 = format.file_bytes(model, STORED_RANK)
    assert version_3 < version_2 / 10
    if name == "Llama-3-8B":
        filters = Filters(
            torch.zeros(num_layers, num_kv_heads, 128),
            layer_names(num_layers),
            torch.zeros(num_layers, num_heads, 128),
            torch.zeros(num_layers, num_heads, STORED_RANK, 128),
            score_mean=torch.zeros(num_layers, num_kv_heads),
            score_std=torch.zeros(num_layers, num_kv_heads),
        )
        format.save(path, filters, model)
        assert version_3 < path.stat().st_size < version_3 + reader.MAX_HEADER_BYTES / 16


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def save_with_header(path: pathlib.Path, changes: dict[str, str | None]) -> None:
    """A file of ours with entries of its header changed, or dropped where None."""
    header = {
        "format": format.FORMAT,
        "version": str(format.VERSION),
        "model": json.dumps(dataclasses.asdict(tiny_identity())),
        "layers": json.dumps(layer_names()),
        "horizon": str(HORIZON),
        "calibration": "",
        **changes,
    }
    save_file(
        {"q_filters": torch.zeros(SHAPE)}, path, {name: value for name, value in header.items() if value is not None}
    )


def header_of(path: pathlib.Path) -> dict[str, str]:
    """What a file says of itself."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def write_safetensors(path: pathlib.Path, header: bytes | dict) -> None:
    """A file with this header before the bytes of as many zeros as there are filters."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(4 * math.prod(SHAPE)))


@pytest.fixture
def cache_root(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "envs", SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path / "cache")))
    return tmp_path / "cache"


WEIGHTS = "what the weights are"


def test_the_cache_path_lies_below_vllms_cache_and_is_named_after_the_architecture(cache_root):
    path = cache_path(tiny_identity("org/tiny"), WEIGHTS)
    assert path.parent == cache_root / "qfilters"
    assert path.name.startswith("LlamaForCausalLM-") and path.suffix == ".safetensors"


@pytest.mark.parametrize(
    "name", ["org/tiny", "tiny", "./tiny/", "/models/moved", "../../etc/passwd", "a\n/b", "x" * 500]
)
def test_the_cache_path_goes_by_weights_and_not_by_where_they_came_from(cache_root, name):
    model = tiny_identity("org/tiny")
    for same in (tiny_identity(name), dataclasses.replace(model, revision="another commit")):
        assert cache_path(same, WEIGHTS) == cache_path(model, WEIGHTS)
    assert cache_path(model, "other weights") != cache_path(model, WEIGHTS)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "Other"},
        {"num_layers": 9},
        {"head_size": 64},
        {"rope": {"rope_theta": 5e5}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_cache_path_changes_with_the_model(cache_root, change):
    model = tiny_identity("org/tiny")
    assert cache_path(dataclasses.replace(model, **change), WEIGHTS) != cache_path(model, WEIGHTS)


@pytest.fixture
def folder(tmp_path):
    """A model's."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_weights(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def write_weights(path: pathlib.Path, seed: int = 0, **changes: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wide": (300, 70), "narrow": (7,), "single": (), "none": (0, 4)}
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save_file({**tensors, **changes}, path, metadata={"format": "pt"})


def fingerprint_of(folder: pathlib.Path | str, **more: str) -> str:
    return fingerprint(dataclasses.replace(tiny_identity(str(folder)), **more))


def test_the_fingerprint_goes_by_numbers_and_not_by_names_and_times(folder, tmp_path, monkeypatch):
    expected = fingerprint_of(folder)
    monkeypatch.chdir(tmp_path)
    assert {fingerprint_of(name) for name in (f"{folder}/", "model", "./model")} == {expected}
    os.utime(folder / "model.safetensors", (0, 0))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "README.md").write_text("words")
    assert fingerprint_of(shutil.copytree(folder, tmp_path / "copied"), revision="another commit") == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"wide": torch.ones(300, 70, dtype=torch.bfloat16)},
        {"narrow": torch.ones(7, dtype=torch.bfloat16)},
        {"single": torch.tensor(2.0, dtype=torch.bfloat16)},
        {"none": torch.zeros(4, 0, dtype=torch.bfloat16)},
        {"wide": torch.ones(300, 70, dtype=torch.float16)},
        {"more": torch.ones(1)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_fingerprint_changes_with_every_tensor(folder, changes):
    expected = fingerprint_of(folder)
    write_weights(folder / "model.safetensors", **changes)
    assert fingerprint_of(folder) != expected


def test_the_fingerprint_of_a_merged_adapter_is_another(tmp_path):
    make_tiny_llama(tmp_path / "model")
    make_tiny_adapter(tmp_path / "adapter", tmp_path / "model", tmp_path / "merged")
    assert fingerprint_of(tmp_path / "model") != fingerprint_of(tmp_path / "merged")


@pytest.mark.parametrize("content", [b"", b"no header", b"\x02" + bytes(7) + b"[]", b"\xff" * 100])
def test_a_damaged_file_counts_by_size_and_time(folder, content):
    before = fingerprint_of(folder)
    (folder / "adapter.safetensors").write_bytes(content)
    damaged = fingerprint_of(folder)
    (folder / "adapter.safetensors").write_bytes(content + b"more")
    assert len({before, damaged, fingerprint_of(folder)}) == 3


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "weights.unheard-of"])
def test_files_of_other_formats_count_by_size_and_time(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"weights")
    before = fingerprint_of(tmp_path)
    assert fingerprint_of(path) == before
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    changed = fingerprint_of(tmp_path)
    path.write_bytes(b"other weights")
    assert len({before, changed, fingerprint_of(tmp_path)}) == 3


def test_a_repository_is_looked_for_among_downloads_and_else_goes_by_its_commit(folder, monkeypatch):
    asked = []

    def look(repository, name, cache_dir, revision):
        asked.append((repository, name, cache_dir, revision))
        return str(folder / name) if cache_dir == "there" else None

    monkeypatch.setattr(fingerprint_module, "try_to_load_from_cache", look)
    model = dataclasses.replace(tiny_identity("org/tiny"), revision="abc123")
    assert fingerprint(model, "there") == fingerprint_of(folder)
    assert fingerprint(model) == "org/tiny@abc123"
    assert asked == [("org/tiny", "config.json", place, "abc123") for place in ("there", None)]


@pytest.mark.parametrize("name", ["../../etc", "org/..", "a\n/b", "org/" + "x" * 500])
def test_a_model_of_a_strange_name_is_no_folder_of_this_machine(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fingerprint_of(name) == f"{name}@"


class Hub:
    """Stands in for downloads: serves a file or raises, and remembers what was asked for."""

    def __init__(self) -> None:
        self.answer: pathlib.Path | Exception = AssertionError("nothing is to be downloaded")
        self.asked: list[str] = []

    def download(self, repository: str, commit: str | None, most_bytes: int) -> str:
        self.asked.append(repository if commit is None else f"{repository}@{commit}")
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(load, "_download", hub.download)
    return hub


def http_error(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("refused", response=SimpleNamespace(headers={}, request=None))


DOWNLOAD_ERRORS = {
    "no-repository": http_error(RepositoryNotFoundError),
    "server": http_error(HfHubHTTPError),
    "no-file": LocalEntryNotFoundError("not cached"),
    "offline": ConnectionError("no network"),
}


def save_for(path: pathlib.Path, model: ModelIdentity, seed: int = 0) -> pathlib.Path:
    format.save(path, random_filters(seed), model)
    return path


def test_cached_filters_are_found_by_their_weights(cache_root):
    model = tiny_identity("org/tiny")
    path = save_for(cache_path(model, WEIGHTS), model, seed=1)
    found = cached_file(model, WEIGHTS, 8)
    assert (found.path, found.origin) == (str(path), f"cache {path}")
    assert cached_file(model, "other weights", 8) is None


def test_filters_of_few_tokens_are_for_engines_with_room_for_no_more(tiny_model, empty_cache):
    llm = dict(kv_cache_memory_bytes=1 << 28, skip_tokenizer_init=True)
    for max_model_len, num_files in ((512, 1), (2560, 2)):
        run_engine(tiny_model, [dict(prompt=[1, 2], max_tokens=1)], {}, max_model_len=max_model_len, **llm)
        assert len(list((empty_cache / "qfilters").iterdir())) == num_files


def test_cached_filters_of_a_lower_rank_or_an_earlier_version_are_calibrated_anew(cache_root, monkeypatch):
    model, warnings = tiny_identity("org/tiny"), []
    monkeypatch.setattr(load.logger, "warning", lambda text, *values: warnings.append(text % values))
    save_for(cache_path(model, WEIGHTS), model)
    assert cached_file(model, WEIGHTS, RANK) is not None and not warnings
    assert cached_file(model, WEIGHTS, RANK + 1) is None and "12 factors per query head, and rank=13" in warnings[0]
    path = cache_path(model, WEIGHTS)
    monkeypatch.setattr(load, "VERSION", 2)
    assert cache_path(model, WEIGHTS) != path


def test_a_given_file_is_taken(hub, path):
    save_for(path, tiny_identity("org/tiny"), seed=2)
    found = given_file(str(path), tiny_identity("org/tiny"), 8)
    assert found.path == found.origin == str(path)
    assert not hub.asked


def test_a_given_folder_is_searched_for_a_published_file(hub, tmp_path):
    path = save_for(tmp_path / "model.safetensors", tiny_identity())
    found = given_file(str(tmp_path), tiny_identity(), 8)
    assert found.path == found.origin == str(path)


def test_a_given_file_for_another_model_is_refused(hub, path):
    save_for(path, dataclasses.replace(tiny_identity(), num_kv_heads=4))
    with pytest.raises(ValueError, match="num_kv_heads"):
        given_file(str(path), tiny_identity(), 8)


@pytest.mark.parametrize("wanted", ["someone/tiny_qfilt", "someone/tiny_qfilt/", "someone/tiny_qfilt@abc123"])
def test_a_given_repository_is_downloaded_and_named_with_its_commit(hub, tmp_path, wanted, monkeypatch):
    warnings = []
    monkeypatch.setattr(load.logger, "warning", lambda text, *values: warnings.append(text % values))
    (tmp_path / "abc123").mkdir()
    hub.answer = save_for(tmp_path / "abc123" / "model.safetensors", tiny_identity())
    found = given_file(wanted, tiny_identity(), 8)
    assert found.path == str(hub.answer) and found.origin == "hub someone/tiny_qfilt@abc123"
    assert hub.asked == ["someone/tiny_qfilt" + ("@abc123" if "@" in wanted else "")]
    assert "commit abc123" in warnings[0] and "filters someone/tiny_qfilt@abc123 pins them" in warnings[0]


@pytest.mark.parametrize("error", DOWNLOAD_ERRORS)
def test_a_given_repository_that_cannot_be_downloaded_is_refused(hub, error):
    hub.answer = DOWNLOAD_ERRORS[error]
    with pytest.raises(ValueError, match="filters='someone/tiny_qfilt': neither a file nor a repository"):
        given_file("someone/tiny_qfilt", tiny_identity(), 8)


@pytest.mark.parametrize(
    "wanted", ["../secrets", "..\\x/y", "org/..", "./-x", "org/a--b", "or g/x", "org/\n", "~/x", "org/" + "x" * 500]
)
def test_what_is_no_name_of_a_repository_is_refused_before_anything_is_asked_for(wanted):
    """The real hub client, which is offline: a name that passes would be looked for in its cache."""
    with pytest.raises(ValueError, match="neither a file nor a repository") as refusal:
        given_file(wanted, tiny_identity(), 8)
    assert isinstance(refusal.value.__cause__, HFValidationError | OSError)
    assert not isinstance(refusal.value.__cause__, LocalEntryNotFoundError)


def test_a_repository_too_large_to_hold_filters_is_not_downloaded(monkeypatch):
    most = reader.max_file_bytes(tiny_identity())
    monkeypatch.setattr(load, "try_to_load_from_cache", lambda repository, name, revision: None)
    monkeypatch.setattr(load, "get_hf_file_metadata", lambda url: SimpleNamespace(size=most + 1))
    monkeypatch.setattr(load, "hf_hub_download", None)
    with pytest.raises(ValueError, match=f"org/model holds {most + 1} bytes, filters of this model {most} at most"):
        given_file("org/model", tiny_identity(), 8)


def test_a_damaged_or_foreign_file_in_the_cache_is_calibrated_anew(cache_root, monkeypatch):
    model, warnings = tiny_identity("org/tiny"), []
    monkeypatch.setattr(load.logger, "warning", lambda text, *values: warnings.append(text % values))
    path = save_for(cache_path(model, WEIGHTS), model)
    whole = path.read_bytes()
    for content in (b"half", whole[:-10], b"", whole.replace(b"tiny", b"tinz").replace(b"Llama", b"Other")):
        path.write_bytes(content)
        assert cached_file(model, WEIGHTS, 8) is None
        assert str(path) in warnings.pop() and not warnings
    assert keep(random_filters(seed=3), model, WEIGHTS) == f"kept in {path}"
    assert_same(reader.load(cached_file(model, WEIGHTS, 8).path, model), random_filters(seed=3))


def test_a_cache_that_cannot_be_written_is_done_without(cache_root, monkeypatch):
    warnings = []
    monkeypatch.setattr(load.logger, "warning", lambda text, *values: warnings.append(text % values))
    cache_root.write_text("a file where a folder should be")
    assert keep(random_filters(), tiny_identity("org/tiny"), WEIGHTS) == "not kept"
    assert "the next start calibrates again" in warnings[0] and str(cache_root) in warnings[0]


def test_a_cache_that_cannot_be_searched_is_done_without(cache_root, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    warnings = []
    monkeypatch.setattr(load.logger, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(load.pathlib.Path, "exists", refuse)
    assert cached_file(tiny_identity("org/tiny"), WEIGHTS, 8) is None
    assert "Permission denied" in warnings[0] and "calibrated anew" in warnings[0]


@pytest.mark.parametrize(
    "wanted", ["missing.safetensors", "folder/missing.safetensors", "/nowhere/at/all", "missing", "a/b/c"]
)
def test_a_missing_file_is_refused_by_name(hub, wanted):
    with pytest.raises(ValueError, match=f"filters='{wanted}': no such file"):
        given_file(wanted, tiny_identity(), 8)
    assert not hub.asked


def test_a_folder_without_a_file_is_refused(hub, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        given_file(str(tmp_path), tiny_identity(), 8)
    assert not hub.asked


@pytest.mark.parametrize("sizes", [(50,), (1, 7, 42), (25, 0, 25)], ids=str)
def test_moments_are_those_of_all_vectors_added(sizes):
    vectors = torch.randn(50, 3, 5, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.5, -3, 0, 2, 10])
    moments = Moments(num_heads=3, head_size=5)
    for part in vectors.split(sizes):
        moments.add(part)
    assert moments.count == 50
    exact = vectors.double()
    torch.testing.assert_close(moments.mean, exact.mean(0).float())
    torch.testing.assert_close(moments.second, torch.einsum("nhi,nhj->hij", exact, exact).div(50).float())


def test_moments_are_not_lost_in_a_long_sum():
    moments = Moments(num_heads=1, head_size=1)
    moments.add(torch.full((1, 1, 1), 2.0**13))
    for _ in range(1000):
        moments.add(torch.full((1, 1, 1), 2.0**-13))
    assert float(moments.mean * 1001) == pytest.approx(2.0**13 + 1000 * 2.0**-13, rel=1e-6)


class Layers:
    """Queries and keys of some layers, and the statistics of them."""

    def __init__(self, num_heads: int = 4, num_kv_heads: int = 2, num_layers: int = 2, head_size: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        spread = torch.linspace(0.2, 2.0, head_size)
        self.queries = torch.randn(num_layers, 300, num_heads, head_size, generator=generator) * spread
        self.queries += torch.randn(num_layers, 1, num_heads, head_size, generator=generator)
        self.keys = torch.randn(num_layers, 300, num_kv_heads, head_size, generator=generator) * spread
        self.keys += torch.randn(num_layers, 1, num_kv_heads, head_size, generator=generator)

    def statistics(self, heads: slice = slice(None), kv_heads: slice = slice(None)) -> list[LayerStatistics]:
        """As a rank with these heads gathers them, from three steps."""
        layers = []
        for queries, keys in zip(self.queries[:, :, heads], self.keys[:, :, kv_heads], strict=True):
            size = queries.shape[2]
            layer = LayerStatistics(
                queries.shape[1], keys.shape[1], size, Rotation(None, size), torch.zeros(0, dtype=torch.int64)
            )
            for query, key in zip(queries.split([120, 1, 179]), keys.split([120, 1, 179]), strict=True):
                layer.observe(query, key)
            layers.append(layer)
        return layers

    def direct_filters(self) -> torch.Tensor:
        """One head after the other, as the paper has it."""
        num_layers, _, num_heads, head_size = self.queries.shape
        num_kv_heads = self.keys.shape[2]
        filters = torch.zeros(num_layers, num_kv_heads, head_size)
        for layer in range(num_layers):
            for head in range(num_heads):
                queries = self.queries[layer, :, head].double()
                direction = torch.linalg.svd(queries, full_matrices=False).Vh[0]
                if direction @ queries.mean(0) < 0:
                    direction = -direction
                group = num_heads // num_kv_heads
                filters[layer, head // group] += direction.float() / group
        return filters


NAMES = layer_names(2)


@pytest.fixture
def one_stage(monkeypatch):
    stage = SimpleNamespace(world_size=1, broadcast_object=lambda layers, rank: layers)
    monkeypatch.setattr(calibrate, "get_pp_group", lambda: stage)


@pytest.fixture
def one_rank(one_stage, monkeypatch):
    monkeypatch.setattr(
        calibrate, "get_tp_group", lambda: SimpleNamespace(device="cpu", all_gather=lambda tensor, dim: tensor)
    )


GROUPS = pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (6, 1)], ids=["MHA", "GQA2", "MQA6"])


@GROUPS
def test_made_filters_are_the_signed_singular_vectors_averaged_over_query_heads(one_rank, num_heads, num_kv_heads):
    layers = Layers(num_heads=num_heads, num_kv_heads=num_kv_heads)
    filters = make_filters(NAMES, layers.statistics(), num_kv_heads, "noise")
    torch.testing.assert_close(filters.filters, layers.direct_filters(), atol=1e-4, rtol=0)
    assert filters.calibration == "noise"


def test_queries_that_are_not_finite_make_no_filters(one_rank):
    """As of Gemma 3n in vLLM 0.32, which divides by the length of an embedding that is zero."""
    layers = Layers()
    layers.queries[1, 5, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="queries of the token ids it runs are not all finite"):
        make_filters(NAMES, layers.statistics(), 2, "")


def test_made_filters_point_along_the_mean_query(one_rank):
    layers = Layers(num_heads=2, num_kv_heads=2)
    filters = make_filters(NAMES, layers.statistics(), 2, "").filters
    assert bool(((filters * layers.queries.mean(1)).sum(-1) > 0).all())
    layers.queries.neg_()
    torch.testing.assert_close(make_filters(NAMES, layers.statistics(), 2, "").filters, -filters)


@GROUPS
def test_scores_of_made_filters_have_the_mean_and_deviation_over_the_keys(one_rank, num_heads, num_kv_heads):
    layers = Layers(num_heads=num_heads, num_kv_heads=num_kv_heads)
    filters = make_filters(NAMES, layers.statistics(), num_kv_heads, "")
    scores = (layers.keys.double() * filters.filters[:, None]).sum(-1)
    torch.testing.assert_close(filters.score_mean, scores.mean(1).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(filters.score_std, scores.std(1, correction=0).float(), atol=1e-4, rtol=1e-4)


def test_scores_of_equal_keys_have_no_deviation(one_rank):
    layers = Layers()
    layers.keys[:] = 3.0
    score_std = make_filters(NAMES, layers.statistics(), 2, "").score_std
    torch.testing.assert_close(score_std, torch.zeros(2, 2), atol=0.02, rtol=0)


@pytest.mark.parametrize("rank", [1, 5, 16, 100])
def test_made_filters_keep_mean_and_covariance_of_the_queries(one_rank, rank):
    """Of layers that do not turn, those at any position."""
    layers = Layers()
    filters = make_filters(NAMES, layers.statistics(), 2, "", rank)
    torch.testing.assert_close(filters.query_mean_before_rope, layers.queries.mean(1), atol=1e-5, rtol=1e-5)
    centred = layers.queries - layers.queries.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(torch.einsum("lnhi,lnhj->lhij", centred, centred) / 300)
    values[..., :-rank] = 0
    largest = vectors @ torch.diag_embed(values) @ vectors.mT
    factors = filters.query_factors
    assert factors.shape[2] == min(rank, 16)
    torch.testing.assert_close(factors.mT @ factors, largest, atol=1e-4, rtol=1e-4)
    assert bool((factors.norm(dim=-1).diff() >= -1e-4).all()), "the largest last"


@pytest.mark.parametrize(
    ("num_ranks", "num_kv_heads"),
    [(2, 2), (2, 1), (4, 2)],
    ids=["a-kv-head-each", "two-ranks-share-one-kv-head", "four-ranks-share-two-kv-heads"],
)
def test_all_ranks_together_make_the_filters_of_one(one_stage, monkeypatch, num_ranks, num_kv_heads):
    def use(all_gather):
        monkeypatch.setattr(calibrate, "get_tp_group", lambda: SimpleNamespace(device="cpu", all_gather=all_gather))

    layers = Layers(num_kv_heads=num_kv_heads)
    num_heads = layers.queries.shape[2] // num_ranks
    given = [[] for _ in range(num_ranks)]  # by rank, its tensor of every all_gather
    for rank in range(num_ranks):
        kv_head = rank * num_kv_heads // num_ranks
        of_rank = layers.statistics(slice(rank * num_heads, (rank + 1) * num_heads), slice(kv_head, kv_head + 1))
        use(lambda tensor, dim, rank=rank: given[rank].append(tensor) or tensor)
        make_filters(NAMES, of_rank, 1, "")
    rounds = iter(zip(*given, strict=True))
    use(lambda tensor, dim: torch.cat(next(rounds), dim))
    found = make_filters(NAMES, of_rank, num_kv_heads, "")

    use(lambda tensor, dim: tensor)
    expected = make_filters(NAMES, layers.statistics(), num_kv_heads, "")
    assert found.layers == expected.layers == NAMES
    for name in set(TENSORS) - {"query_factors"}:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    covariance, expected_covariance = (made.query_factors.mT @ made.query_factors for made in (found, expected))
    torch.testing.assert_close(covariance, expected_covariance, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config, counted, expected",
    [
        # Two attentions in each layer, one key for all heads.
        (LongcatFlashConfig(num_layers=2, num_attention_heads=4), (2, 4, 576), (4, 1, 576)),
        # As Transformers has the configuration of MiMo-V2, and as it was published: of full attention alone.
        (
            MiMoV2FlashConfig(num_hidden_layers=3, num_attention_heads=4, swa_num_key_value_heads=8, swa_head_dim=192),
            (3, 4, 192),
            (1, 4, 192),
        ),
        (
            SimpleNamespace(
                num_attention_heads=4, num_key_value_heads=4, head_dim=192, swa_num_key_value_heads=8, swa_head_dim=192,
                hybrid_layer_pattern=[0, 1, 1, 0], sliding_window=128,
            ),
            (4, 4, 192),
            (2, 4, 192),
        ),
        # A key of heads has elements that do not turn, and those that do.
        (MiniCPM3Config(num_hidden_layers=2, num_attention_heads=4), (2, 4, 32), (2, 4, 96)),
        (nemotron_nas((8, None, 8)), (3, 4, 128), (2, 4, 128)),
    ],
    ids=["LongCat-Flash", "MiMo-V2", "MiMo-V2, published", "MiniCPM3", "Nemotron NAS"],
)  # fmt: skip
def test_layers_and_heads_of_models_that_count_them_in_ways_of_their_own(config, counted, expected):
    """counted: by vLLM. Layers, KV heads, and elements of a key."""
    num_layers, num_kv_heads, head_size = counted
    model = SimpleNamespace(
        hf_text_config=config, hf_config=config, model="folder", architecture="A", revision=None, max_model_len=4096,
        is_hybrid=False, use_mla=expected[1] == 1, get_sliding_window=lambda: getattr(config, "sliding_window", None),
        get_total_num_hidden_layers=lambda: num_layers, get_total_num_kv_heads=lambda: num_kv_heads,
        get_head_size=lambda: head_size,
    )  # fmt: skip
    found = ModelIdentity.from_model_config(model)
    assert (found.num_layers, found.num_kv_heads, found.head_size) == expected


def test_made_filters_fit_into_a_file(one_rank, path):
    filters = make_filters(NAMES, Layers().statistics(), 2, "noise")
    model = ModelIdentity("tiny", "LlamaForCausalLM", num_layers=2, num_heads=4, num_kv_heads=2, head_size=16, rope={})
    format.save(path, filters, model)
    assert_same(reader.load(path, model), filters)


def test_random_sequences_are_the_same_every_time_and_use_the_whole_vocabulary():
    sequences = random_sequences(vocab_size=10, num_sequences=3, num_tokens=200)
    assert [len(sequence) for sequence in sequences] == [200, 200, 200]
    assert all(set(sequence) == set(range(10)) for sequence in sequences)
    assert sequences == random_sequences(10, 3, 200)
    assert sequences != random_sequences(10, 3, 200, seed=1)


def look_for_filters(monkeypatch, group, wanted="auto", load_format="auto", rank=8):
    """As a rank of a group of ranks does."""
    monkeypatch.setattr(runner_module, "get_world_group", lambda: group)
    runner = SimpleNamespace(
        identity=tiny_identity(),
        compression=SimpleNamespace(entry=entry("qfilters", "static"), filters=wanted, rank=rank),
        load_config=SimpleNamespace(load_format=load_format),
        weights_fingerprint=lambda: WEIGHTS if wanted == "auto" and load_format == "auto" else 1 / 0,
        calibrate_filters=lambda sequences, description, rank: SimpleNamespace(of=lambda part: (rank, part)),
        _few_tokens=lambda: None,
        _random_sequences=lambda: [[1, 2, 3]],
        _part=lambda: "part",
    )
    return runner_module.CompressedModelRunner._find_or_calibrate_filters(runner)


@pytest.fixture
def ranks(monkeypatch):
    """What a rank knows of the others, and what becomes of the file that the first one found."""
    monkeypatch.setattr(runner_module, "part_of", lambda found, model, part, group: (found.path, part))
    return SimpleNamespace(is_first_rank=True, broadcast_object=lambda found: found)


def test_one_rank_looks_for_filters_and_all_take_what_it_found(monkeypatch, ranks):
    """Each machine has a cache of its own: were each rank to look there, some would calibrate and wait for the
    others.
    """
    sent: list[FiltersFile | None] = []
    ranks.broadcast_object = lambda given: sent.append(given) or sent[0]
    for is_first, where in ((True, "here"), (False, "there")):
        ranks.is_first_rank = is_first
        found = FiltersFile(where, "content", f"cache {where}")
        monkeypatch.setattr(runner_module, "cached_file", lambda *_, found=found: found)
        assert look_for_filters(monkeypatch, ranks) == (("here", "part"), "cache here")
    assert [each and each.path for each in sent] == ["here", None]


def test_named_filters_are_taken_whatever_the_weights_are(monkeypatch, ranks):
    monkeypatch.setattr(runner_module, "given_file", lambda wanted, model, rank: FiltersFile(wanted, "", "given"))
    monkeypatch.setattr(runner_module, "cached_file", lambda model, weights, rank: 1 / 0)
    assert look_for_filters(monkeypatch, ranks, "model.safetensors") == (("model.safetensors", "part"), "given")


def test_filters_of_random_weights_are_neither_looked_for_nor_kept(monkeypatch, ranks):
    """Where nobody names any: they come from no file that could tell them from others."""
    for name in ("cached_file", "keep"):
        monkeypatch.setattr(runner_module, name, lambda *arguments: 1 / 0)
    monkeypatch.setattr(runner_module, "given_file", lambda wanted, model, rank: FiltersFile(wanted, "", "given"))
    warnings = []
    monkeypatch.setattr(runner_module.logger, "warning", warnings.append)
    filters, origin = look_for_filters(monkeypatch, ranks, load_format="dummy")
    assert "random weights of --load-format dummy" in warnings[0] and "config.filters" in warnings[0]
    assert filters == (STORED_RANK, "part") and origin.endswith("not kept, as the weights are random")
    assert look_for_filters(monkeypatch, ranks, "model.safetensors", "dummy")[1] == "given"
    assert look_for_filters(monkeypatch, ranks, load_format="dummy", rank=100)[0] == (100, "part")


class Group:
    """A rank of a group whose ranks are threads."""

    def __init__(self, rank_in_group: int, world_size: int, sent: dict[tuple[int, int], queue.Queue]) -> None:
        self.rank_in_group, self.world_size, self._sent = rank_in_group, world_size, sent
        self.is_first_rank = rank_in_group == 0

    def send_object(self, value: object, rank: int) -> None:
        self._sent[self.rank_in_group, rank].put(pickle.dumps(value))

    def recv_object(self, rank: int) -> object:
        return pickle.loads(self._sent[rank, self.rank_in_group].get(timeout=20))

    def broadcast_object(self, value: object, rank: int) -> object:
        if self.rank_in_group != rank:
            return self.recv_object(rank)
        for other in set(range(self.world_size)) - {rank}:
            self.send_object(value, other)
        return value


IS_HERE = load._is_here


def test_ranks_read_their_part_and_the_first_one_reads_for_those_without_the_file(path, monkeypatch):
    """Here ranks 2 and 3 run on a machine where another file lies, and none."""
    filters, model, whole_bytes = random_filters(), tiny_identity(), format.file_bytes(tiny_identity(), RANK)
    format.save(path, filters, model)
    found = given_file(str(path), model, 5)
    parts = [
        Part(layer_names(), heads=slice(head, head + 1), kv_heads=slice(head // 2, head // 2 + 1), rank=5)
        for head in range(NUM_HEADS)
    ]
    there = path.with_name("there")
    sent = {pair: queue.Queue() for pair in itertools.product(range(NUM_HEADS), repeat=2)}
    local, readers = threading.local(), []
    monkeypatch.setattr(load, "_is_here", lambda file: IS_HERE(dataclasses.replace(file, path=local.path)))
    monkeypatch.setattr(load, "load", lambda *arguments: readers.append(local.rank) or reader.load(*arguments))

    def run(rank: int) -> Filters:
        local.rank, local.path = rank, [str(path), str(path), str(there), str(path.with_name("nowhere"))][rank]
        return part_of(found, model, parts[rank], Group(rank, NUM_HEADS, sent))

    format.save(there, random_filters(seed=1), model)
    with concurrent.futures.ThreadPoolExecutor(NUM_HEADS) as threads:
        for part, own in zip(parts, threads.map(run, range(NUM_HEADS))):
            assert_same(own, filters.of(part))
            assert len(pickle.dumps(own)) < whole_bytes / 2
    assert sorted(readers) == [0, 0, 0, 1]


def test_new_weights_are_refused_where_filters_are_of_the_old_ones():
    def worker(method: str) -> CompressedWorker:
        class Worker(CompressedWorker, SimpleNamespace): ...

        compression = SimpleNamespace(entry=entry(method, None if method != "qfilters" else "static"))
        return Worker(model_runner=SimpleNamespace(compression=compression))

    with pytest.raises(ValueError, match="does not support reload_weights with filters"):
        worker("qfilters").reload_weights()
    with pytest.raises(ValueError, match="does not support update_weights with filters"):
        worker("qfilters").update_weights({})
    with pytest.raises(AttributeError, match="reload_weights"):  # goes on to vLLM's
        worker("streaming").reload_weights()
