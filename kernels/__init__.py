"""Kernels on the paged KV cache. Installed as ``vllm_qfilters.kernels``; needs torch alone.

``reference`` is the truth in plain PyTorch, and serves where the C++ operators of csrc/ (``cpu``) are not built;
``layout`` alone knows where bytes lie. The Triton kernels for GPUs are imported by name, where Triton is:
``write_and_score`` for a step's keys and values, ``selection`` and ``compaction`` for all sequences of a
:class:`batch.CompactionBatch`, ``score_resident``, ``observation``, ``distinctness`` and ``score_pages``.
"""

from vllm_qfilters.kernels import cpp, reference
from vllm_qfilters.kernels.layout import PagedCache, probe_page_layout
from vllm_qfilters.kernels.reference import write_scores

_implementation, IMPLEMENTATION = (cpp, "C++") if cpp.load() else (reference, "PyTorch")

compact = _implementation.compact
expected_attention = _implementation.expected_attention
key_distinctness = _implementation.key_distinctness
observed_attention = _implementation.observed_attention
page_scores = _implementation.page_scores
score_and_store = _implementation.score_and_store
select_kept = _implementation.select_kept
store_value_norms = _implementation.store_value_norms

__all__ = [
    "IMPLEMENTATION",
    "PagedCache",
    "compact",
    "expected_attention",
    "key_distinctness",
    "observed_attention",
    "page_scores",
    "probe_page_layout",
    "score_and_store",
    "select_kept",
    "store_value_norms",
    "write_scores",
]
