"""What this CPU computes fast, and which KV caches vLLM 0.32 has on it. Imports torch alone, and that late.

python -m vllm_qfilters.cpu      # the --dtype to serve with on this machine
"""

import platform


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def isa() -> str:
    """The widest instruction set that matters to vLLM, as people name it."""
    import torch

    if not is_x86():
        return platform.machine()
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX-512 with bfloat16"
    return "AVX-512" if torch.cpu._is_avx512_supported() else "AVX2"


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 is multiplied as such. Elsewhere a prefill in bfloat16 takes 9 times as long as in float32
    (SmolLM2-135M, vLLM 0.32, an AMD EPYC with AVX2). With AVX-512's bfloat16 and no AMX it takes 1.4 times as long, and
    a decoding step 0.7 of the time (one core of an Intel Xeon, beside other work). True on other architectures than
    x86, where nothing was measured."""
    return not is_x86() or isa() in ("AMX", "AVX-512 with bfloat16")


def has_fp8_caches() -> bool:
    """Whether vLLM's CPU attention has fp8 KV caches (``_get_attn_isa`` of vllm/v1/attention/backends/cpu_attn.py)."""
    import torch

    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_supported()


def fast_dtype() -> str:
    """The dtype to serve with, as ``--dtype`` takes it; ``auto`` where there is a GPU."""
    import torch

    if torch.cuda.is_available() or not is_x86():
        return "auto"
    return "bfloat16" if has_fast_bfloat16() else "float32"


if __name__ == "__main__":
    print(fast_dtype())
