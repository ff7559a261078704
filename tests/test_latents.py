"""Caches of latents (MLA): keys without values, and token stats in memory of their own."""

import dataclasses

import pytest
import torch

from tests.paged import CPU, DEVICE, Eviction, Geometry, Sequences, random_tensor
from vllm_qfilters.kernels import IMPLEMENTATION, REFERENCE_OPS, PagedCache, cpp, probe_page_layout, reference
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.kernels.ops import TokenStat

GEOMETRY = Geometry(num_layers=2, num_kv_heads=1, head_size=72, num_planes=0, value_size=0)
VALUE_SIZE = 64
EVICTIONS = [Eviction(150, 48, 5, 37), Eviction(96, 32, 4, 32), Eviction(160, 48, 21, 30), Eviction(100, 32, 4, 64)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

needs_library = pytest.mark.skipif(IMPLEMENTATION != "C++", reason="the C++ operators are not built")


def write_keys(key, value, kv_cache, slot_mapping):
    kv_cache.view(-1, key.shape[-1])[slot_mapping] = key[:, 0]


def planes_of(cache, num_planes: int) -> torch.Tensor:
    return random_tensor(cache.num_layers, cache.num_blocks, num_planes, 1, cache.block_size, seed=5)


def paged(sequences: Sequences, num_planes: int) -> PagedCache:
    """The cache as CPUs see it."""
    cache = sequences.cache
    layout = probe_page_layout(write_keys, cache.block_size, cache.head_size, cache.key_values.dtype, value_size=0)
    planes = planes_of(cache, num_planes).to(CPU)
    return PagedCache(sequences.views, layout, num_planes, planes=planes, latent_size=VALUE_SIZE)


def strided(sequences: Sequences, num_planes: int) -> StridedCache:
    """The cache as GPUs see it."""
    planes = planes_of(sequences.cache, num_planes)
    return StridedCache(sequences.views, num_planes, value_size=0, planes=planes, latent_size=VALUE_SIZE)


def is_kept_of(cache, eviction: Eviction, seed: int) -> torch.Tensor:
    scores = torch.randn(cache.num_layers, 1, eviction.resident, generator=torch.Generator().manual_seed(seed))
    return reference.select_kept(scores, eviction.kept, eviction.sinks, eviction.window, shared_by_heads=True)


def test_keys_have_no_values():
    cache = paged(Sequences(EVICTIONS, GEOMETRY, seed=0, device=CPU), num_planes=0)
    assert torch.equal(cache.layout.keys, torch.arange(16 * 72).view(16, 72)) and cache.layout.values.shape == (16, 0)
    keys, values = cache.read(*(torch.tensor([index]) for index in (1, 3, 0, 5)))
    assert torch.equal(keys, cache.pages[1, 3, 0, 5 * 72 : 6 * 72][None]) and values.shape == (1, 0)


def test_the_value_of_a_token_is_the_first_part_of_its_key():
    sequences = Sequences(EVICTIONS, GEOMETRY, seed=0, device=CPU)
    pages, resident = sequences.old_pages[0], EVICTIONS[0].resident
    for cache in (paged(sequences, num_planes=0), strided(sequences, num_planes=0)):
        keys, values = (read(1, pages, resident) for read in (cache.resident_keys, cache.resident_values))
        assert values.shape == (1, resident, VALUE_SIZE) and torch.equal(values, keys[..., :VALUE_SIZE])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_planes", [0, 2])
def test_csrc_moves_the_same_bytes_as_the_reference(num_planes, dtype):
    found = []
    for module in (reference, cpp):
        sequences = Sequences(EVICTIONS, dataclasses.replace(GEOMETRY, dtype=DTYPES[dtype]), num_planes, device=CPU)
        cache = paged(sequences, num_planes)
        for index, eviction in enumerate(EVICTIONS):
            pages = sequences.old_pages[index], sequences.new_pages[index]
            module.compact(cache, *pages, is_kept_of(cache, eviction, index), eviction.window)
        found.append((sequences.buffer, cache.planes))
    assert all(map(torch.equal, *found))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_csrc_finds_values_as_distinct_and_as_long_as_the_reference(dtype):
    sequences = Sequences(EVICTIONS, dataclasses.replace(GEOMETRY, dtype=DTYPES[dtype]), seed=1, device=CPU)
    sequences.cache.key_values.copy_(random_tensor(*sequences.cache.key_values.shape, seed=2))
    cache = paged(sequences, num_planes=0)
    for index, eviction in enumerate(EVICTIONS):
        found, expected = (
            module.distinctness(cache, sequences.old_pages[index], eviction.resident, True, 7)
            for module in (cpp, reference)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        found, expected = (
            module.value_norms(cache, sequences.old_pages[index], eviction.resident) for module in (cpp, reference)
        )
        torch.testing.assert_close(found, expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("layout", ["LBNHC", "BLNHC"])
@pytest.mark.parametrize(("dtype", "num_planes"), [("bf16", 0), ("bf16", 2), ("fp32", 2)])
def test_triton_matches_the_reference(dtype, num_planes, layout):
    from vllm_qfilters.kernels.triton.compaction import compact, copy_pages
    from vllm_qfilters.kernels.triton.distinctness import distinctness
    from vllm_qfilters.kernels.triton.value_norms import value_norms

    geometry = dataclasses.replace(GEOMETRY, dtype=DTYPES[dtype], layout=layout)
    fast, slow = (Sequences(EVICTIONS, geometry, seed=3) for _ in range(2))
    for sequences in (fast, slow):
        sequences.cache.key_values.copy_(random_tensor(*sequences.cache.key_values.shape, seed=2))
    fast_cache, slow_cache = (strided(sequences, num_planes) for sequences in (fast, slow))
    flat = distinctness(fast_cache, fast.batch, True, 7)
    for index, found in enumerate(fast.batch.split(flat, 2, 1)):
        expected = reference.distinctness(slow_cache, slow.old_pages[index], EVICTIONS[index].resident, True, 7)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for index, found in enumerate(fast.batch.split(value_norms(fast_cache, fast.batch), 2, 1)):
        expected = reference.value_norms(slow_cache, slow.old_pages[index], EVICTIONS[index].resident)
        torch.testing.assert_close(found, expected, atol=0, rtol=1e-5)

    kept = [is_kept_of(fast_cache, eviction, index) for index, eviction in enumerate(EVICTIONS)]
    copy_pages(fast_cache, fast.batch)
    flat = torch.cat([of_sequence.flatten() for of_sequence in kept]).to(DEVICE, torch.int8)
    compact(fast_cache, fast.batch, flat, num_selections=1)
    for index, eviction in enumerate(EVICTIONS):
        pages = slow.old_pages[index], slow.new_pages[index]
        reference.compact(slow_cache, *pages, kept[index].to(DEVICE), eviction.window)
    assert torch.equal(fast.buffer, slow.buffer) and torch.equal(fast_cache.planes, slow_cache.planes)


@pytest.mark.parametrize("stat", [TokenStat.NEGATIVE_KEY_NORM, TokenStat.PROJECTION])
@pytest.mark.parametrize("num_tokens", [1, 40, 600])
def test_triton_writes_token_stats_of_keys_that_vllm_has_written(num_tokens, stat):
    from vllm_qfilters.kernels.triton import TritonOps

    key = random_tensor(num_tokens, 1, 72, seed=1, dtype=torch.bfloat16)
    value, filters = key[..., :VALUE_SIZE], random_tensor(1, 72, seed=2)
    slots = torch.randperm(50 * 16, generator=torch.Generator().manual_seed(3))[:num_tokens].to(DEVICE)
    slots[::7] = -1
    found, expected = (random_tensor(50, 1, 1, 16, seed=4) for _ in range(2))
    TritonOps().write(stat, key, value, None, found, slots, filters)
    REFERENCE_OPS.write(stat, key, value, None, expected, slots, filters)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert num_tokens == 1 or not torch.equal(found, random_tensor(50, 1, 1, 16, seed=4))
