"""Which layers attend to which KV cache: in some models later layers have none and attend to an earlier one's (Gemma 4
E2B)."""

from collections.abc import Mapping
from typing import Any


def layers_by_cache(layers: Mapping[str, Any]) -> dict[str, list[Any]]:
    """By the name of each layer that has a KV cache of its own: that layer, and those that attend to it as well.

    Args:
        layers: vLLM's, by name, in the order in which they run.
    """
    found = {name: [layer] for name, layer in layers.items() if _target(layer) is None}
    for layer in layers.values():
        target = _target(layer)
        if target is not None:
            found[target].append(layer)
    return found


def num_query_heads(attending: list[Any]) -> int:
    """Of the layers that attend to one cache, on this rank."""
    return sum(layer.num_heads for layer in attending)


def _target(layer: Any) -> str | None:
    return getattr(layer, "kv_sharing_target_layer_name", None)
