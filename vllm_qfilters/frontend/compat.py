"""Every place where vLLM is patched, because it offers no seam there. All patches are idempotent and inert without the
flag. The targets are of vLLM 0.32 and 0.33; tests/test_compat.py fails when one of their signatures changes.

``EngineArgs.add_cli_args``, ``EngineArgs.from_cli_args``
    add ``--kv-compression`` and ``--kv-compression-config``: plugins are loaded before the parser is built, but cannot
    add arguments to it. What becomes of them is left on the parsed arguments too: of these each of several API servers
    makes its own, before its plugins are loaded. They go when vLLM lets a plugin add arguments.
``EngineArgs.create_engine_config``
    refuses what cannot work before any process is started: a worker's error is buried under those of its parents. It
    goes when platforms or plugins are asked about a finished VllmConfig.
``InputProcessor.process_inputs``
    refuses a bad ``kv_budget`` with a 400 at the door: ``LogitsProcessor.validate_params`` sees neither the
    configuration nor the prompt, and is off in speculative decoding. It goes when ``validate_params`` sees the
    VllmConfig, or platforms let plugins validate requests.
``StatLoggerManager.__init__``
    puts our counters under ``/metrics``: stat logger plugins are announced in the log of every server, also where the
    feature is off, and offline engines do not load them. It goes when SchedulerStats has a field for extensions, or
    stat loggers can be named in the configuration.
``vllm.plugins.load_endpoint_plugins``
    lets ``endpoint`` add a route to the API server: entry points of that group are warned of in the log of every server
    where VLLM_PLUGINS is not set. It goes when endpoint plugins can be named in the configuration.
``VllmConfig.compute_hash``, ``startup_plan.compute_plan_fingerprint``
    let a model that was compiled under some options be used under others: additional_config is hashed whole, so that
    another budget would compile everything anew, but no option of ours changes what is compiled. Only that KV
    compression is on counts. The options do change how much memory the cache gets, which VLLM_ENABLE_STARTUP_PLAN keeps
    by the same hash: there they are counted again. Both go when vLLM lets a part of additional_config say its own hash.
``CompletionRequest.to_beam_search_params``, ``ChatCompletionRequest.to_beam_search_params``
    refuse a ``kv_budget`` with a 400: beams are requests made anew, to which vLLM hands on no ``vllm_xargs``, so that
    the budget would be lost without a word. Patched in API servers with KV compression alone, whose endpoint plugin is
    attached before the first request. They go when BeamSearchParams has ``extra_args``.
"""

import argparse
import copy
import functools
import hashlib
import inspect
import json
import weakref
from collections.abc import Callable
from typing import Any

import vllm.plugins
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.worker import startup_plan

from vllm_qfilters.config import ADDITIONAL_CONFIG_KEY, REQUEST_BUDGET_KEY, REQUEST_EVICT_KEY, KVCompressionConfig
from vllm_qfilters.frontend.engine_args import apply_kv_compression
from vllm_qfilters.frontend.metrics import KVCompressionStatLogger
from vllm_qfilters.frontend.support import (
    check_request,
    check_supported,
    warn_of_base_requests_with_adapters,
    warn_of_slow_dtype,
)
from vllm_qfilters.methods.catalog import METHODS
from vllm_qfilters.policy import Policy, resolve

Function = Callable[..., Any]

_MARK = "_kv_compression_patched"


def apply_patches() -> None:
    """Applies all patches once per process."""
    if getattr(EngineArgs, _MARK, False):
        return
    _patch(EngineArgs, "add_cli_args", _with_cli_args)
    _patch(EngineArgs, "from_cli_args", _with_kv_compression)
    _patch(EngineArgs, "create_engine_config", _with_config_check)
    _patch(InputProcessor, "process_inputs", _with_request_check)
    _patch(StatLoggerManager, "__init__", _with_stat_logger)
    _patch(vllm.plugins, "load_endpoint_plugins", _with_endpoint)
    _patch(VllmConfig, "compute_hash", _without_options)
    _patch(startup_plan, "compute_plan_fingerprint", _with_options)
    setattr(EngineArgs, _MARK, True)


def patch_beam_search() -> None:
    """Applies the patches of requests for beam search, once per API server."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for request in (CompletionRequest, ChatCompletionRequest):
        if not hasattr(request.to_beam_search_params, "__wrapped__"):
            _patch(request, "to_beam_search_params", _with_budget_refused)


def _patch(owner: Any, name: str, wrap: Callable[[Function], Function]) -> None:
    """Puts a function around one of ``owner``, which stays a static or class method if it is one."""
    original = inspect.getattr_static(owner, name)
    if isinstance(original, staticmethod | classmethod):
        setattr(owner, name, type(original)(wrap(original.__func__)))
    else:
        setattr(owner, name, wrap(original))


def _with_cli_args(add_cli_args: Function) -> Function:
    @functools.wraps(add_cli_args)
    def wrapper(parser: Any) -> Any:
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
        defaults = resolve(KVCompressionConfig()).to_dict()
        del defaults["method"]
        group.add_argument(
            "--kv-compression-config",
            type=_json_object,
            action=_Merged,
            default=None,
            help=f"JSON, or dotted keys as in --kv-compression-config.budget 1024. Defaults: {json.dumps(defaults)}; "
            "interval, chunk and prefill_interval are rounded up to the block size unless given. A request sets its "
            "own budget with vllm_xargs={'kv_budget': 512}, up to max_budget.",
        )
        return parser

    return wrapper


def _with_kv_compression(from_cli_args: Function) -> Function:
    @functools.wraps(from_cli_args)
    def wrapper(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        engine_args: EngineArgs = from_cli_args(cls, args)
        method, options = getattr(args, "kv_compression", None), getattr(args, "kv_compression_config", None)
        if method is not None:
            apply_kv_compression(engine_args, method, options or {})
            # Each of several API servers makes engine arguments of these anew, and loads plugins while it does so.
            for name in ("additional_config", "scheduler_cls", "worker_cls"):
                setattr(args, name, getattr(engine_args, name))
        elif options is not None:
            raise ValueError(
                "--kv-compression-config does nothing without --kv-compression METHOD: add it, e.g. --kv-compression "
                "qfilters"
            )
        return engine_args

    return wrapper


class _Merged(argparse.Action):
    """Collects the options of every occurrence, the last of each name: dotted keys come as one more JSON object."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **values})


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"budget": 1024}}')
    return value


def _with_config_check(create_engine_config: Function) -> Function:
    @functools.wraps(create_engine_config)
    def wrapper(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        vllm_config: VllmConfig = create_engine_config(self, *args, **kwargs)
        policy = Policy.from_vllm_config(vllm_config)
        if policy is not None:
            check_supported(policy, vllm_config)
            warn_of_slow_dtype(self.dtype, vllm_config)
            warn_of_base_requests_with_adapters(vllm_config)
        return vllm_config

    return wrapper


def _with_request_check(process_inputs: Function) -> Function:
    # Resolved at the first request of an engine: its block size is settled by then, and stays.
    policies: weakref.WeakKeyDictionary[InputProcessor, Policy | None] = weakref.WeakKeyDictionary()

    @functools.wraps(process_inputs)
    def wrapper(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        if self not in policies:
            policies[self] = Policy.from_vllm_config(self.vllm_config)
        policy = policies[self]
        if policy is not None:
            check_request(policy, self.vllm_config, request)
        return request

    return wrapper


def _with_stat_logger(init: Function) -> Function:
    @functools.wraps(init)
    def wrapper(self: StatLoggerManager, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        if KVCompressionConfig.from_vllm_config(vllm_config) is not None:
            self.stat_loggers.insert(0, KVCompressionStatLogger(vllm_config, self.engine_indexes))

    return wrapper


def _without_options(compute_hash: Function) -> Function:
    @functools.wraps(compute_hash)
    def wrapper(self: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        additional = self.additional_config
        if not isinstance(additional, dict) or ADDITIONAL_CONFIG_KEY not in additional:
            return compute_hash(self, *args, **kwargs)
        alike = copy.copy(self)
        alike.additional_config = {**additional, ADDITIONAL_CONFIG_KEY: True}
        return compute_hash(alike, *args, **kwargs)

    return wrapper


def _with_options(compute_plan_fingerprint: Function) -> Function:
    @functools.wraps(compute_plan_fingerprint)
    def wrapper(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> str:
        fingerprint: str = compute_plan_fingerprint(vllm_config, *args, **kwargs)
        config = KVCompressionConfig.from_vllm_config(vllm_config)
        if config is None:
            return fingerprint
        options = json.dumps([fingerprint, config.to_dict()], sort_keys=True)
        return hashlib.sha256(options.encode()).hexdigest()[: len(fingerprint)]

    return wrapper


def _with_budget_refused(to_beam_search_params: Function) -> Function:
    @functools.wraps(to_beam_search_params)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        lost = {REQUEST_BUDGET_KEY, REQUEST_EVICT_KEY} & set(self.vllm_xargs or {})
        if lost:
            raise VLLMValidationError(
                f"{', '.join(sorted(lost))} does nothing with use_beam_search, whose beams have the server's budget: "
                "drop one of them"
            )
        return to_beam_search_params(self, *args, **kwargs)

    return wrapper


def _with_endpoint(load_endpoint_plugins: Function) -> Function:
    @functools.wraps(load_endpoint_plugins)
    def wrapper(supported_tasks: Any = None) -> list[Any]:
        from vllm_qfilters.frontend.endpoint import KVCompressionEndpoint  # the API server alone has a web framework

        loaded: list[Any] = load_endpoint_plugins(supported_tasks)
        is_eligible = set(KVCompressionEndpoint.required_tasks) & set(supported_tasks or ())
        return [*loaded, KVCompressionEndpoint()] if is_eligible else loaded

    return wrapper
