"""The block manager: pages of sequences that hold fewer tokens than they have computed.

Runs in the engine process and owns ``evicted`` there. The worker side keeps its own count, from the same plans.
"""

import dataclasses
import functools
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
        num_cached: of its pages, from the first on, are in the prefix cache, or others in their place.
        is_own: it put those of the cut there.
    """

    cut: int
    num_cached: int
    is_own: bool


class QFiltersManager(FullAttentionManager):
    """Counts pages by resident tokens, and takes whole pages out of a sequence.

    A page taken out may still be read by steps in flight, also in later pipeline stages. Every stage has its own part
    of a page and runs steps in order: whoever is given the page writes to that part in a later step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits: dict[str, RequestLimits] = {}  # requests that are compressed; set by the scheduler
        self.evicted: dict[str, int] = {}  # tokens; only requests that evicted any
        self.next_cuts: dict[str, int] = {}  # positions before which running requests are not cut; set by the scheduler
        self._released: list[KVCacheBlock] = []  # given up by plan_eviction(), not yet returned to the pool
        self._taken_out: list[KVCacheBlock] = []  # those of them that no private copy replaces
        self.prefixes = CompressedPrefixes(self.block_pool, self.block_size, self.kv_cache_group_id)
        self._standings: dict[str, _Standing] = {}
        self._planned: set[str] = set()  # requests whose prefixes the step being scheduled makes
        self._found: tuple[str, CompressedPrefix] | None = None  # by the request looked at last, which has no pages yet
        self._prefix_hits: list[PrefixHit] = []  # of the step being scheduled
        self.beside: tuple[SingleTypeKVCacheManager, ...] = ()  # those of other groups

    def share_pool_with(self, others: Sequence[SingleTypeKVCacheManager]) -> None:
        """Makes the managers of other groups known. Of requests that evicted any token they keep nothing in the prefix
        cache: new keys have seen a compressed context in their layers too."""
        self.beside = tuple(others)
        for manager in others:
            manager.cache_blocks = functools.partial(self._cache_beside, manager.cache_blocks)  # type: ignore[method-assign]
            assert isinstance(manager, SlidingWindowManager)
            self.prefixes.windows[manager.kv_cache_group_id] = manager.sliding_window

    def _cache_beside(self, cache_blocks: Callable[..., None], request: Request, *args: Any, **kwargs: Any) -> None:
        if request.request_id not in self.evicted:
            cache_blocks(request, *args, **kwargs)

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
        if limits is not None and limits.shares_prefixes:
            found = self.prefixes.find(request, limits, longest)
        self._found = None if found is None else (request.request_id, found)
        return found

    def take_prefix_hits(self) -> tuple[PrefixHit, ...]:
        """Requests that start behind a compressed prefix in the step that was scheduled. Call at the end of it."""
        hits, self._prefix_hits = self._prefix_hits, []
        self._planned.clear()
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

    def add_local_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        super().add_local_computed_blocks(request_id, *args, **kwargs)
        if self._found is not None and self._found[0] == request_id:
            _, found = self._found
            self._found = None
            num_pages = self.limits[request_id].prefix_tokens(self.block_size) // self.block_size
            pages = tuple(block.block_id for block in found.blocks[:num_pages])
            self._prefix_hits.append(PrefixHit(request_id, found.cut, found.position, found.evicted, pages))
            self.evicted[request_id] = found.evicted
            self._standings[request_id] = _Standing(found.cut, len(found.blocks), is_own=False)

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
            super().cache_blocks(request, num_tokens, *args, **kwargs)
        elif (standing := self._standings.get(request_id)) is not None:
            limits, evicted = self.limits[request_id], self.evicted[request_id]
            end = min(num_tokens, request.num_prompt_tokens, limits.end_of_prefix(standing.cut, self.block_size))
            for index in range(standing.num_cached, (end - evicted) // self.block_size):
                blocks = self._blocks_by_group(request_id)
                self.prefixes.add_page(request, limits, standing.cut, index, blocks, evicted)
                standing.num_cached = index + 1

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        # Finish, abort and preemption all come through here: a resumed request starts again with nothing evicted.
        self.evicted.pop(request_id, None)
        self.next_cuts.pop(request_id, None)
        standing = self._standings.pop(request_id, None)
        if request_id in self._planned:
            self._planned.discard(request_id)
            if standing is not None and standing.is_own:  # the workers will not make it
                self.prefixes.give_up(self.req_to_blocks[request_id])
        if self._found is not None and self._found[0] == request_id:
            self._found = None
        return super().pop_blocks_for_free(request_id)

    def plan_eviction(self, request: Request, evicted_tokens: int) -> RequestCompaction | None:
        """Takes ``evicted_tokens`` (whole pages) out of a running sequence.

        The pages taken out lie before the window: in them ends the region tokens are evicted from, so that survivors
        move only into holes before them and the window keeps its pages. Pages that survivors may be written to must be
        private and unhashed; others are replaced, from free pages if there are enough, else by giving up their place in
        the prefix cache. Call :meth:`release` after the last request of a step: until then the pages taken out stay
        readable.

        Returns:
            The plan row, or None if pages shared with other running requests would have to be copied and none is free.
        """
        request_id, bs = request.request_id, self.block_size
        limits = self.limits[request_id]
        blocks = self.req_to_blocks[request_id]
        resident = self.resident_tokens(request)
        kept = resident - evicted_tokens
        window = limits.protected_window(kept)
        first_out = (kept - window) // bs
        after_out = first_out + evicted_tokens // bs
        written = list(range(limits.sinks // bs, first_out))
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

        self._released.extend(blocks[i] for i in replaced)
        for i, block in zip(replaced, private, strict=True):
            blocks[i] = block
        return self._take_out(request, range(first_out, after_out), window, copied_pages)

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
        freed = {block.block_id for block in self._taken_out if block.ref_cnt == 0}  # two may have shared one
        self._released, self._taken_out = [], []
        return len(freed)

    def _take_out(
        self, request: Request, indices: Sequence[int], window: int, copied_pages: tuple[tuple[int, int], ...] = ()
    ) -> RequestCompaction:
        """Takes pages out of a sequence, which closes up; :meth:`release` returns them to the pool.

        Args:
            request: it is running.
            indices: where in the sequence the pages are, in order.
            window: last tokens that stay, in order.
            copied_pages: see :class:`vllm_qfilters.plan.RequestCompaction`.
        """
        request_id = request.request_id
        blocks, resident = self.req_to_blocks[request_id], self.resident_tokens(request)
        limits = self.limits[request_id]
        shared = [blocks[i].block_id for i in indices if blocks[i].ref_cnt > 1]
        self._released.extend(blocks[i] for i in indices)
        self._taken_out.extend(blocks[i] for i in indices)
        is_out = indices if isinstance(indices, range) else frozenset(indices)
        blocks[:] = [block for i, block in enumerate(blocks) if i not in is_out]
        evicted_tokens = len(indices) * self.block_size
        self._keep_prefix(request)
        self.evicted[request_id] = self.evicted.get(request_id, 0) + evicted_tokens
        return RequestCompaction(
            req_id=request_id,
            position=request.num_computed_tokens,
            resident_tokens=resident,
            evicted_tokens=evicted_tokens,
            sinks=limits.sinks,
            window=window,
            block_ids=tuple(block.block_id for block in blocks),
            copied_pages=copied_pages,
            shared_pages_out=tuple(shared) if limits.private_window else (),
            distinct_tokens=limits.distinct_tokens(resident - evicted_tokens),
        )

    def _keep_prefix(self, request: Request) -> None:
        """Keeps what a prompt holds behind the cut that was planned just now, if others can start there."""
        request_id, cut = request.request_id, request.num_computed_tokens
        limits, standing = self.limits[request_id], self._standings.pop(request_id, None)
        follows_from_tokens = standing is not None or request_id not in self.evicted
        is_of_prompt = limits.shares_prefixes and cut < request.num_prompt_tokens
        if self.enable_caching and is_of_prompt and follows_from_tokens:
            is_own = self.prefixes.add(request, limits, cut, self._blocks_by_group(request_id))
            num_pages = limits.prefix_tokens(self.block_size) // self.block_size
            self._standings[request_id] = _Standing(cut, num_pages, is_own)
            self._planned.add(request_id)

    def _give_up_prefix(self, request: Request, blocks: Sequence[KVCacheBlock]) -> None:
        """Takes what a prompt holds since its last cut out of the prefix cache, unless it is to stay there, or others
        hold it too: else its pages would have to be copied.

        Args:
            blocks: those of its pages that are about to be written to or to be taken out.
        """
        standing, limits = self._standings.get(request.request_id), self.limits[request.request_id]
        is_last = request.num_computed_tokens >= request.num_prompt_tokens
        if standing is None or not standing.is_own or is_last or limits.keeps_prefix(standing.cut, self.block_size):
            return
        # The window may still stand in pages of earlier prefixes.
        own = [block for block in blocks if self.prefixes.begins_with(block, limits, standing.cut)]
        if all(block.ref_cnt == 1 for block in own):
            self.prefixes.give_up(own)
