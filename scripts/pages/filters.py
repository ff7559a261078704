"""What a filters file holds, and how many bytes that takes: parts of docs/filters.md."""

import math
from collections.abc import Callable

from scripts.pages.markdown import table
from vllm_qfilters.filters.format import PUBLISHED_NAME, STORED_RANK, ModelIdentity, file_bytes
from vllm_qfilters.filters.reader import shapes_before_version_3

MODELS = {  # layers, query heads, KV heads, head size
    "Llama-3-8B": (32, 32, 8, 128),
    "Qwen3-32B": (64, 64, 8, 128),
    "Llama-3.1-405B": (126, 128, 8, 128),
}
_MIB = 1 << 20


def identities() -> list[ModelIdentity]:
    """The models of the table, as far as a file's size depends on them."""
    return [ModelIdentity(name, "", *shape, rope={}) for name, shape in MODELS.items()]


def tensors() -> str:
    """Every tensor of a file, with its bytes in some models."""
    rows = [
        _row(
            f"`{PUBLISHED_NAME}`", "layers, KV heads, head size", lambda m: m.num_layers * m.num_kv_heads * m.head_size
        ),
        *(
            _row(f"`LAYER.{name}`", "KV heads", lambda m: m.num_layers * m.num_kv_heads)
            for name in ("score_mean", "score_std")
        ),
        _row(
            "`LAYER.query_mean_before_rope`",
            "heads, head size",
            lambda m: m.num_layers * m.num_heads * m.head_size,
        ),
        _row(
            "`LAYER.query_factors`",
            f"heads, rank {STORED_RANK}, head size",
            lambda m: m.num_layers * m.num_heads * STORED_RANK * m.head_size,
        ),
        ["all of version 3", "", *(_mib(file_bytes(model)) for model in identities())],
        _row("all of version 2", "", lambda m: sum(map(math.prod, shapes_before_version_3(m).values()))),
    ]
    return table(["tensor, float32", "shape", *(f"{name}, MiB" for name in MODELS)], rows)


def _row(name: str, shape: str, count: Callable[[ModelIdentity], int]) -> list[str]:
    """count: numbers in all layers of a model."""
    return [name, shape, *(_mib(4 * count(model)) for model in identities())]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.0f}" if num_bytes >= 100 * _MIB else f"{num_bytes / _MIB:.3g}"
