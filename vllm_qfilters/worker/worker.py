"""The worker: vLLM's, with our attention backend and our model runner."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_qfilters.attention import cpu
from vllm_qfilters.filters.format import ModelIdentity, save
from vllm_qfilters.filters.load import cache_path
from vllm_qfilters.worker.model_runner import QFiltersCPUModelRunner


class QFiltersCPUWorker(CPUWorker):
    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        cpu.register()
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = QFiltersCPUModelRunner(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        times = super().compile_or_warm_up_model()
        self.model_runner.start_compression()
        return times

    def calibrate_filters(self, sequences: list[list[int]], description: str, path: str) -> str:
        """Calibrates filters and writes them to ``path``, or where ``filters: auto`` looks for them if it is empty.

        Called on all workers of an idle engine (``LLM.collective_rpc``).

        Returns:
            The path.
        """
        model = ModelIdentity.from_model_config(self.model_config)
        path = path or str(cache_path(model))
        filters = self.model_runner.calibrate_filters(sequences, description)
        if self.rank == 0:
            save(path, filters, model)
        return path
