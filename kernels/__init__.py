"""Kernels on the paged KV cache. Installed as ``vllm_qfilters.kernels``; needs torch alone.

``reference`` is the truth in plain PyTorch and what runs on a CPU; ``layout`` alone knows where bytes lie.
"""

from vllm_qfilters.kernels.layout import PagedCache, probe_page_layout
from vllm_qfilters.kernels.reference import compact, select_kept, write_scores

__all__ = ["PagedCache", "compact", "probe_page_layout", "select_kept", "write_scores"]
