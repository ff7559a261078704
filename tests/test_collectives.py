"""What tensor parallel ranks decide together: the most by vLLM's own communicator, in place, and means over copies."""

from types import SimpleNamespace

import pytest
import torch

from vllm_qfilters.worker import collectives

MAX = torch.distributed.ReduceOp.MAX


@pytest.mark.parametrize("disabled", [False, True, None], ids=["NCCL", "disabled", "none, as on CPUs"])
def test_the_most_of_all_ranks(disabled, monkeypatch):
    """PyTorch's group would make an NCCL communicator of its own, beside the memory that vLLM has measured."""
    calls = []
    nccl = SimpleNamespace(disabled=disabled, all_reduce=lambda *args, op: calls.append(("vllm", *args, op)))
    communicator = SimpleNamespace() if disabled is None else SimpleNamespace(pynccl_comm=nccl)
    group = SimpleNamespace(device_communicator=communicator, device_group="group")
    monkeypatch.setattr(collectives, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(collectives, "get_tp_group", lambda: group)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda values, op, group: calls.append(("torch", values, op, group))
    )
    values = torch.ones(2)
    assert collectives.max_over_ranks(values) is values
    assert calls == [("vllm", values, values, MAX) if disabled is False else ("torch", values, MAX, "group")]


@pytest.mark.parametrize("num_ranks, num_kv_heads", [(1, 1), (2, 1), (2, 2), (4, 2), (2, 6)])
def test_ranks_take_the_mean_of_the_heads_that_they_hold_copies_of(num_ranks, num_kv_heads, monkeypatch):
    copies, values = (
        max(1, num_ranks // num_kv_heads),
        torch.rand(num_ranks, 5, generator=torch.Generator().manual_seed(0)),
    )
    sent = [[] for _ in range(num_ranks)]  # by rank: a tensor for each time it takes part
    monkeypatch.setattr(collectives, "get_tensor_model_parallel_world_size", lambda: num_ranks)

    def of(rank: int, all_reduce) -> torch.Tensor:
        monkeypatch.setattr(collectives, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(collectives, "tensor_model_parallel_all_reduce", all_reduce)
        return collectives.mean_over_copies(values[rank], num_kv_heads)

    for rank in range(num_ranks):
        of(rank, lambda tensor, rank=rank: sent[rank].append(tensor) or tensor)
    assert {len(tensors) for tensors in sent} == {num_kv_heads if copies > 1 else 0}
    for rank in range(num_ranks):
        sums, first = iter([sum(tensors) for tensors in zip(*sent, strict=True)]), rank // copies * copies
        found = of(rank, lambda _, sums=sums: next(sums))
        torch.testing.assert_close(found, values[first : first + copies].mean(0))
