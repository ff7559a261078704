"""Q-Filters for vLLM: keeps the KV cache of every sequence within a budget (arXiv 2503.02812)."""

from vllm_qfilters.config import KVCompressionConfig
from vllm_qfilters.frontend.engine_args import kv_compression

__version__ = "0.1.0"
__all__ = ["KVCompressionConfig", "kv_compression"]
