"""TOVA (Oren et al. 2024, arXiv 2401.06104)."""

from vllm_qfilters.methods.snapkv import SnapKV


class Tova(SnapKV):
    """Keeps what the very last query attends to, token by token.

    The paper evicts one token per step and averages the heads of a layer: choose granularity ``layer``, the default.
    Here ``interval`` tokens go at once. Cost: as ``snapkv``, with one query instead of 32.
    """

    POOL = 1
