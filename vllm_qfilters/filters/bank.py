"""Filters that follow the position: the statistics of the queries before RoPE, turned to the positions to come."""

import copy
from collections.abc import Sequence

import torch

from vllm_qfilters.filters.format import Filters
from vllm_qfilters.filters.rotary import Rotation
from vllm_qfilters.kernels.ops import Turns, in_groups_of

HORIZON = 128  # coming positions a filter is averaged over; 128 and 512 lose the same (measured)


class FilterBank:
    """Per query head the mean of the coming queries, and the directions they vary in most.

    Calibration gives mean and second moment of ``q`` before RoPE. ``R_t q``, averaged over the ``HORIZON`` positions
    from n on, has the mean ``R_n f`` and the covariance ``R_n C R_n^T`` with f and C those from position 0 on: computed
    once, turned when needed.

    Args:
        filters: with the statistics of the whole model.
        rotations: of each layer.
        heads: the query heads of this rank, by layer.
        num_kv_heads: of this rank.
        rank: eigenvectors of C kept, 0 to head_size.
        scale: of the attention's logits, usually ``head_size ** -0.5``.

    Attributes:
        rotations: the different ones.
        means: ``scale * f``, shape ``[num_layers, num_heads, head_size]``, float32; where layers have fewer query heads
            than others, zeros stand behind those of each KV head.
        factors: ``scale * sqrt(eigenvalue) * eigenvector`` of C, the largest last, shape
            ``[num_layers, num_heads, rank, head_size]``.

    Raises:
        ValueError: the filters come without statistics, as published ones do.
    """

    def __init__(
        self,
        filters: Filters,
        rotations: Sequence[Rotation],
        heads: Sequence[slice],
        num_kv_heads: int,
        rank: int,
        scale: float,
    ) -> None:
        if filters.query_mean_before_rope is None or filters.query_second_before_rope is None:
            raise ValueError(
                "the filters hold no statistics of queries before RoPE (published ones do not): calibrate with "
                "`vllm-qfilters calibrate`, use filters 'auto', or choose filter 'static'"
            )
        layers_by_rotation: dict[Rotation, list[int]] = {}
        for layer, rotation in enumerate(rotations):
            layers_by_rotation.setdefault(rotation, []).append(layer)
        self.rotations = tuple(layers_by_rotation)
        indices = {rotation: index for index, rotation in enumerate(self.rotations)}
        self._rotation_of_layer = torch.tensor([indices[rotation] for rotation in rotations])
        group = max(own.stop - own.start for own in heads) // num_kv_heads
        self.means, second = (
            torch.stack(
                [in_groups_of(group, layer[own], num_kv_heads) for layer, own in zip(whole, heads, strict=True)]
            )
            for whole in (filters.query_mean_before_rope, filters.query_second_before_rope)
        )
        for rotation, layers in layers_by_rotation.items():
            self.means[layers], second[layers] = rotation.average(self.means[layers], second[layers], HORIZON)
        head_size = self.means.shape[-1]
        values, vectors = torch.linalg.eigh(second)  # ascending
        factors = vectors.mT * values.clamp(min=0).sqrt().unsqueeze(-1)
        self.factors = scale * factors[..., head_size - min(rank, head_size) :, :].contiguous()
        self.means *= scale

    def to(self, device: torch.device) -> "FilterBank":
        """The same bank, its tensors on ``device``, so that :meth:`turns` waits for nothing."""
        moved = copy.copy(self)
        moved.means, moved.factors = self.means.to(device), self.factors.to(device)
        moved.rotations = tuple(rotation.to(device) for rotation in self.rotations)
        moved._rotation_of_layer = self._rotation_of_layer.to(device)
        return moved

    def turns(self, positions: torch.Tensor) -> Turns:
        """What turns means and factors to the queries from ``positions`` on.

        Args:
            positions: shape ``[num_sequences]``, int64, on the device of the bank.
        """
        tables = [rotation.table(positions) for rotation in self.rotations]
        cos, sin = (
            torch.stack(part, dim=1) for part in zip(*tables, strict=True)
        )  # [num_sequences, num_rotations, head_size]
        length = (cos.square() + sin.square()).sqrt()
        cos, sin = cos / length, sin / length
        if len(tables) == 1:
            num_layers = self.means.shape[0]
            cos, sin = (part.expand(-1, num_layers, -1) for part in (cos, sin))
            return Turns(cos, sin, self.rotations[0].partner[None])
        partner = torch.stack([rotation.partner for rotation in self.rotations])[self._rotation_of_layer]
        return Turns(cos[:, self._rotation_of_layer], sin[:, self._rotation_of_layer], partner)
