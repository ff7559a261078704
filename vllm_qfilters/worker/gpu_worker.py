"""The worker on GPUs: vLLM's, with our attention backends and our model runner."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_qfilters.attention import register
from vllm_qfilters.attention.gpu import BACKENDS
from vllm_qfilters.worker.gpu_model_runner import QFiltersGPUModelRunner
from vllm_qfilters.worker.worker import CompressedWorker


class QFiltersGPUWorker(CompressedWorker, Worker):
    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        register(BACKENDS)
        super().__init__(vllm_config, *args, **kwargs)

    def _make_model_runner(self) -> QFiltersGPUModelRunner:
        return QFiltersGPUModelRunner(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        # First of all: CUDA graphs capture the write of keys with whatever scores it.
        self.model_runner.start_compression()
        return super().compile_or_warm_up_model()
