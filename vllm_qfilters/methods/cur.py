"""CUR with a fresh Gaussian sketch (the attention-free variant of VaSE, 2026, arXiv 2606.03928)."""

import torch

from vllm_qfilters.methods.base import PerSequence


class Cur(PerSequence):
    """Keeps tokens whose key and value are both large under a random projection drawn anew at every cut.

    The score is ``|k G|^2 |v G|^2`` with a Gaussian ``G`` of ``SKETCH`` columns, estimates of the leverage of the token
    in the key and the value matrix. A fixed ``G`` would prefer the same directions at every cut (the authors measure
    less accuracy with it). Needs no attention weights. Cost: one read of cached keys and values per cut, in PyTorch.
    """

    SKETCH = 20  # columns of G

    def scores_of_layer(self, keys: torch.Tensor, values: torch.Tensor, sinks: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(keys.shape[-1], self.SKETCH, generator=generator).to(keys.device)
        return (keys @ sketch).square().sum(-1) * (values @ sketch).square().sum(-1)
