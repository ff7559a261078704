"""Stands in for operators of models with states that vLLM 0.32 lacks, or has wrong, on CPUs. They are in PyTorch, and
no part of what is tested.

- Gated delta nets are there in bfloat16 alone: in float32 those of Hugging Face's model stand in.
- RoPE takes the heads of queries of three dimensions, which LFM2 has alone, for tokens.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)
from vllm import _custom_ops
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name

_gated_delta_net_of_vllm, _rotate_of_vllm = gdn_attention.cpu_gdn_attention_core, _custom_ops.rotary_embedding


@contextlib.contextmanager
def stood_in() -> Iterator[None]:
    """For all engines of this process."""
    gdn_attention.cpu_gdn_attention_core = gated_delta_net
    _custom_ops.rotary_embedding = rotate
    try:
        yield
    finally:
        gdn_attention.cpu_gdn_attention_core = _gated_delta_net_of_vllm
        _custom_ops.rotary_embedding = _rotate_of_vllm


def gated_delta_net(
    mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor, layer_name: LayerNameType
) -> None:
    """As vLLM's operator of that name."""
    if mixed_qkv.dtype == torch.bfloat16:
        return _gated_delta_net_of_vllm(mixed_qkv, b, a, core_attn_out, layer_name)
    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if context.attn_metadata is None:
        return None
    metadata = context.attn_metadata[layer.prefix]
    conv_states, recurrent_states = layer.kv_cache
    conv_states = conv_states if is_conv_state_dim_first() else conv_states.transpose(1, 2)
    starts = metadata.non_spec_query_start_loc.tolist()
    pages = metadata.non_spec_state_indices_tensor.tolist()
    num_requests = metadata.num_decodes + metadata.num_prefills
    has_state = [True] * num_requests if metadata.has_initial_state is None else metadata.has_initial_state.tolist()
    for request in range(num_requests):
        start, end, page = starts[request], starts[request + 1], pages[request]
        conv_state = conv_states[page] if has_state[request] else torch.zeros_like(conv_states[page])
        seen = torch.cat((conv_state, mixed_qkv[start:end].T), dim=-1)
        mixed = F.silu(F.conv1d(seen[None], layer.conv1d.weight, groups=len(seen))[0]).T
        conv_states[page] = seen[:, -conv_state.shape[-1] :]
        query, key, value = layer.rearrange_mixed_qkv(mixed)
        group = value.shape[2] // key.shape[2]
        g = -layer.A_log.exp() * F.softplus(a[start:end] + layer.dt_bias)
        rule = torch_recurrent_gated_delta_rule if end - start == 1 else torch_chunk_gated_delta_rule
        out, state = rule(
            query.repeat_interleave(group, dim=2),
            key.repeat_interleave(group, dim=2),
            value,
            g[None],
            b[start:end].sigmoid()[None],
            initial_state=recurrent_states[page][None] if has_state[request] else None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        core_attn_out[start:end] = out[0]
        recurrent_states[page] = state[0]
    return None


def rotate(positions, query, key, *args) -> None:
    """As vLLM's function ``rotary_embedding``."""
    given = [heads for heads in (query, key) if heads is not None]  # a layer that shares a cache has no keys
    flat = [heads.reshape(len(positions), -1) for heads in given]
    _rotate_of_vllm(positions, *flat, *([] if len(flat) == 2 else [None]), *args)
    for heads, turned in zip(given, flat, strict=True):
        if heads.data_ptr() != turned.data_ptr():  # else it was turned in place
            heads.copy_(turned.view(heads.shape))
