"""The KV cache groups of a model whose layers differ: integers, from its configuration alone.

vLLM gives layers of one kind groups of their own, which share a pool of pages but no page
(``v1/core/kv_cache_utils.py`` of vLLM 0.32). Layers of full attention are compressed, in one group. Others stay as vLLM
manages them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_qfilters.budget import cdiv


class LayerKinds(NamedTuple):
    """Attributes:

    num_full: layers that attend to the whole sequence.
    num_sliding: layers that attend to a sliding window.
    window: tokens that a sliding window reaches, the query's own among them; 0 if there is none.
    """

    num_full: int
    num_sliding: int
    window: int

    @classmethod
    def of(cls, model_config: Any) -> "LayerKinds":
        """Of vLLM's ModelConfig. A window that the longest context does not leave is none."""
        config = model_config.hf_text_config
        types = getattr(config, "layer_types", None)
        total = len(types) if types else model_config.get_total_num_hidden_layers()
        window = model_config.get_sliding_window() or 0
        if not 0 < window < model_config.max_model_len:
            return cls(total, 0, 0)
        num_sliding = types.count("sliding_attention") if types else total
        return cls(total - num_sliding, num_sliding, window if num_sliding else 0)


def layers_per_group(counts: Sequence[int]) -> int:
    """How many layers vLLM puts into a group, where there are ``counts`` layers of each kind: as many as the smallest
    kind has, or the largest if it is not half as large again."""
    found = [count for count in counts if count]
    return max(found) if max(found) < 1.5 * min(found) else min(found)


@dataclasses.dataclass(frozen=True)
class GroupsBeside:
    """The KV cache groups beside the one that is compressed: of layers with a sliding window.

    Attributes:
        window: tokens that the layers attend to, the query's own among them; 0 if there are none.
        number: of groups.
    """

    window: int = 0
    number: int = 0

    @classmethod
    def of(cls, kinds: LayerKinds) -> "GroupsBeside":
        """None where there are no layers of full attention, or vLLM would put those into several groups, being the
        most: layers with a sliding window are then compressed with them."""
        if not kinds.num_full or not kinds.num_sliding:
            return cls()
        size = layers_per_group((kinds.num_full, kinds.num_sliding))
        return cls(kinds.window, cdiv(kinds.num_sliding, size)) if kinds.num_full <= size else cls()

    def pages(self, length: int, step_tokens: int, block_size: int) -> int:
        """Most pages that a sequence of ``length`` tokens holds in these groups.

        Args:
            step_tokens: most tokens that are computed before those they push out of a window are given up.
            block_size: tokens per page.
        """
        most = cdiv(self.window - 1 + step_tokens, block_size) + 1
        return self.number * min(cdiv(length, block_size), most)


NO_GROUPS = GroupsBeside()
