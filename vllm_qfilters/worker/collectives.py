"""Tensor parallel ranks hold other heads of the same layers. Here they decide together: each gets the same result."""

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_reduce,
)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    if get_tensor_model_parallel_world_size() == 1:
        return values
    return tensor_model_parallel_all_reduce(values) / get_tensor_model_parallel_world_size()


def mean_over_copies(values: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """The mean over the ranks that hold copies of the same KV heads, of which the model has fewer than there are ranks:
    as with MLA, where it has one. Their query heads are different ones.

    Args:
        values: of the KV heads of this rank, any shape.
        num_kv_heads: of the whole model. Neighbouring ranks hold copies of one.
    """
    num_ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    if num_ranks <= num_kv_heads:
        return values
    num_copies, mean = num_ranks // num_kv_heads, values
    for head in range(num_kv_heads):  # one after the other takes less memory
        is_own = head == rank // num_copies
        total = tensor_model_parallel_all_reduce(values if is_own else torch.zeros_like(values))
        if is_own:
            mean = total / num_copies
    return mean


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
