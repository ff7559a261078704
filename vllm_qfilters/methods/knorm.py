"""K-norm (Devoto et al. 2024, arXiv 2406.11430)."""

from vllm_qfilters.kernels.ops import TokenStat
from vllm_qfilters.methods.base import Method


class KeyNorm(Method):
    """Keeps keys of small norm, which get more attention than others.

    Cost: the norm of each key, when it is written.
    """

    stat = TokenStat.NEGATIVE_KEY_NORM
