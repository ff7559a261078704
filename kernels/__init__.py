"""Kernels on the paged KV cache. Installed as ``vllm_qfilters.kernels``; needs torch alone.

``reference`` is the truth in plain PyTorch, and serves where the C++ operators of csrc/ (``cpu``) are not built; ``layout``
alone knows where bytes lie.
"""

from vllm_qfilters.kernels import cpu
from vllm_qfilters.kernels.layout import PagedCache, probe_page_layout
from vllm_qfilters.kernels.reference import expected_attention, observed_attention, page_scores, write_scores

if cpu.load():
    from vllm_qfilters.kernels.cpu import compact, score_and_store, select_kept

    IMPLEMENTATION = "C++"
else:
    from vllm_qfilters.kernels.reference import compact, score_and_store, select_kept

    IMPLEMENTATION = "PyTorch"

__all__ = [
    "IMPLEMENTATION",
    "PagedCache",
    "compact",
    "expected_attention",
    "observed_attention",
    "page_scores",
    "probe_page_layout",
    "score_and_store",
    "select_kept",
    "write_scores",
]
