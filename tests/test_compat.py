"""What we patch and subclass in vLLM, and that installing this package changes nothing by itself."""

import ast
import importlib
import inspect
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    "target, parameters",
    [
        # patched in compat.py
        ("vllm.engine.arg_utils:EngineArgs.add_cli_args", ["parser"]),
        ("vllm.engine.arg_utils:EngineArgs.from_cli_args", ["args"]),
        ("vllm.engine.arg_utils:EngineArgs.create_engine_config", ["self", "usage_context", "headless"]),
        (
            "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
            ["self", "request_id", "prompt", "params", "supported_tasks", "arrival_time", "lora_request", "tokenization_kwargs"]
            + ["trace_headers", "priority", "data_parallel_rank", "resumable", "session_id", "kv_hints"],
        ),
        (
            "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
            ["self", "vllm_config", "engine_idxs", "custom_stat_loggers", "enable_default_loggers", "aggregate_engine_logging"]
            + ["client_count"],
        ),
        ("vllm.plugins:load_endpoint_plugins", ["supported_tasks"]),
        # overridden without being public
        (
            "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead",
            ["self", "request", "num_computed_tokens", "num_new_tokens"],
        ),
        ("vllm.v1.core.sched.scheduler:Scheduler._get_local_prefix_cache_hit", ["self", "request"]),
        ("vllm.v1.core.sched.scheduler:Scheduler._free_blocks", ["self", "request"]),
        (
            "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
            ["self", "scheduler_output", "model_runner_output"],
        ),
        ("vllm.v1.core.sched.scheduler:Scheduler._preempt_request", ["self", "request", "timestamp", "drop_stale_output"]),
        (
            "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.get_num_blocks_to_allocate",
            ["self", "request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens", "num_local_computed_tokens"]
            + ["num_tokens_main_model", "apply_admission_cap", "prefill_end"],
        ),
        (
            "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks",
            ["self", "request_id", "num_tokens", "num_tokens_main_model"],
        ),
        ("vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.pop_blocks_for_free", ["self", "request_id"]),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states", ["self", "scheduler_output"]),
        (
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model",
            ["self", "scheduler_output", "intermediate_tensors"],
        ),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens", ["self", "grammar_output"]),
        (
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs",
            ["self", "scheduler_output", "num_scheduled_tokens"],
        ),
        (
            "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update",
            ["self", "layer", "key", "value", "kv_cache", "slot_mapping"],
        ),
    ],
)
def test_vllm_still_has_the_seam(target, parameters):
    module, _, path = target.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    assert list(inspect.signature(found).parameters) == parameters


def test_registering_twice_patches_once():
    from vllm.engine.arg_utils import EngineArgs

    from vllm_qfilters.plugin import register

    register()
    patched = EngineArgs.add_cli_args
    register()
    assert EngineArgs.add_cli_args is patched


def test_engine_arguments_without_the_flag_are_untouched(tiny_model):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(tiny_model)]))
    assert (arguments.scheduler_cls, arguments.worker_cls, arguments.additional_config) == (None, "auto", {})


def test_the_flag_and_dotted_keys_reach_the_engine_arguments(tiny_model):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--model", str(tiny_model), "--kv-compression", "qfilters", "--kv-compression-config.budget", "1024"]
    flags += ["--kv-compression-config.window", "0.25", "--additional-config", '{"mine": 1}']
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args(flags))
    compression = arguments.additional_config["kv_compression"]
    assert (compression["method"], compression["budget"], compression["window"]) == ("qfilters", 1024, 0.25)
    assert arguments.additional_config["mine"] == 1
    assert arguments.scheduler_cls.endswith("QFiltersScheduler") and arguments.worker_cls.endswith("QFiltersCPUWorker")


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--kv-compression-config.budget", "1024"], "does nothing without --kv-compression"),
        (["--kv-compression", "qfilters", "--kv-compression-config.budgt", "1"], "unknown KV compression option budgt"),
        (["--kv-compression", "qfilters", "--kv-compression-config.method", "knorm"], "the method is named by --kv-compression"),
        (["--kv-compression", "qfilters", "--kv-compression-config.budget", "0"], "budget=0"),
        (
            ["--kv-compression", "qfilters", "--kv-compression-config.endpoint", "true", "--disable-log-stats"],
            "endpoint=True lists what vLLM's statistics carry: drop --disable-log-stats",
        ),
        (["--kv-compression", "qfilters", "--worker-cls", "other.Worker"], "--worker-cls other.Worker cannot be combined"),
    ],
)
def test_bad_flags_are_refused(flags, reason, tiny_model):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(ValueError, match=reason):
        AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(tiny_model), *flags]))


ALLOWED_IMPORTS = {
    # module: what it may import of this package
    "budget": set(),
    "plan": set(),
    "config": {"budget"},
    "kernels": {"kernels"},
    "core": {"budget", "config", "metrics", "plan", "core"},
    "attention": {"kernels", "filters", "scorers", "attention"},
    "filters": {"filters"},
}


@pytest.mark.parametrize("module", ALLOWED_IMPORTS)
def test_imports_point_one_way(module):
    folder = ROOT / module if module == "kernels" else ROOT / "vllm_qfilters" / module
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vllm_qfilters"):
                imported = (node.module.split(".") + [""])[1]
                assert imported in ALLOWED_IMPORTS[module], f"{file.name} imports {node.module}"
