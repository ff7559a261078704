"""Filters that follow the position: the statistics of the queries before RoPE, turned to the positions to come."""

from collections.abc import Sequence

import torch

from vllm_qfilters.filters.format import Filters
from vllm_qfilters.filters.rotary import Rotation

HORIZON = 128  # coming positions a filter is averaged over; 128 and 512 lose the same (measured)


class FilterBank:
    """Per query head the mean of the coming queries, and the directions they vary in most.

    Calibration gives mean and second moment of ``q`` before RoPE. ``R_t q``, averaged over the ``HORIZON`` positions
    from n on, has the mean ``R_n f`` and the covariance ``R_n C R_n^T`` with f and C those from position 0 on: computed
    once, turned when needed.

    Args:
        filters: with the statistics of the whole model.
        rotations: of each layer.
        heads: the query heads of this rank.
        rank: eigenvectors of C kept, 0 to head_size.
        scale: of the attention's logits, usually ``head_size ** -0.5``.

    Attributes:
        rotations: of each layer.
        means: ``scale * f``, shape ``[num_layers, num_heads, head_size]``, float32.
        factors: ``scale * sqrt(eigenvalue) * eigenvector`` of C, the largest last, shape
            ``[num_layers, num_heads, rank, head_size]``.

    Raises:
        ValueError: the filters come without statistics, as published ones do.
    """

    def __init__(self, filters: Filters, rotations: Sequence[Rotation], heads: slice, rank: int, scale: float) -> None:
        if filters.query_mean_before_rope is None or filters.query_second_before_rope is None:
            raise ValueError(
                "the filters hold no statistics of queries before RoPE (published ones do not): calibrate with "
                "`vllm-qfilters calibrate`, use filters 'auto', or choose filter 'static'"
            )
        self.rotations = tuple(rotations)
        self._layers_by_rotation: dict[Rotation, list[int]] = {}
        for layer, rotation in enumerate(rotations):
            self._layers_by_rotation.setdefault(rotation, []).append(layer)
        self.means = filters.query_mean_before_rope[:, heads].clone()
        second = filters.query_second_before_rope[:, heads].clone()
        for rotation, layers in self._layers_by_rotation.items():
            self.means[layers], second[layers] = rotation.average(self.means[layers], second[layers], HORIZON)
        head_size = self.means.shape[-1]
        values, vectors = torch.linalg.eigh(second)  # ascending
        factors = vectors.mT * values.clamp(min=0).sqrt().unsqueeze(-1)
        self.factors = scale * factors[..., head_size - min(rank, head_size) :, :].contiguous()
        self.means *= scale

    def at(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and factors for the queries from ``position`` on."""
        if len(self._layers_by_rotation) == 1:
            (rotation,) = self._layers_by_rotation
            return rotation.rotate(self.means, position), rotation.rotate(self.factors, position)
        means, factors = self.means.clone(), self.factors.clone()
        for rotation, layers in self._layers_by_rotation.items():
            means[layers] = rotation.rotate(means[layers], position)
            factors[layers] = rotation.rotate(factors[layers], position)
        return means, factors
