"""LagKV (Liang et al. 2025, arXiv 2504.04704)."""

import torch

from vllm_qfilters.methods.base import PerSequence


class LagKV(PerSequence):
    """Keeps tokens that stand out, measured by the range of the tokens that follow.

    Behind the sinks the tokens are cut into partitions of ``LAG``. Keys and values of one are scaled by the minimum and
    maximum, per channel, of the next one; the standard deviation over channels, a softmax over the partition, and the
    sum of both for keys and values make the score. The last partition has no next one and scores highest, later tokens
    more than earlier ones: it is the paper's window. The paper keeps the same share of every partition, here the best
    of all partitions stay. Needs no attention weights. Cost: one read of cached keys and values per cut, in PyTorch.
    """

    LAG = 128  # tokens, the paper's L

    def scores_of_layer(self, keys: torch.Tensor, values: torch.Tensor, sinks: int, seed: int) -> torch.Tensor:
        num_kv_heads, num_tokens, _ = keys.shape
        # From 2 to 3: more than two softmaxes add up to.
        scores = 2 + torch.arange(num_tokens, device=keys.device).div(num_tokens).repeat(num_kv_heads, 1)
        num_partitions = (num_tokens - sinks) // self.LAG
        if num_partitions < 2:
            return scores
        end = sinks + num_partitions * self.LAG
        of_keys, of_values = (self._spread(part[:, sinks:end]) for part in (keys, values))
        scores[:, sinks : end - self.LAG] = of_keys + of_values
        return scores

    def _spread(self, vectors: torch.Tensor) -> torch.Tensor:
        """Softmax, within each partition but the last, of the deviation over channels of what the next one scaled.

        Args:
            vectors: shape ``[num_kv_heads, num_partitions * LAG, head_size]``.

        Returns:
            shape ``[num_kv_heads, (num_partitions - 1) * LAG]``.
        """
        partitions = vectors.unflatten(1, (-1, self.LAG))  # [num_kv_heads, num_partitions, LAG, head_size]
        low, high = partitions[:, 1:].amin(2, keepdim=True), partitions[:, 1:].amax(2, keepdim=True)
        scaled = (partitions[:, :-1] - low) / (high - low).clamp(min=1e-12)
        spread: torch.Tensor = scaled.std(-1).softmax(-1).flatten(1)
        return spread
