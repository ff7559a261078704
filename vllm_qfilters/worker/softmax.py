"""How the layers of a loaded model make attention of logits, for methods that score by queries."""

from collections.abc import Sequence

import torch
from vllm.model_executor.layers.attention import MLAAttention

from vllm_qfilters.kernels.ops import Softmax, in_groups_of


def softmax_of(layers: Sequence[torch.nn.Module], device: torch.device) -> Softmax:
    """Reads it off vLLM's attention layers, in order, on this rank.

    Raises:
        ValueError: names two layers that scale or cap their logits differently.
    """
    first = layers[0]
    scale, soft_cap = _scale_and_cap(first)
    for layer in layers:
        if _scale_and_cap(layer) != (scale, soft_cap):
            raise ValueError(
                "KV compression supports one scale and one soft cap of attention logits in all layers: "
                f"{layer.layer_name} has {_scale_and_cap(layer)}, {first.layer_name} {(scale, soft_cap)}; choose a "
                "method that goes by keys and values alone, such as knorm or streaming"
            )
    group_sizes = [layer.num_heads // layer.num_kv_heads for layer in layers]
    sinks = None
    if not isinstance(first, MLAAttention) and any(layer.impl.sinks is not None for layer in layers):
        sinks = torch.stack([_sinks(layer, max(group_sizes), device) for layer in layers])
    differ = min(group_sizes) < max(group_sizes)
    return Softmax(scale, soft_cap, sinks, torch.tensor(group_sizes, device=device) if differ else None)


def _scale_and_cap(layer: torch.nn.Module) -> tuple[float, float]:
    if isinstance(layer, MLAAttention):
        return float(layer.impl.scale), 0.0
    return float(layer.impl.scale), float(layer.impl.logits_soft_cap or 0)


def _sinks(layer: torch.nn.Module, group: int, device: torch.device) -> torch.Tensor:
    """Of the query heads of a layer, ``group`` of them for each KV head; -inf in layers without."""
    if layer.impl.sinks is None:
        return torch.full((layer.num_kv_heads * group,), float("-inf"), device=device)
    return in_groups_of(group, layer.impl.sinks.detach().to(device, torch.float32), layer.num_kv_heads)
