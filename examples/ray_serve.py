"""Replicas of a server with compressed KV caches, behind one port, with Ray Serve.

    pip install 'vllm-qfilters[serve]'
    python examples/ray_serve.py --replicas 2 --port 8000 MODEL --kv-compression qfilters \\
        --kv-compression-config.budget 1024

Every replica is a whole server with an engine of its own, and takes the flags of ``vllm serve``. Ray Serve balances
requests over the replicas, and replaces one whose engine died. On a cluster (RAY_ADDRESS) it puts them where there are
GPUs for them. A file of filters must exist on each machine. Any one of the replicas answers ``/metrics``.
"""

import argparse
import contextlib
import types
from typing import Any

import ray
from ray import serve
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser


def parse(flags: list[str]) -> argparse.Namespace:
    """Reads the flags as ``vllm serve`` does."""
    load_general_plugins()
    args = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(flags)
    args.model = args.model_tag or args.model
    validate_parsed_serve_args(args)
    return args


@serve.deployment(max_ongoing_requests=256, health_check_period_s=2)  # replaced after three that fail
@serve.ingress()
class Replica:
    """vLLM's OpenAI server without its HTTP socket, which is Ray Serve's."""

    async def __init__(self, flags: list[str]) -> None:
        args = parse(flags)
        self._lifetime = contextlib.AsyncExitStack()
        self._engine = await self._lifetime.enter_async_context(build_async_engine_client(args))
        tasks = await self._engine.get_supported_tasks()
        self._app = build_app(args, tasks, self._engine.model_config)
        await init_app_state(self._engine, self._app.state, args, tasks)
        # vLLM tells this server to end when its engine dies. Ray Serve sees to that instead.
        self._app.state.server = types.SimpleNamespace()

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def check_health(self) -> None:
        """Raises if the engine is dead, whereupon Ray Serve replaces the replica."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        await self._lifetime.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options, flags = parser.parse_known_args()
    args = parse(flags)  # here, so that not every replica says what is wrong with them
    ray.init()
    if current_platform.is_cpu():
        cores = max(1, int(ray.cluster_resources()["CPU"]) // options.replicas)
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(cores)}
        resources = {"num_cpus": cores, "runtime_env": {"env_vars": environment}}
    else:
        resources = {"num_gpus": args.tensor_parallel_size * args.pipeline_parallel_size}
    serve.start(http_options={"host": options.host, "port": options.port})
    application = Replica.options(num_replicas=options.replicas, ray_actor_options=resources).bind(flags)
    serve.run(application, blocking=True)


if __name__ == "__main__":
    main()
