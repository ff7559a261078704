"""The worker on CPUs: vLLM's, with our attention backend and our model runner."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_qfilters.attention import register
from vllm_qfilters.attention.backends.cpu import BACKENDS
from vllm_qfilters.worker.runner_v1 import QFiltersCPUModelRunner
from vllm_qfilters.worker.worker import CompressedWorker


class QFiltersCPUWorker(CompressedWorker, CPUWorker):
    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        register(BACKENDS)
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = QFiltersCPUModelRunner(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        times = super().compile_or_warm_up_model()
        self.model_runner.start_compression()
        return times
