"""What a worker refuses of a model's layers and of CUDA graphs: known once the model is loaded, and no earlier."""

from collections.abc import Mapping, Sequence

from vllm.config import CUDAGraphMode
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vllm_qfilters.core.spec import QFiltersSpec
from vllm_qfilters.filters.format import ModelIdentity
from vllm_qfilters.policy import Policy

# Kinds of states that were seen beside compressed attention, of those that vLLM has.
STATES = (
    MambaAttentionBackendEnum.GDN_ATTN,
    MambaAttentionBackendEnum.MAMBA2,
    MambaAttentionBackendEnum.SHORT_CONV,
)


def is_compressed(config: Policy, spec: KVCacheSpec) -> bool:
    """Whether a layer of this specification is compressed. Others are in KV cache groups of their own."""
    return not (isinstance(spec, MambaSpec) or (config.beside.window and type(spec) is SlidingWindowSpec))


def check_specs(
    config: Policy, specs: dict[str, KVCacheSpec], max_model_len: int, attends_to_narrow_values: bool = True
) -> None:
    """Refuses models whose compressed layers do not all hold keys and values of the same shape, or that have layers
    which attend in other ways than causally, to all or to a sliding window.

    Args:
        attends_to_narrow_values: whether vLLM's attention takes values that are narrower than keys.

    Raises:
        ValueError: names the first layer that does not fit.
    """
    first = next((spec for spec in specs.values() if is_compressed(config, spec)), None)
    for name, spec in specs.items():
        if type(spec) is MambaSpec and config.beside.num_states:
            _check_state(name, spec)
            continue
        _check_attention(config, name, spec, max_model_len)
        assert isinstance(spec, AttentionSpec)
        if first is None:
            raise ValueError(
                f"KV compression expected layers of full attention beside those with a sliding window, as the model's "
                f"configuration has them, but found none such as {name}: add --disable-hybrid-kv-cache-manager"
            )
        if spec.num_head_slots is not None or spec.page_size_padded is not None:
            raise ValueError(f"KV compression does not support the cache layout of {name}: {spec}")
        if spec.dtype != first.dtype:
            raise ValueError(
                f"KV compression needs caches of one dtype: that of {name} is {spec.dtype}, the first layer's "
                f"{first.dtype}; drop "
                "--kv-cache-dtype-skip-layers"
            )
        if not is_compressed(config, spec):
            continue
        if spec.head_size_v > spec.head_size:
            raise ValueError(
                f"KV compression does not support values wider than keys: those of {name} have {spec.head_size_v} and "
                f"{spec.head_size} elements"
            )
        if spec.head_size_v < spec.head_size and not (attends_to_narrow_values or type(spec) is MLAAttentionSpec):
            raise ValueError(
                "KV compression does not support values narrower than keys (MiMo-V2) on CPUs, where vLLM has no "
                f"attention for them: those of {name} have {spec.head_size_v} and {spec.head_size} elements"
            )
        shape, wanted = ((each.num_kv_heads, each.head_size, each.head_size_v) for each in (spec, first))
        if shape != wanted:
            raise ValueError(
                f"KV compression needs the same KV heads in every layer that it evicts from: {name} has "
                "{} of {} and {} elements per key and value, the first one {} of {} and {}".format(*shape, *wanted)
            )


def _check_state(name: str, spec: MambaSpec) -> None:
    if spec.mamba_type not in STATES:
        raise ValueError(
            f"KV compression does not support models that keep states of kind {spec.mamba_type.name} beside attention, "
            f"as {name} does; supported: {', '.join(state.name for state in STATES)}"
        )


def check_layers(layers: Mapping[str, object]) -> None:
    """Refuses models whose compressed layers do not go through vLLM's attention backends.

    Args:
        layers: those that are compressed, by name.

    Raises:
        ValueError: names the first layer that does not.
    """
    for name, layer in layers.items():
        if isinstance(layer, MLAAttention) and layer.use_sparse:
            raise ValueError(
                f"KV compression does not support MLA layers that attend to what an indexer chooses, as {name} does"
            )
        if not isinstance(layer, Attention | MLAAttention):
            raise ValueError(
                f"KV compression does not support models with attention layers of their own (Inkling), as {name} is one"
            )


def check_identity(model: ModelIdentity, layers: Sequence[Attention | MLAAttention]) -> None:
    """Refuses models whose layers are not what their configuration says: filters would be looked for, and kept, for
    others.

    Args:
        layers: that are calibrated on this rank.

    Raises:
        ValueError: says what differs.
    """
    number = len(layers) if get_pp_group().world_size == 1 else model.num_layers
    found = number, layers[0].num_kv_heads, layers[0].head_size
    expected = (
        model.num_layers,
        max(1, model.num_kv_heads // get_tensor_model_parallel_world_size()),
        model.head_size,
    )
    if found != expected:
        raise ValueError(
            f"KV compression does not know the attention layers of {model.architecture} from its configuration: "
            "there are {} with {} KV heads of {} elements, expected {} with {} of {}".format(*found, *expected)
            + ": choose a method without filters, such as streaming or knorm"
        )


def _check_attention(config: Policy, name: str, spec: KVCacheSpec, max_model_len: int) -> None:
    if type(spec) is SlidingWindowSpec:
        window = config.beside.window or config.sliding_window
        if window < spec.sliding_window < max_model_len:
            raise ValueError(
                f"KV compression keeps the {window} tokens that the model's configuration "
                f"gives as its sliding window, but {name} has one of {spec.sliding_window}"
            )
    elif not (type(spec) is FullAttentionSpec or type(spec) is MLAAttentionSpec):
        raise ValueError(
            f"KV compression supports full attention and sliding windows, but {name} has a {type(spec).__name__}"
        )
    elif spec.attention_chunk_size is not None or spec.non_causal:
        raise ValueError(f"KV compression does not support chunked or non-causal attention, which {name} has")


def compressed_group(config: Policy, groups: Sequence[KVCacheGroupSpec]) -> int:
    """Which of vLLM's KV cache groups is compressed.

    Raises:
        ValueError: they are not those that the model's configuration lets one expect.
    """
    compressed = [index for index, group in enumerate(groups) if isinstance(group.kv_cache_spec, QFiltersSpec)]
    if len(compressed) != 1 or len(groups) != 1 + config.beside.number:
        remedy = "" if config.beside.num_states else ": add --disable-hybrid-kv-cache-manager"
        raise ValueError(
            f"KV compression supports one KV cache group of full attention and expected {config.beside.number} others, "
            f"vLLM made {len(compressed)} and {len(groups) - len(compressed)}{remedy}"
        )
    return compressed[0]


def check_cuda_graphs(config: Policy, mode: CUDAGraphMode) -> None:
    """Refuses CUDA graphs that hide what is to be observed, once vLLM has settled on a mode.

    Raises:
        ValueError: says what to change.
    """
    if config.entry.follows_decoding and mode.has_full_cudagraphs():
        raise ValueError(
            f"method '{config.method}' goes by the queries of generated tokens, which cannot be seen in a full CUDA "
            "graph: use cudagraph_mode PIECEWISE"
        )
    if config.observed_queries and mode.mixed_mode() == CUDAGraphMode.FULL:
        raise ValueError(
            f"observed={config.observed}: the last queries of a prompt cannot be seen in a full CUDA graph: use "
            "cudagraph_mode FULL_AND_PIECEWISE, vLLM's default, or set observed to 0"
        )
