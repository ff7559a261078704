"""The block manager: pages of sequences that hold fewer tokens than they have computed.

Runs in the engine process and owns ``evicted`` there. The worker side keeps its own count, from the same plans.
"""

import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.request import Request

from vllm_qfilters.budget import RequestLimits, cdiv
from vllm_qfilters.core.compressed_prefixes import CompressedPrefix, CompressedPrefixes
from vllm_qfilters.plan import PrefixHit, RequestCompaction


@dataclasses.dataclass
class _Standing:
    """Where a running sequence stands while what it holds is a function of its tokens and limits.

    Attributes:
        cut: its last one.
        num_cached: of its pages, from the first on, are in the prefix cache; more than it has while another sequence's
            pages of the cut are there.
        is_own: it put those of the cut there.
    """

    cut: int
    num_cached: int
    is_own: bool


def reads_prompt(request: Request) -> bool:
    """Whether a request still reads its prompt. One that was preempted reads what it had generated as well: it is cut
    there where it was cut before."""
    return request.num_computed_tokens < request.num_prompt_tokens


class QFiltersManager(FullAttentionManager):
    """Counts pages by resident tokens, and takes whole pages out of a sequence.

    A page taken out may still be read by steps in flight, also in later pipeline stages. Every stage has its own part
    of a page and runs steps in order: whoever is given the page writes to that part in a later step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits: dict[str, RequestLimits] = {}  # requests that are compressed; set by the scheduler
        self.evicted: dict[str, int] = {}  # tokens; only requests that evicted any
        self.all_evicted = 0  # the sum of them
        self.next_cuts: dict[str, int] = {}  # positions before which running requests are not cut; set by the scheduler
        self._last_cuts: dict[str, int] = {}  # positions of running requests at their last cuts
        self._released: list[KVCacheBlock] = []  # given up by plan_eviction(), not yet returned to the pool
        self._taken_out: list[KVCacheBlock] = []  # those of them that no private copy replaces
        self._superseded: list[KVCacheBlock] = []  # those of them that leave the prefix cache first
        self.prefixes = CompressedPrefixes(self.block_pool, self.block_size, self.kv_cache_group_id)
        self.resumes = False  # requests go on from what earlier ones held at their end; set by the scheduler
        self._standings: dict[str, _Standing] = {}
        # While a step is scheduled: requests of which it makes a prefix, and of others the first page that it fills and
        # that is in the prefix cache already.
        self._is_scheduling = False
        self._planned: set[str] = set()
        self._first_filled: dict[str, int] = {}
        self._found: tuple[str, CompressedPrefix] | None = None  # by the request looked at last, which has no pages yet
        self._missed: tuple[str, int, int, int] | None = None  # what no request held at its end, looked for last
        self._prefix_hits: list[PrefixHit] = []  # of the step being scheduled
        self.beside: tuple[SingleTypeKVCacheManager, ...] = ()  # those of other groups

    def share_pool_with(self, others: Sequence[SingleTypeKVCacheManager]) -> None:
        """Makes the managers of other groups known. Of requests that evicted any token they keep nothing in the prefix
        cache: new keys have seen a compressed context in their layers too."""
        self.beside = tuple(others)
        for manager in others:
            manager.cache_blocks = functools.partial(self._cache_beside, manager.cache_blocks)  # type: ignore[method-assign]
            manager.pop_blocks_for_free = functools.partial(self._pop_beside, manager.pop_blocks_for_free)  # type: ignore[method-assign]
            if isinstance(manager, SlidingWindowManager):
                self.prefixes.windows[manager.kv_cache_group_id] = manager.sliding_window

    def _cache_beside(self, cache_blocks: Callable[..., None], request: Request, *args: Any, **kwargs: Any) -> None:
        if request.request_id not in self.evicted:
            cache_blocks(request, *args, **kwargs)

    def _shares_prefixes(self, limits: RequestLimits) -> bool:
        """States of layers beside attention are not kept with what is held behind a cut."""
        return limits.shares_prefixes and len(self.prefixes.windows) == len(self.beside)

    def _pop_beside(self, pop_blocks: Callable[[str], list[KVCacheBlock]], request_id: str) -> list[KVCacheBlock]:
        self._forget_uncomputed(request_id)  # while the pages of all groups are there
        return pop_blocks(request_id)

    def _blocks_by_group(self, request_id: str) -> dict[int, list[KVCacheBlock]]:
        return {manager.kv_cache_group_id: manager.req_to_blocks[request_id] for manager in (self, *self.beside)}

    def resident_tokens(self, request: Request) -> int:
        return request.num_computed_tokens - self.evicted.get(request.request_id, 0)

    def find_prefix(self, request: Request, longest: int) -> CompressedPrefix | None:
        """The compressed prefix that a request without pages starts behind, if it is given the pages it needs now.

        Args:
            longest: most tokens that it may find.
        """
        limits = self.limits.get(request.request_id)
        found = None
        if limits is not None and self._shares_prefixes(limits):
            found = self.prefixes.find(request, limits, longest)
        if self.resumes and limits is not None:
            shortest = 1 if found is None else found.position + 1
            looked_for = (request.request_id, shortest, longest, self.prefixes.num_ends)
            if looked_for != self._missed:  # a request that waits asks at every step
                end = self.prefixes.find_end(request, limits, shortest, longest)
                found, self._missed = end or found, None if end else looked_for
        self._found = None if found is None else (request.request_id, found)
        return found

    def forget_found(self) -> None:
        """The request looked at last does not start behind the prefix that was found."""
        self._found = None

    def keep_end(self, request: Request) -> None:
        """Keeps what a request holds, where others go on from it. Call when it has ended, before its pages are freed.

        What it held while its prompt was read, and what was never cut, is in the prefix cache anyway, its own pages or
        those of another sequence.
        """
        self._take_place(request)
        request_id, evicted = request.request_id, self.evicted.get(request.request_id, 0)
        if not self.resumes or not evicted or reads_prompt(request):
            return
        known = request.num_tokens - 1
        if self._last_cuts.get(request_id, 0) > known:
            return  # it went by tokens that are no part of what others go on from
        # What is computed behind the last token that was known lies in the pages behind.
        held = min(request.num_computed_tokens, known) - evicted
        blocks = self.req_to_blocks[request_id][: held // self.block_size]
        if blocks:
            position = evicted + len(blocks) * self.block_size
            self.prefixes.add_end(request, self.limits[request_id], position, blocks)

    def start_step(self) -> None:
        """A step is scheduled from now on. Requests that lose their pages before :meth:`end_step` will not compute what
        was put in the prefix cache for them."""
        self._is_scheduling = True

    def end_step(self) -> tuple[PrefixHit, ...]:
        """Requests that start behind a compressed prefix in the step that was scheduled."""
        hits, self._prefix_hits = self._prefix_hits, []
        self._is_scheduling = False
        self._planned.clear()
        self._first_filled.clear()
        return tuple(hits)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        num_tokens -= self.evicted.get(request_id, 0)
        if request_id in self.num_cached_block:  # it runs: asked for every request at every step
            return max(0, cdiv(num_tokens, self.block_size) - len(self.req_to_blocks[request_id]))
        if self._found is not None and self._found[0] == request_id:
            num_tokens -= self._found[1].evicted
        if apply_admission_cap and request_id in self.limits:
            # Agrees with QFiltersSpec.max_memory_usage_bytes, or a request that passed the startup check is never
            # admitted.
            num_tokens = self.limits[request_id].max_resident_tokens(num_tokens)
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> None:
        self.prefixes.leaving.note_found(new_computed_blocks)
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        if self._found is not None and self._found[0] == request_id:
            _, found = self._found
            self._found = None
            cut, num_pages, resumes = found.position, len(found.blocks), found.cut is None
            if found.cut is not None:
                self._standings[request_id] = _Standing(found.cut, num_pages, is_own=False)
                cut = found.cut
                num_pages = self.limits[request_id].prefix_tokens(self.block_size) // self.block_size
            pages = tuple(block.block_id for block in found.blocks[:num_pages])
            self._prefix_hits.append(PrefixHit(request_id, cut, found.position, found.evicted, pages, resumes))
            self.evicted[request_id] = found.evicted
            self.all_evicted += found.evicted

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        num_tokens -= self.evicted.get(request_id, 0)
        if num_tokens <= len(self.req_to_blocks[request_id]) * self.block_size:
            return []
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        # After an eviction page i no longer holds tokens [i * block_size, ...), and new keys have seen a compressed
        # context.
        request_id = request.request_id
        if request_id not in self.evicted:
            first = self.num_cached_block.get(request_id, 0)
            if num_tokens // self.block_size <= first and self.block_size == self.block_pool.hash_block_size:
                return  # vLLM finds no page filled either: it asks twice for every running request at every step
            super().cache_blocks(request, num_tokens, *args, **kwargs)
            self._has_filled(request_id, first, self.num_cached_block.get(request_id, 0))
        elif (standing := self._standings.get(request_id)) is not None:
            first = standing.num_cached
            self._cache_since_cut(request, num_tokens)
            self._has_filled(request_id, first, standing.num_cached)

    def _cache_since_cut(self, request: Request, num_tokens: int) -> None:
        """Keeps the pages that a prompt has filled since its last cut, up to ``num_tokens``."""
        request_id = request.request_id
        limits, evicted, standing = self.limits[request_id], self.evicted[request_id], self._standings[request_id]
        end = min(num_tokens, request.num_prompt_tokens, limits.end_of_prefix(standing.cut, self.block_size))
        for index in range(standing.num_cached, (end - evicted) // self.block_size):
            blocks = self._blocks_by_group(request_id)
            self.prefixes.add_page(request, limits, standing.cut, index, blocks, evicted)
            standing.num_cached = index + 1

    def _has_filled(self, request_id: str, first: int, end: int) -> None:
        """Pages of a request from ``first`` to before ``end`` were put in the prefix cache."""
        if self._is_scheduling and first < end:
            self._first_filled.setdefault(request_id, first)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        # Finish, abort and preemption all come through here: a resumed request starts again with nothing evicted.
        self._forget_uncomputed(request_id)
        self.all_evicted -= self.evicted.pop(request_id, 0)
        self.next_cuts.pop(request_id, None)
        self._last_cuts.pop(request_id, None)
        self._standings.pop(request_id, None)
        if self._found is not None and self._found[0] == request_id:
            self._found = None
        return super().pop_blocks_for_free(request_id)

    def _forget_uncomputed(self, request_id: str) -> None:
        """Takes out of the prefix cache what the step being scheduled was to compute for a request that is preempted
        now. Under priority scheduling vLLM preempts requests that it has scheduled in the same step."""
        if request_id in self._planned:
            self._planned.discard(request_id)
            standing = self._standings[request_id]
            if standing.is_own:
                for blocks in self._blocks_by_group(request_id).values():
                    self.prefixes.forget_cut(blocks, self.limits[request_id], standing.cut)
        first = self._first_filled.pop(request_id, None)
        if first is not None:
            by_group = self._blocks_by_group(request_id)
            filled = by_group.pop(self.kv_cache_group_id)[first:]
            # Of what other groups hold nothing is evicted: their pages are where their tokens are.
            first += self.evicted.get(request_id, 0) // self.block_size
            self.prefixes.give_up([*filled, *(block for blocks in by_group.values() for block in blocks[first:])])

    def at_once(self, request: Request, evicted_tokens: int) -> int:
        """How many of ``evicted_tokens`` a sequence evicts in one go: what is left to evict of its prompt, if anything
        is, goes before generated tokens do."""
        limits, evicted = self.limits[request.request_id], self.evicted.get(request.request_id, 0)
        if reads_prompt(request):
            return evicted_tokens
        of_prompt = limits.prompt_surplus(request.num_prompt_tokens, evicted, self.block_size)
        return min(evicted_tokens, of_prompt or evicted_tokens)

    def plan_eviction(self, request: Request, evicted_tokens: int) -> RequestCompaction | None:
        """Takes ``evicted_tokens`` (whole pages) out of a running sequence.

        The pages taken out lie before the window: in them ends the region tokens are evicted from, so that survivors
        move up before them and the window keeps its pages. Pages that survivors may be written to must be private and
        unhashed; others are replaced, from free pages if there are enough, else by giving up their place in the prefix
        cache. Call :meth:`release` after the last request of a step: until then the pages taken out stay readable.

        Returns:
            The plan row, or None if pages shared with other running requests would have to be copied and none is free.
        """
        request_id, bs = request.request_id, self.block_size
        limits = self.limits[request_id]
        blocks = self.req_to_blocks[request_id]
        resident = self.resident_tokens(request)
        kept = resident - evicted_tokens
        sinks, window = limits.protected(
            kept, request.num_computed_tokens, request.num_prompt_tokens, self.evicted.get(request_id, 0), bs
        )
        first_out = (kept - window) // bs
        after_out = first_out + evicted_tokens // bs
        written = list(range(sinks // bs, first_out))
        if limits.private_window:
            written.extend(range(after_out, len(blocks)))
        elif (kept - window) % bs:
            written.append(after_out)  # its head belongs to the evictable region, its tail to the window
        self._give_up_prefix(request, [blocks[i] for i in (*written, *range(first_out, after_out))])

        replaced = [i for i in written if not self.block_pool.is_block_writable(blocks[i])]
        if len(replaced) > self.block_pool.get_num_free_blocks():
            unshared = {blocks[i].block_id for i in replaced if blocks[i].ref_cnt == 1}
            self.block_pool.evict_blocks(unshared)
            replaced = [i for i in replaced if blocks[i].ref_cnt > 1]
            if len(replaced) > self.block_pool.get_num_free_blocks():
                return None
        private = self.block_pool.get_new_blocks(len(replaced))
        copied_pages = tuple((i, block.block_id) for i, block in zip(replaced, private, strict=True))

        self._give_back(request, [blocks[i] for i in replaced])
        for i, block in zip(replaced, private, strict=True):
            blocks[i] = block
        return self._take_out(request, range(first_out, after_out), sinks, window, copied_pages)

    @property
    def num_releasable(self) -> int:
        """Pages that :meth:`release` would give back to the pool."""
        held = Counter(block.block_id for block in self._released)
        blocks = {block.block_id: block for block in self._released}
        return sum(blocks[block_id].ref_cnt == count for block_id, count in held.items())

    def release(self) -> int:
        """Returns the pages taken out by :meth:`plan_eviction` to the pool; a shared page only loses this reference.

        Returns:
            Pages that became free, without those that private copies replace.
        """
        # Later pages first, as when a request ends: heads of prefixes are the last to leave the prefix cache.
        self.block_pool.free_blocks(reversed(self._released))
        if self.enable_caching:
            self.prefixes.leaving.add(reversed(self._superseded))
        freed = {block.block_id for block in self._taken_out if block.ref_cnt == 0}  # two may have shared one
        self._released, self._taken_out, self._superseded = [], [], []
        return len(freed)

    def _take_out(
        self,
        request: Request,
        indices: Sequence[int],
        sinks: int,
        window: int,
        copied_pages: tuple[tuple[int, int], ...] = (),
    ) -> RequestCompaction:
        """Takes pages out of a sequence, which closes up; :meth:`release` returns them to the pool.

        Args:
            request: it is running.
            indices: where in the sequence the pages are, in order.
            sinks, window: first and last tokens that stay, in order.
            copied_pages: see :class:`vllm_qfilters.plan.RequestCompaction`.
        """
        request_id = request.request_id
        blocks, resident = self.req_to_blocks[request_id], self.resident_tokens(request)
        limits = self.limits[request_id]
        shared = [blocks[i].block_id for i in indices if blocks[i].ref_cnt > 1]
        self._give_back(request, [blocks[i] for i in indices])
        self._taken_out.extend(blocks[i] for i in indices)
        is_out = indices if isinstance(indices, range) else frozenset(indices)
        blocks[:] = [block for i, block in enumerate(blocks) if i not in is_out]
        evicted_tokens = len(indices) * self.block_size
        self._keep_prefix(request)
        position, last_cut = request.num_computed_tokens, self._last_cuts.get(request_id, 0)
        unobserved = resident if last_cut < request.num_prompt_tokens else position - last_cut
        self._last_cuts[request_id] = position
        self.evicted[request_id] = self.evicted.get(request_id, 0) + evicted_tokens
        self.all_evicted += evicted_tokens
        return RequestCompaction(
            req_id=request_id,
            position=position,
            resident_tokens=resident,
            evicted_tokens=evicted_tokens,
            sinks=sinks,
            window=window,
            block_ids=tuple(block.block_id for block in blocks),
            copied_pages=copied_pages,
            shared_pages_out=tuple(shared) if limits.private_window else (),
            distinct_tokens=limits.distinct_tokens(resident - evicted_tokens, sinks + window, reads_prompt(request)),
            unobserved_tokens=unobserved,
        )

    def _give_back(self, request: Request, blocks: Sequence[KVCacheBlock]) -> None:
        """Lets :meth:`release` return pages that a sequence loses at a cut. If a later cut, or the end, leaves what a
        follow-up prompt goes on from, that is of more use than they are."""
        self._released.extend(blocks)
        if self.resumes or (reads_prompt(request) and self._shares_prefixes(self.limits[request.request_id])):
            self._superseded.extend(blocks)

    def _keep_prefix(self, request: Request) -> None:
        """Keeps what a prompt holds behind the cut that was planned just now, if others can start there."""
        request_id, cut = request.request_id, request.num_computed_tokens
        limits, standing = self.limits[request_id], self._standings.pop(request_id, None)
        follows_from_tokens = standing is not None or request_id not in self.evicted
        is_of_prompt = self._shares_prefixes(limits) and reads_prompt(request)
        if self.enable_caching and is_of_prompt and follows_from_tokens:
            is_own = self.prefixes.add(request, limits, cut, self._blocks_by_group(request_id))
            # Pages behind those of another sequence are not for its own cut's.
            num_pages = limits.prefix_tokens(self.block_size) // self.block_size if is_own else sys.maxsize
            self._standings[request_id] = _Standing(cut, num_pages, is_own)
            self._planned.add(request_id)

    def _take_place(self, request: Request) -> None:
        """Keeps what a prompt holds since its last cut, if the pages of another sequence that stood in its place have
        left the prefix cache, or, where the prompt ends behind that cut, leave it first. Its own are as they were: they
        are written at a cut alone."""
        request_id, standing = request.request_id, self._standings.get(request.request_id)
        if standing is None or standing.num_cached < sys.maxsize:
            return
        limits = self.limits[request_id]
        # Its own pages would leave first too, unless these are what its prompt ends with.
        given_up = None if reads_prompt(request) or self.resumes else self._superseded
        if self.prefixes.add(request, limits, standing.cut, self._blocks_by_group(request_id), given_up):
            standing.is_own = True
            standing.num_cached = limits.prefix_tokens(self.block_size) // self.block_size
            self._cache_since_cut(request, request.num_computed_tokens)

    def _give_up_prefix(self, request: Request, blocks: Sequence[KVCacheBlock]) -> None:
        """Takes what a prompt holds since its last cut out of the prefix cache, unless it is to stay there, or others
        hold it too: else its pages would have to be copied.

        Args:
            blocks: those of its pages that are about to be written to or to be taken out.
        """
        standing, limits = self._standings.get(request.request_id), self.limits[request.request_id]
        if standing is None:
            return
        if not reads_prompt(request) or limits.keeps_prefix(standing.cut, self.block_size):
            self._take_place(request)
            return
        if not standing.is_own:
            return
        # The window may still stand in pages of earlier prefixes.
        own = [block for block in blocks if self.prefixes.begins_with(block, limits, standing.cut)]
        if all(block.ref_cnt == 1 for block in own):
            self.prefixes.give_up(own)
            for manager in self.beside:  # without those pages nobody finds what stands in the windows
                self.prefixes.forget_cut(manager.req_to_blocks[request.request_id], limits, standing.cut)
