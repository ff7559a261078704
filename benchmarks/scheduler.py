"""Measures what a step costs in the scheduler, with many requests decoding: no model runs, any token is sampled.

    python -m benchmarks scheduler models/SmolLM2-135M-Instruct [--requests 1024] [--steps 400]

The model's configuration is read, and not its weights. All requests decode; each is cut every ``interval`` steps, at
its own time. What ours takes beyond plain vLLM's scheduler is what its own loops cost. Milliseconds are the
CPU's, which other processes change little.
"""

import argparse
import collections
import random
import statistics
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.case import Case, Numbers

BLOCK = 16
PARTS = ("schedule", "update_from_output", "make_stats")
MOST_PROMPT_TOKENS = 256


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=1024, help="that decode; default %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="that are measured; default %(default)s")
    parser.add_argument("--budget", type=int, default=256, help="tokens; default %(default)s")


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    return {
        "plain": {"compression": None},
        "layer": {"compression": {"method": "knorm"}},
        "page": {"compression": {"method": "knorm", "granularity": "page"}},
        "pressure": {"compression": {"method": "knorm", "evict": "pressure"}},
    }


def measure(job: dict[str, Any]) -> Numbers:
    from vllm.v1.outputs import ModelRunnerOutput

    from vllm_qfilters.messages import QFiltersModelRunnerOutput

    scheduler, numbers = make_scheduler(job), random.Random(0)
    warm_up = 2 * job["budget"]
    for request in make_requests(scheduler, job, numbers, warm_up + job["steps"] + MOST_PROMPT_TOKENS):
        scheduler.add_request(request)
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    in_flight: collections.deque[Any] = collections.deque()

    def timed(part: str, *arguments: Any) -> Any:
        begin = time.thread_time()
        result = getattr(scheduler, part)(*arguments)
        seconds[part].append(time.thread_time() - begin)
        return result

    for _ in range(warm_up + job["steps"]):
        output = timed("schedule")
        req_ids = list(output.num_scheduled_tokens)
        sampled = [[7] if not scheduler.requests[req_id].is_prefill_chunk else [] for req_id in req_ids]
        answer = ModelRunnerOutput(req_ids, {req_id: i for i, req_id in enumerate(req_ids)}, sampled)
        if getattr(output, "pages_to_score", ()):
            scores = tuple(numbers.random() for _ in output.pages_to_score)
            answer = QFiltersModelRunnerOutput.from_output(answer, page_scores=scores)
        in_flight.append((output, answer))
        if len(in_flight) == 2:  # as with asynchronous scheduling
            timed("update_from_output", *in_flight.popleft())
        timed("make_stats")
    found: Numbers = {
        f"{part}_ms": 1e3 * statistics.mean(of_part[-job["steps"] :]) for part, of_part in seconds.items()
    }
    compactions = getattr(getattr(scheduler, "compression_stats", None), "compactions", 0)
    return {**found, "step_ms": sum(found.values()), "compactions": compactions, "running": len(scheduler.running)}


def make_scheduler(job: dict[str, Any]) -> Any:
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_qfilters import kv_compression
    from vllm_qfilters.core.page_scheduler import QFiltersPageScheduler
    from vllm_qfilters.core.scheduler import QFiltersScheduler
    from vllm_qfilters.core.spec import QFiltersPageSpec, QFiltersSpec

    wanted, options = job["compression"], {}
    if wanted is not None:
        options = kv_compression(**{"budget": job["budget"], "sinks": 4, **job["options"], **wanted})
    most_tokens = 4 * job["budget"] + job["steps"] + MOST_PROMPT_TOKENS
    args = EngineArgs(
        job["model"],
        skip_tokenizer_init=True,
        block_size=BLOCK,
        max_model_len=most_tokens,
        max_num_seqs=job["requests"],
        max_num_batched_tokens=8192,
        **{**job["llm"], **options},
    )
    config = args.create_engine_config()
    config.scheduler_config.async_scheduling = True  # which vLLM switches off on CPUs
    num_blocks = job["requests"] * (most_tokens // BLOCK + 2)
    config.cache_config.num_gpu_blocks = num_blocks
    spec: Any = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    cls: Any = AsyncScheduler
    if wanted is not None:
        is_page = wanted.get("granularity") == "page"
        cls = QFiltersPageScheduler if is_page else QFiltersScheduler
        spec_cls = QFiltersPageSpec if is_page else QFiltersSpec
        spec = spec_cls.from_attention(spec, BLOCK, most_tokens, num_planes=1)
    return cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=True,
    )


def make_requests(scheduler: Any, job: dict[str, Any], numbers: random.Random, max_tokens: int) -> list[Any]:
    from vllm import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    hash_fn = get_hash_fn_by_name(scheduler.vllm_config.cache_config.prefix_caching_hash_algo)
    init_none_hash(hash_fn)
    hasher, requests = get_request_block_hasher(BLOCK, hash_fn), []
    for number in range(job["requests"]):
        prompt = [numbers.randrange(3, 500) for _ in range(numbers.randint(1, MOST_PROMPT_TOKENS))]
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        requests.append(Request(f"request-{number}", prompt, params, None, block_hasher=hasher))
    return requests


def ratios(of_round: Mapping[str, Numbers]) -> dict[str, float]:
    plain = of_round["plain"]["step_ms"]
    return {
        f"{variant}: ms per step beyond plain": numbers["step_ms"] - plain
        for variant, numbers in of_round.items()
        if variant != "plain"
    }


CASE = Case(
    name="scheduler",
    description=__doc__,
    add_options=add_options,
    variants=variants,
    measure=measure,
    columns={
        "step_ms": "ms per step",
        "schedule_ms": "schedule",
        "update_from_output_ms": "update",
        "make_stats_ms": "stats",
        "compactions": "compactions",
    },
    ratios=ratios,
)
main = CASE.main
