"""What a worker refuses of a model's layers and of CUDA graphs: known once the model is loaded, and no earlier."""

from vllm.config import CUDAGraphMode
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from vllm_qfilters.policy import Policy


def check_specs(config: Policy, specs: dict[str, KVCacheSpec], max_model_len: int) -> None:
    """Refuses models whose layers do not all hold keys and values of the same shape, or attend to them in other ways
    than causally, to all or to a sliding window.

    Raises:
        ValueError: names the first layer that does not.
    """
    first = next(iter(specs.values()), None)
    for name, spec in specs.items():
        if type(spec) is SlidingWindowSpec:
            if config.sliding_window < spec.sliding_window < max_model_len:
                raise ValueError(
                    f"KV compression keeps the {config.sliding_window} tokens that the model's configuration "
                    f"gives as its sliding window, but {name} has one of {spec.sliding_window}"
                )
        elif type(spec) is not FullAttentionSpec:
            raise ValueError(
                f"KV compression supports full attention and sliding windows, but {name} has a {type(spec).__name__}"
            )
        elif spec.attention_chunk_size is not None or spec.non_causal:
            raise ValueError(f"KV compression does not support chunked or non-causal attention, which {name} has")
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                "KV compression does not support values of another size than keys (MiMo-V2): those of "
                f"{name} have {spec.head_size_v} and {spec.head_size} elements"
            )
        if spec.num_head_slots is not None or spec.page_size_padded is not None:
            raise ValueError(f"KV compression does not support the cache layout of {name}: {spec}")
        if spec.dtype != first.dtype:
            raise ValueError(
                f"KV compression needs caches of one dtype: that of {name} is {spec.dtype}, the first layer's "
                f"{first.dtype}; drop "
                "--kv-cache-dtype-skip-layers"
            )
        if (spec.num_kv_heads, spec.head_size) != (first.num_kv_heads, first.head_size):
            raise ValueError(
                f"KV compression needs the same KV heads in every layer: {name} has {spec.num_kv_heads} x "
                f"{spec.head_size}, "
                f"the first layer {first.num_kv_heads} x {first.head_size}"
            )


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
