"""Lets a CPU pass for one with AVX2 alone: with this folder on PYTHONPATH, in every Python process (`make test
ISA=avx2`).

vLLM then loads its operators for AVX2 and refuses what they lack, and neither oneDNN nor ATen uses more. Only the loops
of csrc/ still run with the widest vectors there are: they give the same numbers.
"""

import importlib.abc
import importlib.util
import os
import sys
import tempfile

os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
# PyTorch 2.13 finds what it generated for AVX-512 in its cache and compiles it for AVX2: half of the elements are then
# not written (findings/inductor-cache-isa.sh).
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"torchinductor-avx2-{os.getuid()}")

_ABSENT = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported")


class _TorchCpuFinder(importlib.abc.MetaPathFinder):
    """Takes part in the import of ``torch.cpu``: what vLLM asks about the CPU is answered with no."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for function in _ABSENT:
                assert hasattr(module, function), f"torch.cpu has no {function} any more"
                setattr(module, function, lambda: False)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _TorchCpuFinder())
