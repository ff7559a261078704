"""Filters that follow the position: the statistics of the queries before RoPE, turned to the positions to come."""

import copy
from collections.abc import Sequence

import torch

from vllm_qfilters.filters.format import HORIZON, Filters, last
from vllm_qfilters.filters.rotary import Rotation
from vllm_qfilters.kernels.ops import Turns, in_groups_of


class FilterBank:
    """Per query head the mean of the coming queries, and the directions they vary in most.

    ``R_t q``, averaged over the ``HORIZON`` positions from n on, has the mean ``R_n f`` and the covariance
    ``R_n C R_n^T`` with f and C those from position 0 on: computed once, turned when needed. f follows from the mean of
    ``q`` before RoPE, and C comes in factors.

    Args:
        filters: with the statistics of the layers and heads of this rank.
        rotations: of each layer.
        heads: of them the query heads of this rank, by layer.
        num_kv_heads: of this rank.
        rank: factors of C to go by, 0 to head_size; the largest.
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
        mean, factors, second = filters.query_mean_before_rope, filters.query_factors, filters.query_second_before_rope
        if mean is None or (rank and factors is None and second is None):
            raise ValueError(
                "the filters hold no statistics of queries before RoPE (published ones do not): calibrate with "
                "`vllm-qfilters calibrate`, use filters 'auto', or choose filter 'static'"
            )
        by_rotation = layers_by_rotation(rotations)
        self.rotations = tuple(by_rotation)
        indices = {rotation: index for index, rotation in enumerate(self.rotations)}
        self._rotation_of_layer = torch.tensor([indices[rotation] for rotation in rotations])
        group = max(own.stop - own.start for own in heads) // num_kv_heads
        mean, factors, second = (
            whole
            if whole is None
            else torch.stack(
                [in_groups_of(group, layer[own], num_kv_heads) for layer, own in zip(whole, heads, strict=True)]
            )
            for whole in (mean, factors, second)
        )
        self.means = torch.empty_like(mean)
        for rotation, layers in by_rotation.items():
            self.means[layers] = scale * rotation.average_mean(mean[layers], HORIZON)
        rank = min(rank, mean.shape[-1])
        if rank == 0:
            factors = mean.new_empty(*mean.shape[:2], 0, mean.shape[-1])
        elif factors is None:  # a file before version 3
            factors = query_factors(mean, second, rotations, rank)
        self.factors = scale * factors[..., last(rank, factors.shape[2]), :].contiguous()

    def to(self, device: torch.device) -> "FilterBank":
        """The same bank, its tensors on ``device``, so that :meth:`turns` waits for nothing."""
        moved = copy.copy(self)
        moved.means, moved.factors = self.means.to(device), self.factors.to(device)
        moved.rotations = tuple(rotation.to(device) for rotation in self.rotations)
        moved._rotation_of_layer = self._rotation_of_layer.to(device)
        return moved

    def of_layers(self, layers: slice) -> "FilterBank":
        """The statistics of some layers."""
        part = copy.copy(self)
        part.means, part.factors = self.means[layers], self.factors[layers]
        part._rotation_of_layer = self._rotation_of_layer[layers]
        return part

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


def query_factors(mean: torch.Tensor, second: torch.Tensor, rotations: Sequence[Rotation], rank: int) -> torch.Tensor:
    """See :attr:`vllm_qfilters.filters.format.Filters.query_factors`.

    Args:
        mean, second: of queries before RoPE, shapes ``[num_layers, num_heads, head_size]`` and
            ``[num_layers, num_heads, head_size, head_size]``, float32.
        rotations: of each layer.
        rank: of the covariance, at most ``head_size``.
    """
    covariance = torch.empty_like(second)
    for rotation, layers in layers_by_rotation(rotations).items():
        _, covariance[layers] = rotation.average(mean[layers], second[layers], HORIZON)
    variances, directions = torch.linalg.eigh(covariance)  # ascending
    factors = directions.mT * variances.clamp(min=0).sqrt().unsqueeze(-1)
    return factors[..., last(rank, factors.shape[2]), :]


def layers_by_rotation(rotations: Sequence[Rotation]) -> dict[Rotation, list[int]]:
    """Indices of the layers that share each."""
    found: dict[Rotation, list[int]] = {}
    for layer, rotation in enumerate(rotations):
        found.setdefault(rotation, []).append(layer)
    return found
