"""Days of evictions in seconds: the scheduler and its block manager without a model. Do counts, pages or memory drift
apart?

Pages hold 2 tokens, so that a compaction is due at every second token. The workers are stood for by one that keeps what
workers keep, and checks each plan against it: lengths, block tables, evicted tokens.
"""

import collections
import random
import types

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.engines import ANY_BUDGET
from vllm_qfilters import kv_compression
from vllm_qfilters.core.page_scheduler import QFiltersPageScheduler
from vllm_qfilters.core.scheduler import QFiltersScheduler
from vllm_qfilters.core.spec import QFiltersPageSpec, QFiltersSpec
from vllm_qfilters.messages import QFiltersModelRunnerOutput
from vllm_qfilters.worker.lengths import ResidentLengths

BLOCK, NUM_BLOCKS, BUDGET, CHUNK = 2, 800, 48, 32
COMPACTIONS = 25_000  # in each of the four
ONE_TOKEN_REQUESTS = 12 * 60 * 60  # twelve hours of one a second
IN_FLIGHT = 2  # steps scheduled before the output of the first one is looked at, as with async scheduling


class Worker:
    """Keeps a sequence's pages and counts from scheduler outputs alone; answers with any token."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.pages: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.lengths = ResidentLengths()
        self.num_prompt: dict[str, int] = {}
        self.cuts_behind_prompts: dict[str, int] = {}  # positions of the last ones
        self.num_compactions = self.evicted_tokens = 0

    def step(self, output: SchedulerOutput) -> None:
        ended = set(output.finished_req_ids) | set(output.preempted_req_ids or ())
        self.lengths.forget(ended)
        for req_id in ended:
            self.pages.pop(req_id, None)
            self.computed.pop(req_id, None)
            self.cuts_behind_prompts.pop(req_id, None)
        for hit in output.prefix_hits:
            self.lengths.add(hit.req_id, hit.evicted_tokens)
        for row in output.compaction.compactions:
            assert row.position == self.computed[row.req_id]
            assert row.resident_tokens == row.position - self.lengths._evicted.get(row.req_id, 0)
            seen_up_to = self.cuts_behind_prompts.get(row.req_id, row.position - row.resident_tokens)
            assert row.unobserved_tokens == row.position - seen_up_to
            if row.position >= self.num_prompt[row.req_id]:
                self.cuts_behind_prompts[row.req_id] = row.position
            before, after = self.pages[row.req_id], list(row.block_ids)
            assert len(before) - len(after) == row.evicted_tokens // BLOCK > 0
            copied = {page for _, page in row.copied_pages}
            assert [page for page in after if page not in copied] == [page for page in before if page in after]
            self.pages[row.req_id] = after
            self.lengths.add(row.req_id, row.evicted_tokens)
            self.num_compactions += 1
            self.evicted_tokens += row.evicted_tokens
        for new in output.scheduled_new_reqs:
            self.pages[new.req_id], self.computed[new.req_id] = list(new.block_ids[0]), new.num_computed_tokens
            self.num_prompt[new.req_id] = len(new.prompt_token_ids)
        cached = output.scheduled_cached_reqs
        for req_id, new_pages, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if req_id in cached.resumed_req_ids:
                self.pages[req_id] = []
            self.pages[req_id] += new_pages[0] if new_pages else []
            self.computed[req_id] = computed
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            self.computed[req_id] += num_tokens
            resident = self.computed[req_id] - self.lengths._evicted.get(req_id, 0)
            assert resident <= len(self.pages[req_id]) * BLOCK < resident + BLOCK

    def answer(self, output: SchedulerOutput, samples: dict[str, bool]) -> ModelRunnerOutput:
        req_ids = list(output.num_scheduled_tokens)
        sampled = [[self.rng.randrange(3, 500)] if samples[req_id] else [] for req_id in req_ids]
        answer = ModelRunnerOutput(req_ids, {req_id: i for i, req_id in enumerate(req_ids)}, sampled)
        scores = tuple(self.rng.random() for _ in output.pages_to_score)
        return QFiltersModelRunnerOutput.from_output(answer, page_scores=scores) if scores else answer


class Simulation:
    """An engine whose workers are stood for by ``make_worker(rng)``; policy: vLLM's, of scheduling; options: of the
    compression, beside the usual ones."""

    def __init__(
        self,
        model,
        granularity: str,
        log_stats: bool,
        evict: str,
        seed: int = 0,
        make_worker=Worker,
        policy: str = "fcfs",
        **options,
    ) -> None:
        options = dict(
            budget=BUDGET, window=12, sinks=2, interval=BLOCK, chunk=CHUNK, granularity=granularity, evict=evict
        ) | ANY_BUDGET | options  # fmt: skip
        args = EngineArgs(
            str(model), skip_tokenizer_init=True, dtype="float32", block_size=BLOCK, max_model_len=2048,
            max_num_seqs=64, max_num_batched_tokens=512, scheduling_policy=policy,
            **kv_compression("random_once", **options),
        )  # fmt: skip
        config = args.create_engine_config()
        config.cache_config.num_gpu_blocks = NUM_BLOCKS
        spec_cls, scheduler_cls = {
            "layer": (QFiltersSpec, QFiltersScheduler), "page": (QFiltersPageSpec, QFiltersPageScheduler)
        }[granularity]  # fmt: skip
        attention = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        spec = spec_cls.from_attention(attention, BLOCK, BUDGET + CHUNK, num_planes=1)
        self.scheduler = scheduler_cls(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=log_stats,
        )
        hash_fn = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self.hasher = get_request_block_hasher(BLOCK, hash_fn)
        self.rng = random.Random(seed)
        self.prefixes = [[self.rng.randrange(3, 500) for _ in range(length)] for length in (16, 40, 100)]
        self.worker = make_worker(self.rng)
        self.in_flight: collections.deque = collections.deque()
        self.added = self.ended = self.preemptions = 0
        self.sums = collections.Counter()

    def add(self, max_tokens: int | None = None) -> None:
        prompt = self.rng.choice([[], *self.prefixes]) + [
            self.rng.randrange(3, 500) for _ in range(self.rng.randint(1, 60))
        ]
        extra_args = self.rng.choice([None, None, None, {"kv_budget": 32}, {"kv_budget": 0.9}, {"kv_budget": 0}])
        most = 60 if extra_args == {"kv_budget": 0} else 900
        max_tokens = max_tokens or self.rng.randint(1, most)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args)
        request = Request(f"simulated-{self.added}", prompt, params, None, block_hasher=self.hasher)
        self.added += 1
        self.scheduler.add_request(request)

    def step(self) -> None:
        scheduler = self.scheduler
        output = scheduler.schedule()
        self.worker.step(output)
        samples = {req_id: not scheduler.requests[req_id].is_prefill_chunk for req_id in output.num_scheduled_tokens}
        self.preemptions += len(output.preempted_req_ids or ())
        self.in_flight.append((output, self.worker.answer(output, samples)))
        if len(self.in_flight) >= IN_FLIGHT:
            self.receive()

    def receive(self) -> None:
        for outputs in self.scheduler.update_from_output(*self.in_flight.popleft()).values():
            self.ended += sum(output.finish_reason is not None for output in outputs.outputs)

    def run(self, num_compactions: int) -> None:
        """Serves until there were so many more, and then what is left."""
        scheduler, stats = self.scheduler, self.scheduler.compression_stats
        end, number = stats.compactions + num_compactions, 0
        while stats.compactions < end:
            while len(scheduler.requests) < 36:
                self.add()
            if self.rng.random() < 0.01:
                scheduler.finish_requests(self.rng.choice(list(scheduler.requests)), RequestStatus.FINISHED_ABORTED)
                self.ended += 1
            self.step()
            number += 1
            if number % 250 == 0:
                self.audit()
        self.finish()

    def finish(self) -> None:
        """Serves what is left."""
        for _ in range(10_000):
            if not self.scheduler.requests and not self.in_flight:
                break
            self.step()
        for _ in range(IN_FLIGHT):
            self.step()
        while self.in_flight:
            self.receive()

    def audit(self) -> None:
        """Every page is free or held by whom it counts, and both processes know the same."""
        pages, pool = self.scheduler.block_manager, self.scheduler.kv_cache_manager.block_pool
        holders = collections.Counter(block.block_id for blocks in pages.req_to_blocks.values() for block in blocks)
        assert all(block.ref_cnt == holders[block.block_id] for block in pool.blocks if not block.is_null)
        assert pool.get_num_free_blocks() == NUM_BLOCKS - 1 - len(holders)
        assert set(pages.evicted) <= set(pages.req_to_blocks) and set(pages.limits) <= set(self.scheduler.requests)
        assert set(pages.evicted) <= {request.request_id for request in self.scheduler.running}
        assert all(tokens > 0 for tokens in pages.evicted.values()) and pages.all_evicted == sum(pages.evicted.values())
        computed = sum(request.num_computed_tokens for request in self.scheduler.running)
        assert self.scheduler._computed_tokens == computed
        for request in self.scheduler.running:
            req_id = request.request_id
            assert self.worker.pages[req_id] == [block.block_id for block in pages.req_to_blocks[req_id]]
            assert self.worker.lengths._evicted.get(req_id, 0) == pages.evicted.get(req_id, 0)
        stats = self.scheduler.compression_stats
        assert (stats.compactions, stats.evicted_tokens) == (self.worker.num_compactions, self.worker.evicted_tokens)
        assert stats.freed_pages > 0
        if hasattr(pages, "block_scores"):
            assert pages.block_scores.shape == (NUM_BLOCKS,) and len(pages._awaited) < NUM_BLOCKS

    def audit_ended(self) -> None:
        """All requests ended, and nobody holds anything of them."""
        assert self.added == self.ended and not self.scheduler.requests
        assert self.scheduler._computed_tokens == self.scheduler.block_manager.all_evicted == 0
        assert not self.worker.lengths._evicted and not self.worker.pages
        assert self.scheduler.reset_prefix_cache()

    def remembered(self) -> int:
        total, names = reachable(self.scheduler)
        assert not names, f"requests that ended are remembered: {sorted(names)[:3]}"
        return total


def reachable(root: object) -> tuple[int, set[str]]:
    """What the scheduler remembers: the sum of the lengths of all containers, and the names of simulated requests in
    them.
    """
    seen, stack, total, names = set(), [root], 0, set()
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, type | types.ModuleType | types.FunctionType | types.MethodType):
            continue
        seen.add(id(value))
        if isinstance(value, str):
            names.update([value] if value.startswith("simulated-") else [])
        elif isinstance(value, dict):
            total += len(value)
            stack.extend([*value.keys(), *value.values()])
        elif isinstance(value, list | tuple | set | frozenset | collections.deque):
            total += len(value)
            stack.extend(value)
        elif type(value).__module__.startswith(("vllm.v1", "vllm_qfilters")):
            fields = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
            stack.extend(getattr(value, name) for name in fields if hasattr(value, name) and name != "__weakref__")
            stack.append(getattr(value, "__dict__", None))
    return total, names


@pytest.mark.parametrize(
    "granularity, log_stats, evict",
    [
        ("layer", False, "always"),
        ("page", True, "always"),
        ("layer", True, "pressure"),
        ("page", False, "pressure"),
    ],
)
def test_nothing_leaks_or_drifts_in_a_hundred_thousand_compactions(granularity, log_stats, evict, tiny_model):
    simulation = Simulation(tiny_model, granularity, log_stats, evict)
    scheduler, remembered = simulation.scheduler, []
    for share in (0.1, 0.9):
        simulation.run(int(share * COMPACTIONS))
        simulation.audit()
        simulation.audit_ended()
        remembered.append(simulation.remembered())
    assert scheduler.compression_stats.compactions >= COMPACTIONS
    assert simulation.preemptions > 2, "the cache was not small enough to preempt"
    assert remembered[1] <= remembered[0] + 16, "something grows"


@pytest.mark.parametrize("granularity, evict", [("layer", "always"), ("page", "pressure")])
def test_nothing_leaks_in_twelve_hours_of_one_token_requests(granularity, evict, tiny_model):
    simulation = Simulation(tiny_model, granularity, True, evict)
    scheduler, remembered = simulation.scheduler, []
    for end in (ONE_TOKEN_REQUESTS // 10, ONE_TOKEN_REQUESTS):
        while simulation.added < end:
            while len(scheduler.requests) < 36:
                simulation.add(max_tokens=1)
            simulation.step()
        simulation.finish()
        simulation.audit_ended()
        remembered.append(simulation.remembered())
    assert remembered[1] <= remembered[0] + 16, "something grows"


@pytest.mark.parametrize("granularity, evict", [("layer", "always"), ("page", "always"), ("layer", "pressure")])
def test_a_long_prompt_that_is_preempted_again_and_again_ends(granularity, evict, tiny_model):
    simulation = Simulation(tiny_model, granularity, True, evict)
    scheduler, rng = simulation.scheduler, simulation.rng
    prompt = [rng.randrange(3, 500) for _ in range(1500)]
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    scheduler.add_request(Request("simulated-long", prompt, params, None, block_hasher=simulation.hasher))
    simulation.added += 1
    preempted = set()
    for number in range(4000):
        if "simulated-long" not in scheduler.requests:
            break
        while len(scheduler.requests) < 5:
            simulation.add()
        if number % 7 == 6 and len(preempted) < 100:
            # As vLLM's weight updates do: all that run lose their pages, and start over.
            scheduler.reset_prefix_cache(reset_running_requests=True)
        simulation.step()
        request = scheduler.requests.get("simulated-long")
        if request is not None:
            preempted.add(request.num_preemptions)
    assert len(preempted) > 15, "it was not preempted often"
    simulation.finish()
    simulation.audit_ended()
