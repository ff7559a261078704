"""What is learnt of queries and keys while token ids run through the model: running moments, and how queries turn."""

from collections.abc import Sequence

import torch

from vllm_qfilters.filters.rotary import Rotation
from vllm_qfilters.kernels.ops import joined_heads


class Moments:
    """Mean and second moment of vectors per head. No sample is kept.

    Args:
        num_heads: heads.
        head_size: elements per vector.
    """

    def __init__(self, num_heads: int, head_size: int) -> None:
        self.count = 0
        self._sum = torch.zeros(num_heads, head_size, dtype=torch.float64)
        self._outer = torch.zeros(num_heads, head_size, head_size, dtype=torch.float64)

    def add(self, vectors: torch.Tensor) -> None:
        """vectors: shape ``[num_tokens, num_heads, head_size]``, float32."""
        by_head = vectors.transpose(0, 1)  # [num_heads, num_tokens, head_size]
        self.count += vectors.shape[0]
        self._sum += by_head.sum(1).cpu()
        self._outer += torch.bmm(by_head.transpose(1, 2), by_head).cpu()

    @property
    def mean(self) -> torch.Tensor:
        """float32, shape ``[num_heads, head_size]``."""
        return (self._sum / self.count).to(torch.float32)

    @property
    def second(self) -> torch.Tensor:
        """Uncentred second moment E[v v^T], float32, shape ``[num_heads, head_size, head_size]``."""
        return (self._outer / self.count).to(torch.float32)


class LayerStatistics:
    """What calibration learns of one attention layer and of those that attend to its keys as well.

    Args:
        num_heads: query heads on this rank, of all layers that attend to its keys.
        num_kv_heads: KV heads on this rank.
        head_size: elements per head.
        rotation: of the layer.
        positions: the model runner's buffer of positions; at a forward pass it starts with those of the step's tokens.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        rotation: Rotation,
        positions: torch.Tensor,
    ) -> None:
        self.query_before_rope = Moments(num_heads, head_size)
        self.query_after_rope = Moments(num_heads, head_size)
        self.key_after_rope = Moments(num_kv_heads, head_size)
        self.rotation = rotation
        self._positions = positions

    def observe(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """query, key: after RoPE, shape ``[num_tokens, heads, head_size]``."""
        query = query.to(torch.float32)
        self.query_before_rope.add(self.rotation.unrotate(query, self._positions[: query.shape[0]]))
        self.query_after_rope.add(query)
        self.key_after_rope.add(key.to(torch.float32))


class JoinedLayers:
    """Shows one watcher the queries of all layers that attend to the same keys, as if one layer had made them.

    Args:
        watcher: of them.
        num_layers: of which each observes once in every step.
        num_kv_heads: on this rank.
    """

    def __init__(self, watcher: "LayerStatistics | QuerySpread", num_layers: int, num_kv_heads: int) -> None:
        self._watcher, self._num_layers, self._num_kv_heads = watcher, num_layers, num_kv_heads
        self._queries: list[torch.Tensor] = []
        self._key: torch.Tensor | None = None

    def observe(self, query: torch.Tensor, key: torch.Tensor | None) -> None:
        """See :meth:`LayerStatistics.observe`. The first layer alone has a key."""
        is_last = len(self._queries) + 1 == self._num_layers
        if key is not None:
            self._key = key if is_last else key.clone()
        # A compiled model writes to this memory again before the last layer runs.
        self._queries.append(query if is_last else query.clone())
        if is_last:
            assert self._key is not None, "the layer that has the cache runs first"
            self._watcher.observe(joined_heads(self._queries, self._num_kv_heads, dim=1), self._key)
            self._queries, self._key = [], None


class QuerySpread:
    """How much the queries of one layer differ from position to position, taken off one rotation or another.

    The last queries alone: the first ones differ where heads may attend to nothing (attention sinks of GPT-OSS).

    Args:
        rotations: that may be the layer's.
        positions: as of :class:`LayerStatistics`.
    """

    NUM_QUERIES = 32

    def __init__(self, rotations: Sequence[Rotation], positions: torch.Tensor) -> None:
        self._rotations = rotations
        self._positions = positions
        self._queries = [torch.empty(0)] * len(rotations)  # each [NUM_QUERIES, num_heads, head_size], on the CPU

    def observe(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """See :meth:`LayerStatistics.observe`."""
        positions = self._positions[: query.shape[0]][-self.NUM_QUERIES :]
        for index, rotation in enumerate(self._rotations):
            unrotated = rotation.unrotate(query[-self.NUM_QUERIES :], positions).cpu()
            self._queries[index] = torch.cat((self._queries[index], unrotated))[-self.NUM_QUERIES :]

    def relative(self) -> torch.Tensor:
        """Root mean square of what is not their mean, over that of the queries: float32, shape ``[len(rotations)]``, on
        the CPU.
        """
        least = torch.finfo(torch.float32).tiny
        return torch.stack([(each - each.mean(0)).norm() / each.norm().clamp(min=least) for each in self._queries])
