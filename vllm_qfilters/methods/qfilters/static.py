"""Q-Filters as the paper has them (arXiv 2503.02812, equation 4)."""

import torch

from vllm_qfilters.kernels.ops import TokenStat
from vllm_qfilters.methods.base import Method, Model


class StaticFilter(Method):
    """Keeps keys of large projection on the filter of their head, one vector per KV head.

    The projection is computed once, fused with the write of the key on GPUs, and final, so that whole pages can be
    scored by it. Cost: one dot product per key.
    """

    stat = TokenStat.PROJECTION

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.filters = model.static_filters().to(model.device, torch.float32).contiguous()
