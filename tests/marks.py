"""Marks for tests that not every CPU can run."""

import pytest
import torch

from vllm_qfilters import cpu

needs_avx512 = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="the CPU has no AVX-512")
needs_fp8_caches = pytest.mark.skipif(
    not cpu.has_fp8_caches(),
    reason=f"vLLM's CPU attention has fp8 caches with AVX-512 or AMX only, this CPU has {cpu.isa()}",
)
