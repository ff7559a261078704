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
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=get_tp_group().device_group)
    return values
