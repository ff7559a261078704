"""Operators on the paged KV cache: one protocol, three implementations. The folder is linked as
``vllm_qfilters.kernels``.

``ops`` has the protocol, ``batch`` and ``layout`` what operators read: compactions of a step, and where bytes lie.
``reference`` is the truth in plain PyTorch, ``cpp`` the face of csrc/, ``triton`` the kernels for GPUs, imported by
name where Triton is.
"""

from vllm_qfilters.kernels import cpp, reference
from vllm_qfilters.kernels.by_sequence import SequenceOps
from vllm_qfilters.kernels.layout import PagedCache, StridedCache, probe_page_layout

REFERENCE_OPS = SequenceOps(reference, "PyTorch")
CPU_OPS = SequenceOps(cpp, "C++") if cpp.load() else REFERENCE_OPS
IMPLEMENTATION = CPU_OPS.name

__all__ = ["CPU_OPS", "IMPLEMENTATION", "REFERENCE_OPS", "PagedCache", "StridedCache", "probe_page_layout"]
