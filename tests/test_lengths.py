"""What a worker knows of resident lengths, and the kernel that computes slots and lengths, against loops."""

import random

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.paged import DEVICE
from vllm_qfilters.kernels.triton.slots import compute_slots_and_lengths
from vllm_qfilters.worker.lengths import DeviceResidentLengths, ResidentLengths


def metadata_of(lengths: list[int]) -> CommonAttentionMetadata:
    start = torch.arange(len(lengths) + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=len(lengths),
        max_query_len=1,
        max_seq_len=max(lengths),
        block_table_tensor=torch.zeros(len(lengths), 1, dtype=torch.int32),
        slot_mapping=torch.zeros(len(lengths), dtype=torch.int64),
    )


def test_attention_sees_resident_lengths_in_compressed_groups_alone():
    lengths = ResidentLengths(compressed=(True, False))
    lengths.add("b", 32)
    lengths.add("b", 64)
    lengths.start_step(["a", "b"])
    metadata = metadata_of([100, 200, 0])  # one more row, of padding
    resident = lengths.resident(metadata, group=0)
    assert resident.seq_lens.tolist() == resident.seq_lens_cpu_upper_bound.tolist() == [100, 104, 0]
    assert resident.max_seq_len == 104 and metadata.seq_lens.tolist() == [100, 200, 0]
    assert lengths.resident(metadata, group=1) is metadata


@pytest.mark.parametrize("end", ["forgotten", "skipped", "others"])
def test_nothing_is_subtracted_where_nothing_was_evicted(end):
    lengths = ResidentLengths()
    lengths.add("b", 32)
    lengths.start_step(["a"] if end == "others" else ["b"])
    if end == "forgotten":
        lengths.forget(["b"])
        lengths.start_step(["b"])
    elif end == "skipped":
        lengths.skip_step()
    metadata = metadata_of([100])
    positions = torch.arange(90, 100)
    assert lengths.resident(metadata, group=0) is metadata
    assert lengths.shifted(positions, torch.tensor([0, 10])) is positions


def test_tokens_stand_behind_those_that_are_held():
    lengths = ResidentLengths()
    lengths.add("b", 96)
    lengths.start_step(["a", "b", "c"])
    positions = torch.tensor([7, 200, 201, 202, 50])
    assert lengths.shifted(positions, torch.tensor([0, 1, 4, 5])).tolist() == [7, 104, 105, 106, 50]


def test_lengths_on_a_device_stay_where_graphs_read_them():
    lengths = DeviceResidentLengths((True,), max_num_reqs=4, device=DEVICE)
    captured = lengths.resident(metadata_of([7, 9]), group=0)  # before any step, as when a graph is captured
    assert captured.seq_lens.tolist() == [7, 9]
    lengths.add("a", 32)
    lengths.start_step(["a", "b"])
    lengths._lengths[0, :2] = torch.tensor([68, 9], device=DEVICE)  # the kernel's part
    resident = lengths.resident(metadata_of([100, 9]), group=0)
    assert resident.seq_lens.data_ptr() == captured.seq_lens.data_ptr() and resident.seq_lens.tolist() == [68, 9]
    assert resident.seq_lens_cpu_upper_bound.tolist() == [68, 9] and resident.max_seq_len == 68


@pytest.mark.parametrize("seed", range(4))
def test_slots_and_lengths_are_those_of_resident_tokens(seed):
    """Two groups of pages of different sizes, the second of which is not compressed; one request owns no pages."""
    numbers = random.Random(seed)
    block_sizes, compressed, max_tokens, max_reqs = (16, 32), (1, 0), 90, 8
    tables = [torch.randint(1, 500, (10, 40), dtype=torch.int32, device=DEVICE) for _ in block_sizes]
    idx_mapping = [*numbers.sample(range(10), 4), -1]
    num_tokens = [1, numbers.randint(2, 20), 1, numbers.randint(2, 20), 1]
    evicted = [32 * numbers.randint(0, 4) for _ in num_tokens]
    ends = [gone + count + numbers.randint(0, 300) for gone, count in zip(evicted, num_tokens, strict=True)]
    positions, start = [], [0]
    for end, count in zip(ends, num_tokens, strict=True):
        positions += range(end - count, end)
        start.append(start[-1] + count)
    slots = torch.full((2, max_tokens), 7, dtype=torch.int64, device=DEVICE)
    lengths = torch.full((2, max_reqs), 7, dtype=torch.int32, device=DEVICE)

    def on_device(values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    compute_slots_and_lengths(
        on_device(idx_mapping, torch.int64),
        on_device(start),
        on_device(positions + [0] * 9, torch.int64),
        on_device(evicted),
        on_device(compressed),
        on_device([table.data_ptr() for table in tables], torch.uint64),
        on_device([table.stride(0) for table in tables], torch.int64),
        on_device(block_sizes),
        on_device([True, True], torch.bool),
        slots,
        lengths,
    )
    for group, (table, block_size, is_compressed) in enumerate(zip(tables, block_sizes, compressed, strict=True)):
        expected = []
        for request, row in enumerate(idx_mapping):
            for position in positions[start[request] : start[request + 1]]:
                place = position - evicted[request] * is_compressed
                page = int(table[row, place // block_size])
                expected.append(page * block_size + place % block_size if row >= 0 else -1)
        assert slots[group].tolist() == expected + [-1] * (max_tokens - len(expected))
        resident = [end - gone * is_compressed for end, gone in zip(ends, evicted, strict=True)]
        assert lengths[group].tolist() == resident + [0] * (max_reqs - len(resident))
