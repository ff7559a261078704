"""The scheduler: decides before every step which running sequences evict how many tokens.

Runs in the engine process. Freed pages are back in the pool before vLLM's own scheduling begins, so they serve other
requests in the same step; which tokens go is the workers' business (worker/compactor.py).
"""

import bisect
import dataclasses
import functools
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_qfilters.budget import RequestLimits, cdiv
from vllm_qfilters.config import EVICT_PRESSURE, REQUEST_BUDGET_KEY, REQUEST_EVICT_KEY
from vllm_qfilters.core.compressed_prefixes import CompressedPrefix
from vllm_qfilters.core.manager import QFiltersManager, reads_prompt
from vllm_qfilters.core.page_manager import PageManager
from vllm_qfilters.core.spec import QFiltersPageSpec, QFiltersSpec
from vllm_qfilters.messages import QFiltersModelRunnerOutput, QFiltersSchedulerOutput
from vllm_qfilters.plan import CompactionPlan, RequestCompaction
from vllm_qfilters.policy import Policy
from vllm_qfilters.stats import KVCompressionStats, RunningSequence, attach_stats

logger = init_logger("vllm.kv_compression")  # below "vllm", whose handlers print it

LOG_INTERVAL_SECONDS = 10.0  # as vLLM's own statistics line
RECORD_INTERVAL_SECONDS = 0.1  # between records of running sequences, which are one for each
RESERVE = 0.05  # of all pages, freed beside what is wanting: cuts come in bursts, and load does not make them flap


def _awaits_last_token(request: Request) -> bool:
    """Whether all tokens of a request are computed, the last under asynchronous scheduling: vLLM, by the same sum in
    ``Scheduler.schedule``, schedules no other step for it, and an eviction would serve nobody."""
    known_tokens = request.num_computed_tokens + 2 - request.num_output_placeholders
    return request.num_output_placeholders > 0 and known_tokens >= request.num_prompt_tokens + request.max_tokens


def _started_behind(output: SchedulerOutput) -> int:
    """Tokens that requests which a step starts, anew or after a preemption, found in the prefix cache."""
    cached = output.scheduled_cached_reqs
    tokens = sum(new.num_computed_tokens for new in output.scheduled_new_reqs)
    if not cached.resumed_req_ids:
        return tokens
    resumed = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
    return tokens + sum(computed for req_id, computed in resumed if req_id in cached.resumed_req_ids)


def _waits(request: Request | None) -> bool:
    """Whether a request is still to be let in."""
    return request is not None and request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)


def _idle(blocks: Sequence[KVCacheBlock]) -> int:
    """How many pages nobody holds: they are in the prefix cache, and free."""
    return sum(block.ref_cnt == 0 and not block.is_null for block in blocks)


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
        # What would schedule in our place: only under async scheduling placeholders stand in for tokens still to come.
        self._vllm_scheduler: Any = AsyncScheduler if self.scheduler_config.async_scheduling else Scheduler
        policy = Policy.from_vllm_config(self.vllm_config)
        assert policy is not None, "vLLM finds this scheduler by a configuration that has KV compression"
        self.compression = policy
        managers = self.kv_cache_manager.coordinator.single_type_managers
        (self.block_manager,) = [manager for manager in managers if isinstance(manager, QFiltersManager)]
        self.block_manager.share_pool_with([manager for manager in managers if manager is not self.block_manager])
        self.block_manager.resumes = policy.resumes
        self.compression_stats = KVCompressionStats()
        if self.vllm_config.speculative_config is not None and self.dynamic_sd_lookup is None:
            # The same number of drafts for every batch size: vLLM then does not pad the last token of a prompt with
            # drafts of id -1, which would be computed beyond cuts, and which CPUs find no embedding for.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        # By request: draft tokens of steps whose output is still to come.
        self.unverified_drafts: Counter[str] = Counter()
        self._sitting_out: set[str] = set()  # requests that are to be cut, but not in the step being scheduled
        self._computed_tokens = 0  # of all requests that run
        self._drafted: list[tuple[Request, int]] = []  # requests of a step with drafts, and what they had computed
        self._sent_stats = KVCompressionStats()
        self._histories: dict[str, _History] = {}
        self._pressed: set[str] = set()  # requests cut for want of pages in the step being scheduled
        self._kept_out: Request | None = None  # by the last step, for want of pages
        self._looked_up: Request | None = None  # the last request that the step being scheduled tried to let in,
        self._idle_hit_pages = 0  # and those pages of its hit in the prefix cache that nobody else holds
        self._next_log_time = time.monotonic() + LOG_INTERVAL_SECONDS
        self._next_record_time = 0.0

    def add_request(self, request: Request) -> None:
        limits = self._limits_of(request)
        if limits is not None:
            self.block_manager.limits[request.request_id] = limits
        super().add_request(request)

    def _limits_of(self, request: Request) -> RequestLimits | None:
        params, tokens = request.sampling_params, request.num_prompt_tokens
        given = (params.extra_args if params else None) or {}
        try:
            return self.compression.request_limits(given, tokens, self.block_manager.block_size)
        except ValueError as error:
            # Front ends in Python refuse it at the door; an exception here would end the engine for all. The workers
            # read the same arguments.
            logger.error("KV compression: request %s gets the server's own budget: %s", request.request_id, error)
            kept = {key: value for key, value in given.items() if key not in (REQUEST_BUDGET_KEY, REQUEST_EVICT_KEY)}
            if params:
                params.extra_args = kept
            return self.compression.request_limits(kept, tokens, self.block_manager.block_size)

    def schedule(self, throttle_prefills: bool = False) -> QFiltersSchedulerOutput:
        self._sitting_out.clear()
        self.block_manager.start_step()
        plan = self._plan_compaction()
        self._looked_up, self._idle_hit_pages = None, 0
        output = super().schedule(throttle_prefills)
        self._computed_tokens += output.total_num_scheduled_tokens + _started_behind(output)
        self._kept_out = self._looked_up if _waits(self._looked_up) else None
        for req_id, drafts in output.scheduled_spec_decode_tokens.items():
            self.unverified_drafts[req_id] += len(drafts)
        # A request preempted meanwhile has lost its pages: its row is void.
        preempted = output.preempted_req_ids or ()
        rows = tuple(row for row in plan.compactions if row.req_id not in preempted)
        for row in rows:
            history = self._histories.setdefault(row.req_id, _History())
            history.evictions += 1
            history.peak_tokens = max(history.peak_tokens, row.resident_tokens)
        self.compression_stats.compactions += len(rows)
        self.compression_stats.pressure_compactions += sum(row.req_id in self._pressed for row in rows)
        self.compression_stats.evicted_tokens += sum(row.evicted_tokens for row in rows)
        hits = self.block_manager.end_step()
        self.compression_stats.prefix_hits += len(hits)
        self.compression_stats.prefix_hit_tokens += sum(hit.position for hit in hits)
        self.compression_stats.resumed_requests += sum(hit.resumes for hit in hits)
        return QFiltersSchedulerOutput.from_output(output, CompactionPlan(rows), hits)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        for req_id, drafts in scheduler_output.scheduled_spec_decode_tokens.items():
            self.unverified_drafts[req_id] -= len(drafts)
            if not self.unverified_drafts[req_id]:
                del self.unverified_drafts[req_id]
        if isinstance(model_runner_output, QFiltersModelRunnerOutput):
            self.compression_stats.compaction_seconds += model_runner_output.compaction_seconds
        drafted = (self.requests.get(req_id) for req_id in scheduler_output.scheduled_spec_decode_tokens)
        self._drafted = [(request, request.num_computed_tokens) for request in drafted if request is not None]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._take_off_rejected_drafts()
        return outputs

    def _take_off_rejected_drafts(self) -> None:
        """Rejected drafts are computed no more, nor were they for a request that ended by now. vLLM makes statistics
        before the step's output is taken in to its end."""
        self._computed_tokens += sum(request.num_computed_tokens - before for request, before in self._drafted)
        self._drafted = []

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self._take_off_rejected_drafts()
            # Only running sequences have evicted tokens: the others gave up their pages, and the count with them.
            evicted_tokens = self.block_manager.all_evicted
            self.compression_stats.resident_tokens = self._computed_tokens - evicted_tokens
            self.compression_stats.compressed_requests = len(self.block_manager.evicted)
            self.compression_stats.saved_pages = evicted_tokens // self.block_manager.block_size
            if self.compression.endpoint:
                self._record_sequences()
            attach_stats(stats, self.compression_stats.take_news(self._sent_stats))
            self._log_stats()
        return stats

    def _plan_compaction(self) -> CompactionPlan:
        rows = []
        next_cuts = self.block_manager.next_cuts
        for request in [r for r in self.running if r.num_computed_tokens >= next_cuts.get(r.request_id, 0)]:
            if request.status != RequestStatus.RUNNING:
                continue  # preempted for one before it
            if _awaits_last_token(request):
                continue
            evicted_tokens = self._evicted_tokens_due(request)
            if not evicted_tokens:
                if request.request_id not in self._sitting_out:
                    next_cuts[request.request_id] = self._next_cut(request)
                continue
            while (row := self.block_manager.plan_eviction(request, evicted_tokens)) is None:
                if self._preempt_lowest_priority() is request:
                    break
            else:
                rows.append(row)
        rows += self._plan_relief()
        # Only now: a page one request gives up must not be the private page another one copies into in the same plan.
        self.compression_stats.freed_pages += self.block_manager.release()
        return CompactionPlan(tuple(rows))

    def _plan_relief(self) -> list[RequestCompaction]:
        """Cuts elastic sequences to their budgets, those furthest beyond first, if the step would find no page for a
        running request or the last one found none for a waiting one: until there are as many, and a reserve."""
        self._pressed.clear()
        rows: list[RequestCompaction] = []
        if self.compression.evict != EVICT_PRESSURE:
            return rows
        pool = self.kv_cache_manager.block_pool
        if not _waits(self._kept_out) and self._most_pages_wanted() <= pool.get_num_free_blocks():
            return rows
        wanted = self._pages_wanted()
        if wanted <= pool.get_num_free_blocks() + self.block_manager.num_releasable:
            return rows
        wanted += int(RESERVE * pool.num_gpu_blocks)
        for request, evicted_tokens in self._reducible():
            if wanted <= pool.get_num_free_blocks() + self.block_manager.num_releasable:
                break
            if self._sits_out(request, evicted_tokens):
                self._sitting_out.add(request.request_id)
                continue
            row = self.block_manager.plan_eviction(request, evicted_tokens)
            if row is not None:  # else its pages are shared, and none is free to copy them to
                rows.append(row)
                self._pressed.add(request.request_id)
        return rows

    def _most_pages_wanted(self) -> int:
        """No less than running requests need for the step, whatever they hold."""
        num_running = len(self.running)
        tokens = self.max_num_scheduled_tokens + num_running * self.num_lookahead_tokens
        return self._num_groups * (num_running + cdiv(tokens, self.block_manager.block_size))

    def _pages_wanted(self) -> int:
        """Pages that the running requests need for the step, and the waiting one that the last step kept out."""
        tokens_left, pages = self.max_num_scheduled_tokens, 0
        for request in self.running:
            computed = request.num_computed_tokens
            num_tokens = request.num_tokens_with_spec + request.num_output_placeholders - computed
            most = self.max_model_len - computed - self.num_sampled_tokens_per_step
            num_tokens = min(num_tokens, tokens_left, most)
            limits = self.block_manager.limits.get(request.request_id)
            if limits is not None and not limits.elastic and request.is_prefill_chunk:
                num_tokens = min(num_tokens, limits.tokens_to_next_cut(computed) or num_tokens)
            if request.status != RequestStatus.RUNNING or num_tokens <= 0 or _awaits_last_token(request):
                continue
            if request.request_id in self._sitting_out:
                continue
            tokens_left -= num_tokens
            pages += self._new_pages(request, num_tokens)
        if self._kept_out is not None and _waits(self._kept_out):
            request, tokens = self._kept_out, self._kept_out.num_tokens
            limits = self.block_manager.limits.get(request.request_id)
            resident = tokens if limits is None else limits.max_resident_tokens(tokens)
            pages += cdiv(resident, self.block_manager.block_size) + self.kv_cache_manager.watermark_blocks
            for manager in self.block_manager.beside:
                pages += manager.get_num_blocks_to_allocate(
                    request.request_id, tokens, (), 0, 0, tokens, apply_admission_cap=True
                )
        return pages

    def _new_pages(self, request: Request, num_tokens: int) -> int:
        """Pages that a running request needs for ``num_tokens`` more."""
        request_id, computed = request.request_id, request.num_computed_tokens
        end, ahead = computed + num_tokens, self.num_lookahead_tokens
        held = len(self.block_manager.req_to_blocks[request_id])
        resident = self.block_manager.resident_tokens(request) + num_tokens + ahead
        pages = max(0, cdiv(resident, self.block_manager.block_size) - held)
        for manager in self.block_manager.beside:
            pages += manager.get_num_blocks_to_allocate(request_id, end + ahead, (), computed, computed, end)
        return pages

    @property
    def _num_groups(self) -> int:
        return 1 + len(self.block_manager.beside)

    def _reducible(self) -> list[tuple[Request, int]]:
        """Running elastic sequences that hold more than their budget, and the tokens beyond it; most tokens first."""
        found = []
        for request in self.running:
            limits = self.block_manager.limits.get(request.request_id)
            if limits is None or not limits.elastic or request.status != RequestStatus.RUNNING:
                continue
            resident = self.block_manager.resident_tokens(request)
            evicted_tokens = limits.reducible_tokens(resident, request.is_prefill_chunk, self.block_manager.block_size)
            if evicted_tokens and not _awaits_last_token(request):
                found.append((request, evicted_tokens))
        return sorted(found, key=lambda reducible: -reducible[1])

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
        if limits is None or limits.elastic:
            return 0
        if reads_prompt(request) and not limits.is_prefill_cut(request.num_computed_tokens):
            return 0
        evicted_tokens = limits.evicted_tokens(
            self.block_manager.resident_tokens(request), reads_prompt(request), self.block_manager.block_size
        )
        if evicted_tokens and self._sits_out(request, evicted_tokens):
            self._sitting_out.add(request.request_id)
            return 0
        return self.block_manager.at_once(request, evicted_tokens)

    def _next_cut(self, request: Request) -> int:
        """The least position at which a request that need not be cut now may have to be."""
        limits = self.block_manager.limits.get(request.request_id)
        if limits is None or limits.elastic:
            return sys.maxsize
        if not reads_prompt(request):
            return limits.budget + self.block_manager.evicted.get(request.request_id, 0)
        to_next_cut = limits.tokens_to_next_cut(request.num_computed_tokens)
        end = request.num_prompt_tokens
        return end if to_next_cut is None else min(end, request.num_computed_tokens + to_next_cut)

    def _sits_out(self, request: Request, evicted_tokens: int) -> bool:
        """Whether a sequence about to lose ``evicted_tokens`` has to wait for the output of a step.

        Computing no token meanwhile, it stays within its budget, and is cut at the same position as without async
        scheduling.
        """
        return request.request_id in self.unverified_drafts

    def _get_local_prefix_cache_hit(self, request: Request, *limit: int | None) -> tuple[KVCacheBlocks, int, int, bool]:
        # limit: one of vLLM's own, from 0.33 on.
        prefix = self._compressed_prefix(request, *limit)
        if prefix is not None and prefix.cut is not None:  # pages from before any cut are behind fewer tokens
            return self._hit_behind(request, prefix)
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request, *limit)
        longest = self._longest_prefix_cache_hit(request)
        if longest is not None and num_tokens > longest:
            blocks, num_tokens = self._hit_of_at_most(request, longest)
        if prefix is not None:
            if num_tokens < prefix.position:
                return self._hit_behind(request, prefix)
            self.block_manager.forget_found()
        limits = self.block_manager.limits.get(request.request_id)
        if limits is not None and limits.elastic:
            blocks, num_tokens = self._hit_with_room(request, blocks, num_tokens)
        # vLLM asks here last of all before it looks for pages.
        self._looked_up = request
        self._idle_hit_pages = sum(map(_idle, blocks.blocks))
        return blocks, num_tokens, boundary, diverged

    def _hit_behind(self, request: Request, prefix: CompressedPrefix) -> tuple[KVCacheBlocks, int, int, bool]:
        by_group = {**prefix.beside, self.block_manager.kv_cache_group_id: prefix.blocks}
        hit = KVCacheBlocks(tuple(by_group[group_id] for group_id in sorted(by_group)))
        self._looked_up, self._idle_hit_pages = request, sum(map(_idle, hit.blocks))
        return hit, prefix.position, 0, False

    def _hit_of_at_most(self, request: Request, longest: int) -> tuple[KVCacheBlocks, int]:
        """The longest hit of no more than ``longest`` tokens, in whole pages that all groups have."""
        coordinator = self.kv_cache_manager.coordinator
        blocks, num_tokens, _ = coordinator.find_longest_cache_hit(request.block_hashes, longest)
        return self.kv_cache_manager.create_kv_cache_blocks(blocks), num_tokens

    def _compressed_prefix(self, request: Request, max_length: int | None = None) -> CompressedPrefix | None:
        """Behind which a request starts; max_length: most tokens that vLLM lets it find, None: no limit."""
        if not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return None
        longest = request.num_prompt_tokens - max(1, self.compression.observed_queries)
        return self.block_manager.find_prefix(request, longest if max_length is None else min(longest, max_length))

    def _hit_with_room(self, request: Request, blocks: KVCacheBlocks, num_tokens: int) -> tuple[KVCacheBlocks, int]:
        """As much of a hit as leaves a page of each group for the first new tokens: pages that nobody holds are among
        the free ones until they are hit."""
        bs, num_groups = self.block_manager.block_size, self._num_groups
        needed = num_groups * cdiv(1 + self.num_lookahead_tokens, bs)
        while num_tokens and (missing := needed - self._free_pages(sum(map(_idle, blocks.blocks)))) > 0:
            blocks, num_tokens = self._hit_of_at_most(request, max(0, num_tokens - cdiv(missing, num_groups) * bs))
        return blocks, num_tokens

    def _free_pages(self, idle_hit_pages: int) -> int:
        """Pages that a waiting request can be given beside those of its hit."""
        watermark: int = self.kv_cache_manager.watermark_blocks if self.running else 0
        return self.kv_cache_manager.block_pool.get_num_free_blocks() - watermark - idle_hit_pages

    def _longest_prefix_cache_hit(self, request: Request) -> int | None:
        """Tokens, whole pages; None: no limit. Within it a hit on pages from before any cut changes nothing of what is
        evicted."""
        limits = self.block_manager.limits.get(request.request_id)
        if limits is None or request.num_prompt_tokens + request.max_tokens <= limits.budget:
            return None
        # The queries that will be observed must be computed. A hit up to a cut would hold more than the budget and a
        # chunk, and skip the cut that a cold prompt gets there.
        ends = [request.num_prompt_tokens]
        if limits.first_prefill_cut is not None and not limits.elastic:
            ends.append(limits.first_prefill_cut)
        bs = self.block_manager.block_size
        return max(0, min(ends) - max(1, self.compression.observed_queries)) // bs * bs

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        # vLLM asks here, for running and waiting requests alike, how many tokens a step may compute. It skips a running
        # request for which that is 0.
        if request.request_id in self._sitting_out:
            return 0
        if num_new_tokens == 1:
            return num_new_tokens  # which a request that is not to be cut has room for
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        limits = self.block_manager.limits.get(request.request_id)
        if limits is None:
            return num_new_tokens
        if limits.elastic:
            # A prompt goes on in the pages there are: for all of it others would be preempted, or it for itself.
            is_decoding = request.status == RequestStatus.RUNNING and not request.is_prefill_chunk
            return num_new_tokens if is_decoding else min(num_new_tokens, max(1, self._room(request)))
        if num_computed_tokens >= request.num_prompt_tokens:
            return min(num_new_tokens, limits.budget - self.block_manager.resident_tokens(request))  # the drafts too
        num_new_tokens = min(num_new_tokens, request.num_prompt_tokens - num_computed_tokens)
        to_next_cut = limits.tokens_to_next_cut(num_computed_tokens)
        return num_new_tokens if to_next_cut is None else min(num_new_tokens, to_next_cut)

    def _room(self, request: Request) -> int:
        """Tokens that a prompt may go on by: those that fit into free pages and what is left of its own."""
        if request.status != RequestStatus.RUNNING:
            pages = self._free_pages(self._idle_hit_pages) // self._num_groups
            return pages * self.block_manager.block_size - self.num_lookahead_tokens
        # Others need a page of each group at most, if they are decoding.
        free = self.kv_cache_manager.block_pool.get_num_free_blocks() - self._num_groups * (len(self.running) - 1)
        counts = range(1, self.max_num_scheduled_tokens + 1)
        return bisect.bisect_right(counts, max(0, free), key=functools.partial(self._new_pages, request))

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        self._vllm_scheduler._update_after_schedule(self, scheduler_output)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        updated: tuple[list[int], bool] = self._vllm_scheduler._update_request_with_output(
            self, request, new_token_ids, is_stale
        )
        return updated

    def _free_request_blocks(self, request: Request) -> None:
        self._computed_tokens -= request.num_computed_tokens
        super()._free_request_blocks(request)

    def _free_blocks(self, request: Request) -> None:
        history = self._histories.pop(request.request_id, _History())
        peak_tokens = max(history.peak_tokens, self.block_manager.resident_tokens(request))
        if self.log_stats and peak_tokens:
            self.compression_stats.request_resident_tokens.append(peak_tokens)
        self.block_manager.keep_end(request)
        super()._free_blocks(request)
        self.block_manager.limits.pop(request.request_id, None)

    def _record_sequences(self) -> None:
        """Records what runs if that is due; that nothing does, at once: no later step may say so."""
        now = time.monotonic()
        if now >= self._next_record_time or not self.running:
            self._next_record_time = now + RECORD_INTERVAL_SECONDS
            self.compression_stats.sequences = [self._running_sequence(request) for request in self.running]

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
