"""Every place where vLLM is patched, because it offers no seam there. All patches are idempotent and inert without the
flag.

==============================  ==========================================================
==================================== target (vLLM 0.32)              what and why no seam
        dies when ==============================  ==========================================================
        ====================================
EngineArgs.add_cli_args,        adds ``--kv-compression`` and ``--kv-compression-config``;  vLLM lets a plugin add
arguments EngineArgs.from_cli_args        plugins are loaded before the parser is built, but cannot
                                add arguments to it
EngineArgs.create_engine_config refuses what cannot work before any process is started;     platforms or plugins are
asked about
                                a worker's error is buried under those of its parents       a finished VllmConfig
InputProcessor.process_inputs   refuses a bad ``kv_budget`` with a 400 at the door;
``LogitsProcessor.validate_params``
                                ``LogitsProcessor.validate_params`` sees neither the        sees the VllmConfig, or
                                platforms let configuration nor the prompt, and is off in speculative     plugins
                                validate requests decoding
StatLoggerManager.__init__      puts our counters under ``/metrics``; stat logger plugins   SchedulerStats has a field
for
                                are announced in the log of every server, also where the    extensions, or stat loggers
                                can be feature is off, and offline engines do not load them        named in the
                                configuration
load_endpoint_plugins           lets ``endpoint`` add a route to the API server; entry      endpoint plugins can be
named in the (vllm.plugins)                  points of that group are warned of in the log of every      configuration
                                server where VLLM_PLUGINS is not set
==============================  ==========================================================
====================================

tests/test_compat.py fails when one of these signatures changes.
"""

import argparse
import functools
import json
from typing import Any

import vllm.plugins
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager

from vllm_qfilters.config import KVCompressionConfig
from vllm_qfilters.frontend.engine_args import apply_kv_compression
from vllm_qfilters.frontend.metrics import KVCompressionStatLogger
from vllm_qfilters.frontend.support import check_request, check_supported, warn_of_slow_dtype
from vllm_qfilters.methods.catalog import METHODS
from vllm_qfilters.policy import Policy, resolve

_MARK = "_kv_compression_patched"


def apply_patches() -> None:
    """Applies all patches once per process."""
    if getattr(EngineArgs, _MARK, False):
        return
    EngineArgs.add_cli_args = staticmethod(_with_cli_args(EngineArgs.add_cli_args))
    EngineArgs.from_cli_args = classmethod(_with_kv_compression(EngineArgs.from_cli_args.__func__))
    EngineArgs.create_engine_config = _with_config_check(EngineArgs.create_engine_config)
    InputProcessor.process_inputs = _with_request_check(InputProcessor.process_inputs)
    StatLoggerManager.__init__ = _with_stat_logger(StatLoggerManager.__init__)
    vllm.plugins.load_endpoint_plugins = _with_endpoint(vllm.plugins.load_endpoint_plugins)
    setattr(EngineArgs, _MARK, True)


def _with_cli_args(add_cli_args):
    @functools.wraps(add_cli_args)
    def wrapper(parser):
        parser = add_cli_args(parser)
        group = parser.add_argument_group(
            "KVCompressionConfig", "Bounds the KV cache of every sequence (vllm-qfilters)."
        )
        group.add_argument(
            "--kv-compression",
            choices=sorted(METHODS),
            default=None,
            help="Keep the KV cache of every sequence within a budget. "
            + "; ".join(f"{name}: {entry.summary}" for name, entry in METHODS.items())
            + ". Off unless given.",
        )
        group.add_argument(
            "--kv-compression-config",
            type=_json_object,
            default=None,
            help=f"JSON, or dotted keys as in --kv-compression-config.budget 1024. Defaults: "
            f"{json.dumps({k: v for k, v in resolve(KVCompressionConfig()).to_dict().items() if k != 'method'})}. "
            "A request sets its own budget with vllm_xargs={'kv_budget': 512}; 0 switches compression off for it.",
        )
        return parser

    return wrapper


def _with_kv_compression(from_cli_args):
    @functools.wraps(from_cli_args)
    def wrapper(cls, args: argparse.Namespace):
        engine_args = from_cli_args(cls, args)
        method, options = getattr(args, "kv_compression", None), getattr(args, "kv_compression_config", None)
        if method is not None:
            apply_kv_compression(engine_args, method, options or {})
        elif options is not None:
            raise ValueError(
                "--kv-compression-config does nothing without --kv-compression METHOD: add it, e.g. --kv-compression qfilters"
            )
        return engine_args

    return wrapper


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"budget": 1024}}')
    return value


def _with_config_check(create_engine_config):
    @functools.wraps(create_engine_config)
    def wrapper(self: EngineArgs, *args: Any, **kwargs: Any):
        vllm_config = create_engine_config(self, *args, **kwargs)
        policy = Policy.from_vllm_config(vllm_config)
        if policy is not None:
            check_supported(policy, vllm_config)
            warn_of_slow_dtype(self.dtype, vllm_config)
        return vllm_config

    return wrapper


def _with_request_check(process_inputs):
    @functools.wraps(process_inputs)
    def wrapper(self: InputProcessor, *args: Any, **kwargs: Any):
        request = process_inputs(self, *args, **kwargs)
        policy = Policy.from_vllm_config(self.vllm_config)
        if policy is not None:
            check_request(policy, self.vllm_config, request)
        return request

    return wrapper


def _with_stat_logger(init):
    @functools.wraps(init)
    def wrapper(self: StatLoggerManager, vllm_config: VllmConfig, *args: Any, **kwargs: Any):
        init(self, vllm_config, *args, **kwargs)
        if KVCompressionConfig.from_vllm_config(vllm_config) is not None:
            self.stat_loggers.insert(0, KVCompressionStatLogger(vllm_config, self.engine_indexes))

    return wrapper


def _with_endpoint(load_endpoint_plugins):
    @functools.wraps(load_endpoint_plugins)
    def wrapper(supported_tasks=None):
        from vllm_qfilters.frontend.endpoint import (
            KVCompressionEndpoint,
        )  # the API server alone has a web framework at hand

        loaded = load_endpoint_plugins(supported_tasks)
        is_eligible = set(KVCompressionEndpoint.required_tasks) & set(supported_tasks or ())
        return [*loaded, KVCompressionEndpoint()] if is_eligible else loaded

    return wrapper
