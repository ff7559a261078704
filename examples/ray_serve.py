"""Replicas of a server with compressed KV caches, behind one port, with Ray Serve.

    pip install 'vllm-qfilters[serve]'
    python examples/ray_serve.py --replicas 2 --port 8000 MODEL --kv-compression qfilters --kv-compression-config.budget
    1024

Every replica is a whole server with an engine of its own, and takes the flags of ``vllm serve``. Ray Serve balances
requests over them, and replaces a replica whose engine died. On a cluster (RAY_ADDRESS) replicas are put where there
are GPUs for them; filters given as a file must be there on each machine. ``/metrics`` is answered by any one of the
replicas.
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
    """As ``vllm serve`` does."""
    load_general_plugins()
    args = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(flags)
    args.model = args.model_tag or args.model
    validate_parsed_serve_args(args)
    return args


@serve.deployment(max_ongoing_requests=256, health_check_period_s=2)  # three that fail: it is replaced
@serve.ingress()
class Replica:
    """vLLM's OpenAI server without its HTTP socket: that is Ray Serve's."""

    async def __init__(self, flags: list[str]) -> None:
        args = parse(flags)
        self._lifetime = contextlib.AsyncExitStack()
        self._engine = await self._lifetime.enter_async_context(build_async_engine_client(args))
        tasks = await self._engine.get_supported_tasks()
        self._app = build_app(args, tasks, self._engine.model_config)
        await init_app_state(self._engine, self._app.state, args, tasks)
        self._app.state.server = (
            types.SimpleNamespace()
        )  # that vLLM tells to end when its engine dies: Ray Serve sees to that

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def check_health(self) -> None:
        """Raises where the engine is dead: the replica is then replaced."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        await self._lifetime.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options, flags = parser.parse_known_args()
    args = parse(flags)  # what is wrong with them is said here, and not by every replica
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
