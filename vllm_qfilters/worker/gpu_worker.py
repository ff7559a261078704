"""The worker on GPUs: vLLM's, with our attention backends and our model runner."""

from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.mem_utils import format_gib
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_qfilters.attention import register
from vllm_qfilters.attention.scoring import BACKENDS, MLA_BACKENDS
from vllm_qfilters.worker.runner_v2 import QFiltersGPUModelRunner
from vllm_qfilters.worker.worker import CompressedWorker

logger = init_logger("vllm.kv_compression")  # below "vllm", whose handlers print it


class QFiltersGPUWorker(CompressedWorker, Worker):
    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        register({**BACKENDS, **MLA_BACKENDS})
        super().__init__(vllm_config, *args, **kwargs)

    def _make_model_runner(self) -> QFiltersGPUModelRunner:
        return QFiltersGPUModelRunner(self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        available = super().determine_available_memory()
        workspace = self.model_runner.compaction_bytes(available)
        if self.cache_config.kv_cache_memory_bytes:
            logger.info(
                "KV compression: compacting takes up to %s GiB beside --kv-cache-memory-bytes", format_gib(workspace)
            )
            return available
        logger.info("KV compression: %s GiB of the cache's memory are set aside for compacting", format_gib(workspace))
        # vLLM suggests a --kv-cache-memory-bytes from these.
        self.peak_activation_memory += workspace
        self.available_kv_cache_memory_bytes -= workspace
        return available - workspace

    def compile_or_warm_up_model(self) -> CompilationTimes:
        # First of all: CUDA graphs capture the write of keys with whatever scores it.
        self.model_runner.start_compression()
        return super().compile_or_warm_up_model()
