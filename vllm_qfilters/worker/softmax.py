"""How the layers of a loaded model make attention of logits, for methods that score by queries."""

from collections.abc import Sequence

import torch
from vllm.model_executor.layers.attention import MLAAttention

from vllm_qfilters.kernels.ops import Softmax, in_groups_of, joined_heads
from vllm_qfilters.worker.caches import num_query_heads


def softmax_of(layers: Sequence[Sequence[torch.nn.Module]], device: torch.device) -> Softmax:
    """Reads it off vLLM's attention layers on this rank.

    Args:
        layers: those with a KV cache, in order, each followed by those that attend to it as well.

    Raises:
        ValueError: names two layers that scale or cap their logits differently.
    """
    every = [layer for attending in layers for layer in attending]
    first = every[0]
    scale, soft_cap = _scale_and_cap(first)
    for layer in every:
        if _scale_and_cap(layer) != (scale, soft_cap):
            raise ValueError(
                "KV compression supports one scale and one soft cap of attention logits in all layers: "
                f"{layer.layer_name} has {_scale_and_cap(layer)}, {first.layer_name} {(scale, soft_cap)}; choose a "
                "method that goes by keys and values alone, such as knorm or streaming"
            )
    group_sizes = [num_query_heads(attending) // attending[0].num_kv_heads for attending in layers]
    sinks = None
    if not isinstance(first, MLAAttention) and any(layer.impl.sinks is not None for layer in every):
        sinks = torch.stack([_sinks(attending, max(group_sizes), device) for attending in layers])
    differ = min(group_sizes) < max(group_sizes)
    return Softmax(scale, soft_cap, sinks, torch.tensor(group_sizes, device=device) if differ else None)


def _scale_and_cap(layer: torch.nn.Module) -> tuple[float, float]:
    if isinstance(layer, MLAAttention):
        return float(layer.impl.scale), 0.0
    return float(layer.impl.scale), float(layer.impl.logits_soft_cap or 0)


def _sinks(attending: Sequence[torch.nn.Module], group: int, device: torch.device) -> torch.Tensor:
    """Of the query heads of layers that attend to one cache, ``group`` of them for each KV head; -inf in layers
    without."""
    num_kv_heads = attending[0].num_kv_heads
    sinks = [
        torch.full((layer.num_heads,), float("-inf")) if layer.impl.sinks is None else layer.impl.sinks.detach()
        for layer in attending
    ]
    joined = joined_heads([of_layer.to(device, torch.float32) for of_layer in sinks], num_kv_heads)
    return in_groups_of(group, joined, num_kv_heads)
