"""``GET /kv_compression``: the sequences a server is running, and what each holds in the KV cache. Runs in the API
server.

An endpoint plugin as vLLM defines it (``vllm/plugins/endpoint_plugins``); compat.py loads it. It asks the engine
nothing: the list comes with the statistics of every step, where ``endpoint`` is configured.
"""

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.datastructures import State

from vllm_qfilters.frontend.compat import patch_beam_search
from vllm_qfilters.frontend.metrics import KVCompressionStatLogger

router = APIRouter()


@router.get("/kv_compression")
async def running_sequences(request: Request) -> dict[str, Any]:
    """The running sequences of each engine, as of a step of the last 0.1 s; a budget of null: compression is off for
    the request.
    """
    stat_logger: KVCompressionStatLogger = request.app.state.kv_compression
    return {
        "sequences": [
            {"engine": engine, **sequence._asdict()}
            for engine, sequences in stat_logger.sequences.items()
            for sequence in sequences
        ]
    }


class KVCompressionEndpoint:
    """A ``vllm.plugins.endpoint_plugins.interface.EndpointPlugin`` that adds nothing to servers not asked to."""

    name = "kv_compression"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        if getattr(app.state.args, "kv_compression", None) is not None:
            patch_beam_search()
        if _is_wanted(app.state.args):
            app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        if _is_wanted(args):
            loggers = engine_client.logger_manager.stat_loggers
            (state.kv_compression,) = (each for each in loggers if isinstance(each, KVCompressionStatLogger))


def _is_wanted(args: Namespace) -> bool:
    return bool((getattr(args, "kv_compression_config", None) or {}).get("endpoint"))
