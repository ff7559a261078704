"""The KV cache groups of a model whose layers differ: integers, from its configuration alone.

vLLM gives layers of one kind groups of their own, which share a pool of pages but no page
(``v1/core/kv_cache_utils.py`` of vLLM 0.32). Layers of full attention are compressed, in one group. Others stay as vLLM
manages them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_qfilters.budget import cdiv

# Names that configurations of Transformers have for kinds of layers; a layer may be of two (Falcon-H1).
_FULL = frozenset({"full_attention", "attention", "hybrid"})
_STATE = frozenset({"linear_attention", "mamba", "conv", "short_conv", "hybrid"})
PAGES_OF_STATE = 3  # at most: one that a step reads, one that it writes, and one that it leaves for the prefix cache


class LayerKinds(NamedTuple):
    """Attributes:

    num_full: layers that attend to the whole sequence.
    num_sliding: layers that attend to a sliding window.
    num_states: layers that keep a state of the sequence, of one size whatever its length.
    window: tokens that a sliding window reaches, the query's own among them; 0 if there is none.

    Layers that attend to what earlier ones hold, and hold nothing themselves (Gemma 4 E2B), do not count.
    """

    num_full: int
    num_sliding: int
    num_states: int
    window: int

    @classmethod
    def of(cls, model_config: Any) -> "LayerKinds":
        """Of vLLM's ModelConfig. A window that the longest context does not leave is none."""
        config = model_config.hf_text_config
        types = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None)
        if types is None and getattr(config, "hybrid_layer_pattern", None):  # MiMo-V2, as it was published
            types = ["sliding_attention" if slides else "full_attention" for slides in config.hybrid_layer_pattern]
        window = model_config.get_sliding_window() or 0
        if not 0 < window < model_config.max_model_len:
            window = 0
        if model_config.is_hybrid:
            types = types or ["hybrid"] * num_attention_layers(model_config)
            num_sliding = types.count("sliding_attention") if window else 0
            num_full = sum(kind in _FULL for kind in types)
            num_full += 0 if window else types.count("sliding_attention")
            num_states = sum(kind in _STATE for kind in types) or len(types)  # of layers that are of two kinds
            return cls(num_full, num_sliding, num_states, window if num_sliding else 0)
        total = len(types) if types else num_attention_layers(model_config)
        total -= num_sharing_layers(config)
        types = types[:total] if types else None
        num_sliding = 0 if not window else types.count("sliding_attention") if types else total
        return cls(total - num_sliding, num_sliding, 0, window if num_sliding else 0)


def attention_per_layer(hf_text_config: Any) -> int:
    """Attention layers in each layer that vLLM counts."""
    return 2 if getattr(hf_text_config, "model_type", None) == "longcat_flash" else 1


def num_attention_layers(model_config: Any) -> int:
    """Of a model without states. model_config: vLLM's."""
    num_layers: int = model_config.get_total_num_hidden_layers()
    num_layers -= sum(bool(attention.no_op) for attention in attention_blocks(model_config.hf_text_config))
    return num_layers * attention_per_layer(model_config.hf_text_config)


def attention_index(hf_text_config: Any, index: int) -> int:
    """Which of the layers that attend is the one with this index among all of them, counted as vLLM's names do."""
    return index - sum(bool(attention.no_op) for attention in attention_blocks(hf_text_config)[:index])


def attention_blocks(hf_text_config: Any) -> list[Any]:
    """What the configuration says of the attention of each layer, where a search of architectures chose that, and left
    it out of some (Nemotron NAS): ``no_op`` and ``n_heads_in_group``. Empty for other models."""
    blocks = getattr(hf_text_config, "block_configs", None) or ()
    return [block.attention for block in blocks if hasattr(block, "attention")]


def num_sharing_layers(hf_text_config: Any) -> int:
    """The last layers of a model that have no KV cache: they attend to that of the last one of their kind before."""
    return getattr(hf_text_config, "num_kv_shared_layers", None) or 0


def layers_per_group(counts: Sequence[int]) -> int:
    """How many layers vLLM puts into a group, where there are ``counts`` layers of each kind: as many as the smallest
    kind has, or the largest if it is not half as large again."""
    found = [count for count in counts if count]
    return max(found) if max(found) < 1.5 * min(found) else min(found)


@dataclasses.dataclass(frozen=True)
class GroupsBeside:
    """The KV cache groups beside the one that is compressed.

    Attributes:
        window: tokens that layers with a sliding window attend to, the query's own among them; 0 if there are none.
        num_windows: groups of such layers.
        num_states: groups of layers that keep a state.
        splits_attention: layers of full attention are in several groups too, being many more than keep a state.
    """

    window: int = 0
    num_windows: int = 0
    num_states: int = 0
    splits_attention: bool = False

    @classmethod
    def of(cls, kinds: LayerKinds) -> "GroupsBeside":
        """None of layers with a sliding window, which are then compressed with the others, where there are no others,
        or vLLM would put those of full attention into several groups, being the most."""
        num_sliding = kinds.num_sliding if kinds.num_full else 0
        size = layers_per_group((kinds.num_full, num_sliding, kinds.num_states)) if kinds.num_full else 1
        if num_sliding and kinds.num_full > size and not kinds.num_states:
            return cls()
        is_split = kinds.num_states > 0 and kinds.num_full > size
        return cls(kinds.window if num_sliding else 0, cdiv(num_sliding, size), cdiv(kinds.num_states, size), is_split)

    @property
    def number(self) -> int:
        return self.num_windows + self.num_states

    def pages(self, length: int, step_tokens: int, block_size: int) -> int:
        """Most pages that a sequence of ``length`` tokens holds in these groups.

        Args:
            step_tokens: most tokens that are computed before those they push out of a window are given up.
            block_size: tokens per page.
        """
        of_window = 0
        if self.num_windows:
            of_window = min(cdiv(length, block_size), cdiv(self.window - 1 + step_tokens, block_size) + 1)
        return self.num_windows * of_window + self.num_states * PAGES_OF_STATE


NO_GROUPS = GroupsBeside()
