"""A model's own rotary position embedding as a linear map: on queries, off them again, and averaged over positions to
come.
"""

import copy
import dataclasses

import torch
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import Phi3LongRoPEScaledRotaryEmbedding


@dataclasses.dataclass(frozen=True)
class RotaryTable:
    """What :class:`Rotation` reads of a rotary embedding, for those that are not vLLM's.

    Attributes:
        rotary_dim: elements of a head that are rotated.
        is_neox_style: the halves of them belong together, else each two that stand side by side.
        cos_sin_cache: float32, shape ``[num_positions, rotary_dim]``, the cosines first.
    """

    rotary_dim: int
    is_neox_style: bool
    cos_sin_cache: torch.Tensor

    @classmethod
    def both_styles(cls, rotary_emb: torch.nn.Module, num_positions: int) -> "list[RotaryTable]":
        """Of a rotary embedding of Transformers, which serves models that vLLM has no implementation of: it does not
        say how its cosines and sines are applied. None where they depend on more than the position.

        Raises:
            AttributeError: it is none of them.
        """
        rope_type = rotary_emb.rope_type
        if not isinstance(rope_type, str) or "dynamic" in rope_type or rope_type == "longrope":
            return []
        inv_freq = rotary_emb.inv_freq.to(torch.float32)
        angles = torch.arange(num_positions, device=inv_freq.device).unsqueeze(1) * inv_freq
        table = rotary_emb.attention_scaling * torch.cat((angles.cos(), angles.sin()), dim=-1)
        return [cls(table.shape[1], is_neox_style, table) for is_neox_style in (True, False)]

    @classmethod
    def of_longrope(cls, rotary_emb: Phi3LongRoPEScaledRotaryEmbedding) -> "RotaryTable":
        """Of Phi-3 with a long context, in vLLM: of its two tables, which lie one behind the other, the engine uses one
        for all positions, the long one if its ``max_model_len`` is beyond what the model was first trained on.
        """
        first = rotary_emb.original_max_position_embeddings
        tables = rotary_emb.long_short_cos_sin_cache
        table = tables[first:] if rotary_emb.use_long_rope else tables[:first]
        return cls(rotary_emb.rotary_dim, True, table)


class Rotation:
    """``R_t x = cos_t * x + sin_t * x[partner]``, with the table of vLLM's RotaryEmbedding.

    Covers whatever that table holds (linear, llama3, YaRN and other scalings of frequencies), partial rotary, neox and
    interleaved style. A scale on cosines and sines (YaRN) is part of ``R_t``.

    Args:
        rotary_emb: vLLM's RotaryEmbedding, or None for a model without one (``R_t`` is then the identity).
        head_size: elements per head.
        first: of the elements that are rotated.
    """

    def __init__(self, rotary_emb: torch.nn.Module | RotaryTable | None, head_size: int, first: int = 0) -> None:
        self.head_size = head_size
        self._rotary_emb = rotary_emb
        partner = torch.arange(head_size)
        self._sign = torch.zeros(head_size)  # of the sine; 0 where nothing is rotated
        self._frequency = torch.zeros(head_size, dtype=torch.int64)  # in the table of cosines and sines
        if rotary_emb is not None:
            rotated = partner[first : first + rotary_emb.rotary_dim]
            if rotary_emb.is_neox_style:
                one, other = rotated.chunk(2)
            else:
                one, other = rotated[::2], rotated[1::2]
            partner = partner.clone()
            partner[one], partner[other] = other, one
            self._sign[one], self._sign[other] = -1.0, 1.0
            self._frequency[one] = self._frequency[other] = torch.arange(one.shape[0])
        self.partner = partner

    @property
    def is_identity(self) -> bool:
        return self._rotary_emb is None

    def to(self, device: torch.device) -> "Rotation":
        """The same rotation, for positions on ``device``: its tables are then made there, without waiting for it."""
        moved = copy.copy(self)
        moved.partner, moved._sign, moved._frequency = (
            t.to(device) for t in (self.partner, self._sign, self._frequency)
        )
        return moved

    def table(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``cos_t`` and ``sin_t``, signs included, float32, shape ``[len(positions), head_size]``, on the rotation's
        device.
        """
        device = self.partner.device
        if self.is_identity:
            shape = (positions.shape[0], self.head_size)
            return torch.ones(shape, device=device), torch.zeros(shape, device=device)
        table = self._rotary_emb.cos_sin_cache[positions].to(device, torch.float32)
        cos, sin = (half[:, self._frequency] for half in table.chunk(2, dim=-1))
        return torch.where(self._sign == 0, 1.0, cos), self._sign * sin

    def rotate(self, vectors: torch.Tensor, position: int) -> torch.Tensor:
        """``R_t / |R_t|`` of ``vectors``, shape ``[..., head_size]``, float32: a turn that keeps every length.

        ``R_t R_n / |R_n|`` is ``R_(t + n)``: it takes what was averaged over the positions from 0 on to those from n
        on.
        """
        cos, sin = self.table(torch.tensor([position]))
        length = (cos.square() + sin.square()).sqrt()
        return cos / length * vectors + sin / length * vectors[..., self.partner]

    def unrotate(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The queries before RoPE, from those after it.

        Args:
            query: after RoPE, shape ``[num_tokens, num_heads, head_size]``.
            positions: shape ``[num_tokens]``, int64.

        Returns:
            float32, the shape of ``query``.
        """
        if self.is_identity:
            return query.to(torch.float32)
        cos, sin = self.table(positions)
        square = cos.square() + sin.square()
        cos, sin = (cos / square).unsqueeze(1).to(query.device), (sin / square).unsqueeze(1).to(query.device)
        query = query.to(torch.float32)
        return cos * query - sin * query[..., self.partner]

    def average_mean(self, mean: torch.Tensor, num_positions: int) -> torch.Tensor:
        """Mean of queries over the positions 0 to ``num_positions - 1``.

        Args:
            mean: of the queries before RoPE, shape ``[..., head_size]``, float32.

        Returns:
            the mean of ``R_t q``, in the same shape.
        """
        cos, sin = self.table(torch.arange(num_positions))
        return cos.mean(0) * mean + sin.mean(0) * mean[..., self.partner]

    def average(
        self, mean: torch.Tensor, second: torch.Tensor, num_positions: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance of queries over the positions 0 to ``num_positions - 1``.

        Args:
            mean: of the queries before RoPE, shape ``[..., head_size]``, float32.
            second: their uncentred second moment, shape ``[..., head_size, head_size]``, float32.

        Returns:
            mean and covariance of ``R_t q``, in the same shapes.
        """
        cos, sin = self.table(torch.arange(num_positions))
        partner = self.partner
        turned_mean = self.average_mean(mean, num_positions)
        # R_t S R_t^T, term by term of the two sums, each averaged over t.
        turned_second = (cos.T @ cos) * second + (sin.T @ sin) * second[..., partner, :][..., partner]
        turned_second += (cos.T @ sin) * second[..., partner] + (sin.T @ cos) * second[..., partner, :]
        turned_second /= num_positions
        return turned_mean, turned_second - turned_mean.unsqueeze(-1) * turned_mean.unsqueeze(-2)
