"""Takes a model's own rotary position embedding off its queries again."""

import torch


def unrotate(query: torch.Tensor, positions: torch.Tensor, rotary_emb: torch.nn.Module) -> torch.Tensor:
    """The queries before RoPE, from those after it.

    Args:
        query: after RoPE, shape ``[num_tokens, num_heads, head_size]``.
        positions: shape ``[num_tokens]``, int64.
        rotary_emb: vLLM's RotaryEmbedding (any frequency scaling: its table of cosines and sines is used; partial rotary;
            neox and interleaved style). A scale on cosines and sines (YaRN) is taken off too.

    Returns:
        float32, the shape of ``query``.
    """
    table = rotary_emb.cos_sin_cache[positions].to(torch.float32)  # [num_tokens, rotary_dim]
    cos, sin = table.unsqueeze(1).chunk(2, dim=-1)  # [num_tokens, 1, rotary_dim / 2]
    scale = cos.square() + sin.square()
    cos, sin = cos / scale, sin / scale
    query = query.to(torch.float32)
    rotated, rest = query[..., : rotary_emb.rotary_dim], query[..., rotary_emb.rotary_dim :]
    if rotary_emb.is_neox_style:
        first, second = rotated.chunk(2, dim=-1)
    else:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    before = (first * cos + second * sin, second * cos - first * sin)
    joined = torch.cat(before, dim=-1) if rotary_emb.is_neox_style else torch.stack(before, dim=-1).flatten(-2)
    return torch.cat((joined, rest), dim=-1)
