"""The scheduler: decides before every step which running sequences evict how many tokens.

Runs in the engine process. Freed pages are back in the pool before vLLM's own scheduling begins, so they serve other
requests in the same step; which tokens go is the workers' business (worker/compactor.py).
"""

import dataclasses
import time
from collections import Counter
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_qfilters.core.manager import QFiltersManager
from vllm_qfilters.core.page_manager import PageManager
from vllm_qfilters.core.spec import QFiltersPageSpec, QFiltersSpec
from vllm_qfilters.messages import QFiltersModelRunnerOutput, QFiltersSchedulerOutput
from vllm_qfilters.plan import CompactionPlan
from vllm_qfilters.policy import Policy
from vllm_qfilters.stats import KVCompressionStats, RunningSequence, attach_stats

logger = init_logger("vllm.kv_compression")  # below "vllm", whose handlers print it

LOG_INTERVAL_SECONDS = 10.0  # as vLLM's own statistics line


def _awaits_last_token(request: Request) -> bool:
    """Whether all tokens of a request are computed, the last under asynchronous scheduling: vLLM, by the same sum in
    ``Scheduler.schedule``, schedules no other step for it, and an eviction would serve nobody."""
    known_tokens = request.num_computed_tokens + 2 - request.num_output_placeholders
    return request.num_output_placeholders > 0 and known_tokens >= request.num_prompt_tokens + request.max_tokens


@dataclasses.dataclass
class _History:
    """How often a request evicted tokens, and the most tokens it held before; both over its preemptions too."""

    evictions: int = 0
    peak_tokens: int = 0


class QFiltersScheduler(AsyncScheduler):
    """Plans evictions, then lets vLLM schedule. Serves with and without async scheduling.

    Speculative decoding does not change what is evicted: a step gets no more drafts than the budget has room for, and a
    sequence is cut when all its tokens are verified. Under async scheduling it sits out steps until they are.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        # Built-in specs first: the registry fills itself only while it is empty.
        KVCacheSpecRegistry._ensure_registered(vllm_config)
        KVCacheSpecRegistry.register(QFiltersSpec, QFiltersManager, FullAttentionSpec)
        KVCacheSpecRegistry.register(QFiltersPageSpec, PageManager, FullAttentionSpec)
        super().__init__(vllm_config, *args, **kwargs)
        policy = Policy.from_vllm_config(self.vllm_config)
        assert policy is not None, "vLLM finds this scheduler by a configuration that has KV compression"
        self.compression = policy
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, QFiltersManager), (
            f"pages are managed by {type(manager).__name__}, not QFiltersManager"
        )
        self.block_manager = manager
        self.compression_stats = KVCompressionStats()
        if self.vllm_config.speculative_config is not None and self.dynamic_sd_lookup is None:
            # The same number of drafts for every batch size: vLLM then does not pad the last token of a prompt with
            # drafts of id -1, which would be computed beyond cuts, and which CPUs find no embedding for.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        # By request: draft tokens of steps whose output is still to come.
        self.unverified_drafts: Counter[str] = Counter()
        self._sitting_out: set[str] = set()  # requests that are to be cut, but not in the step being scheduled
        self._sent_stats = KVCompressionStats()
        self._histories: dict[str, _History] = {}
        self._next_log_time = time.monotonic() + LOG_INTERVAL_SECONDS

    def add_request(self, request: Request) -> None:
        extra_args = request.sampling_params.extra_args if request.sampling_params else None
        limits = self.compression.request_limits(extra_args, request.num_prompt_tokens, self.block_size)
        if limits is not None:
            self.block_manager.limits[request.request_id] = limits
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> QFiltersSchedulerOutput:
        self._sitting_out.clear()
        plan = self._plan_compaction()
        output = super().schedule(throttle_prefills)
        for req_id, drafts in output.scheduled_spec_decode_tokens.items():
            self.unverified_drafts[req_id] += len(drafts)
        # A request preempted meanwhile has lost its pages and its count of evicted tokens: its row is void.
        rows = tuple(row for row in plan.compactions if row.req_id in self.block_manager.evicted)
        for row in rows:
            history = self._histories.setdefault(row.req_id, _History())
            history.evictions += 1
            history.peak_tokens = max(history.peak_tokens, row.resident_tokens)
        self.compression_stats.compactions += len(rows)
        self.compression_stats.evicted_tokens += sum(row.evicted_tokens for row in rows)
        return QFiltersSchedulerOutput.from_output(output, CompactionPlan(rows))

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        for req_id, drafts in scheduler_output.scheduled_spec_decode_tokens.items():
            self.unverified_drafts[req_id] -= len(drafts)
            if not self.unverified_drafts[req_id]:
                del self.unverified_drafts[req_id]
        if isinstance(model_runner_output, QFiltersModelRunnerOutput):
            self.compression_stats.compaction_seconds += model_runner_output.compaction_seconds
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            # Only running sequences have evicted tokens: the others gave up their pages, and the count with them.
            evicted_tokens = sum(self.block_manager.evicted.values())
            computed_tokens = sum([request.num_computed_tokens for request in self.running])
            self.compression_stats.resident_tokens = computed_tokens - evicted_tokens
            self.compression_stats.compressed_requests = len(self.block_manager.evicted)
            self.compression_stats.saved_pages = evicted_tokens // self.block_size
            if self.compression.endpoint:
                self.compression_stats.sequences = [self._running_sequence(request) for request in self.running]
            attach_stats(stats, self.compression_stats.take_news(self._sent_stats))
            self._log_stats()
        return stats

    def _plan_compaction(self) -> CompactionPlan:
        rows = []
        for request in list(self.running):
            if request.status != RequestStatus.RUNNING:
                continue  # preempted for one before it
            if _awaits_last_token(request):
                continue
            evicted_tokens = self._evicted_tokens_due(request)
            if not evicted_tokens:
                continue
            while (row := self.block_manager.plan_eviction(request, evicted_tokens)) is None:
                if self._preempt_lowest_priority() is request:
                    break
            else:
                rows.append(row)
        # Only now: a page one request gives up must not be the private page another one copies into in the same plan.
        self.compression_stats.freed_pages += self.block_manager.release()
        return CompactionPlan(tuple(rows))

    def _preempt_lowest_priority(self) -> Request:
        """Preempts the running request vLLM would preempt for want of a page, and returns it."""
        if self.policy == SchedulingPolicy.PRIORITY:
            victim = max(self.running, key=lambda request: (request.priority, request.arrival_time))
        else:
            victim = self.running[-1]
        self.running.remove(victim)
        # It may be resumed in this very step, as after reset_prefix_cache: the worker must then not think it went on
        # running.
        self._preempt_request(victim, time.monotonic(), drop_stale_output=True)
        self.prev_step_scheduled_req_ids.discard(victim.request_id)
        return victim

    def _evicted_tokens_due(self, request: Request) -> int:
        limits = self.block_manager.limits.get(request.request_id)
        if limits is None:
            return 0
        if request.is_prefill_chunk and not limits.is_prefill_cut(request.num_computed_tokens):
            return 0
        evicted_tokens = limits.evicted_tokens(
            self.block_manager.resident_tokens(request), request.is_prefill_chunk, self.block_size
        )
        if evicted_tokens and self._sits_out(request, evicted_tokens):
            self._sitting_out.add(request.request_id)
            return 0
        return evicted_tokens

    def _sits_out(self, request: Request, evicted_tokens: int) -> bool:
        """Whether a sequence about to lose ``evicted_tokens`` has to wait for the output of a step.

        Computing no token meanwhile, it stays within its budget, and is cut at the same position as without async
        scheduling.
        """
        return request.request_id in self.unverified_drafts

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        longest = self._longest_prefix_cache_hit(request)
        if longest is not None and num_tokens > longest:
            num_tokens = longest
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_tokens)
        return blocks, num_tokens, boundary, diverged

    def _longest_prefix_cache_hit(self, request: Request) -> int | None:
        """Tokens, whole pages; None: no limit. Within it a hit changes nothing of what is evicted."""
        limits = self.block_manager.limits.get(request.request_id)
        if limits is None or request.num_prompt_tokens + request.max_tokens <= limits.budget:
            return None
        # The queries that will be observed must be computed. A hit up to a cut would hold more than the budget and a
        # chunk, and skip the cut that a cold prompt gets there.
        ends = [request.num_prompt_tokens]
        if limits.first_prefill_cut is not None:
            ends.append(limits.first_prefill_cut)
        return max(0, min(ends) - max(1, self.compression.observed_queries)) // self.block_size * self.block_size

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        # vLLM asks here, for running and waiting requests alike, how many tokens a step may compute. It skips a running
        # request for which that is 0.
        if request.request_id in self._sitting_out:
            return 0
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        limits = self.block_manager.limits.get(request.request_id)
        if limits is None:
            return num_new_tokens
        if request.status == RequestStatus.RUNNING and not request.is_prefill_chunk:
            return min(num_new_tokens, limits.budget - self.block_manager.resident_tokens(request))  # the drafts too
        to_next_cut = limits.tokens_to_next_cut(num_computed_tokens)
        return num_new_tokens if to_next_cut is None else min(num_new_tokens, to_next_cut)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        self._vllm_scheduler()._update_after_schedule(scheduler_output)

    def _update_request_with_output(self, request: Request, *args: Any, **kwargs: Any) -> tuple[list[int], bool]:
        updated: tuple[list[int], bool] = self._vllm_scheduler()._update_request_with_output(request, *args, **kwargs)
        return updated

    def _vllm_scheduler(self) -> Any:
        """What would schedule in our place: only under async scheduling do placeholders stand in for tokens still to
        come.
        """
        return super() if self.scheduler_config.async_scheduling else super(AsyncScheduler, self)

    def _free_blocks(self, request: Request) -> None:
        history = self._histories.pop(request.request_id, _History())
        peak_tokens = max(history.peak_tokens, self.block_manager.resident_tokens(request))
        if self.log_stats and peak_tokens:
            self.compression_stats.request_resident_tokens.append(peak_tokens)
        super()._free_blocks(request)
        self.block_manager.limits.pop(request.request_id, None)

    def _running_sequence(self, request: Request) -> RunningSequence:
        limits, history = self.block_manager.limits.get(request.request_id), self._histories.get(request.request_id)
        return RunningSequence(
            request_id=request.request_id,
            prompt_tokens=request.num_prompt_tokens,
            position=request.num_computed_tokens,
            resident_tokens=self.block_manager.resident_tokens(request),
            budget=None if limits is None else limits.budget,
            evictions=0 if history is None else history.evictions,
        )

    def _log_stats(self) -> None:
        now = time.monotonic()
        if now >= self._next_log_time:
            self._next_log_time = now + LOG_INTERVAL_SECONDS
            logger.info("%s", self.compression_stats)
