"""Tensor parallel ranks hold other heads of the same layers. Here they decide together: each gets the same result."""

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group, tensor_model_parallel_all_reduce


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    if get_tensor_model_parallel_world_size() == 1:
        return values
    return tensor_model_parallel_all_reduce(values) / get_tensor_model_parallel_world_size()


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Written to ``values``, which is contiguous."""
    if get_tensor_model_parallel_world_size() > 1:
        group, op = get_tp_group(), torch.distributed.ReduceOp.MAX
        # PyTorch's group would set up an NCCL communicator of its own here, beside the memory that vLLM has measured.
        nccl = getattr(group.device_communicator, "pynccl_comm", None)
        if nccl is not None and not nccl.disabled:
            nccl.all_reduce(values, values, op=op)
        else:
            torch.distributed.all_reduce(values, op, group=group.device_group)
    return values
