"""What tensor parallel ranks decide together on GPUs, where no test runs: by vLLM's own communicator, in place."""

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
