"""Compressed prefixes: what prompts hold behind a cut, kept in vLLM's own prefix cache for prompts that begin alike.

Runs in the engine process; the block manager calls it. What a sequence holds while its prompt is read is a function of
its tokens up to there and of its limits: prompts are cut at multiples of ``prefill_interval``, and what a cut keeps
follows from the tokens before it. So the pages behind a cut are found again by the hash of those tokens, as vLLM has
it (salt and adapter are in it), the limits, the cut, and the place of the page. They are in vLLM's map of hashes and in
its queue of free pages. What a prompt gives up at a cut leaves the cache before what prompts end with, since a prompt
passes many cuts and most follow-up prompts go on from the last one; what others found twice stays as long.

The pages of a cut belong together: another prompt that was cut at the same tokens may have decided a tie otherwise, for
other tokens were computed beside its own. Therefore the pages of one sequence alone are there at a time: those of the
first one, unless they leave the cache before another one has gone on from the same cut.

What a request holds at its end is no such function: its answer was generated under the decoding budget, and other
requests that end with the same tokens may hold others of them. It is kept where the user wants follow-up prompts to go
on from there, by the hash of all its tokens, the limits, and the place of the page, counted from the last one.

Layers with a sliding window have pages of their own, of which nothing is evicted. Those that hold the window before a
cut are kept with it: what they hold was computed beside a compressed context, too.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.request import Request

from vllm_qfilters.budget import RequestLimits

_INDEX_BYTES = 4
_END, _FIRST = b"end", b"end, first page"  # in the place of a cut
_GROUP_BYTES = 4  # at the end of vLLM's keys


class CompressedPrefix(NamedTuple):
    """A compressed prefix that was found.

    Attributes:
        cut: the position of its cut; None: it is what a request held at its end.
        blocks: the pages a sequence holds there, and those that were filled since.
        position: of the next token, a multiple of the block size.
        evicted: tokens that are not held.
        beside: by KV cache group the pages of layers with a sliding window, null ones in place of those it has left.
    """

    cut: int | None
    blocks: list[KVCacheBlock]
    position: int
    evicted: int
    beside: dict[int, list[KVCacheBlock]]


class _Place(NamedTuple):
    """A page of a prompt that was cut.

    Attributes:
        group_id: its KV cache group.
        at: where it is among the pages of the sequence.
        end: how many tokens it is a function of.
    """

    group_id: int
    at: int
    end: int


class CompressedPrefixes:
    """Finds and keeps compressed prefixes.

    Args:
        block_pool: whose pages they are.
        block_size: tokens per page.
        group_id: of the KV cache group that is compressed.

    Attributes:
        windows: tokens that the layers of other groups attend to, the query's own among them, by group.
        num_ends: how often what a request held at its end was kept.
        leaving: the pages that leave the prefix cache first.
    """

    def __init__(self, block_pool: BlockPool, block_size: int, group_id: int) -> None:
        self._pool = block_pool
        self._block_size = block_size
        self._group_id = group_id
        self.windows: dict[int, int] = {}
        self.num_ends = 0
        self.leaving = LeavingFirst(block_pool)
        self._ends: set[int] = set()  # positions at which anything was kept

    def find(self, request: Request, limits: RequestLimits, longest: int) -> CompressedPrefix | None:
        """The longest compressed prefix of a request that is there whole.

        Args:
            request: its prompt is longer than ``longest``.
            limits: of the request; they let it share prefixes.
            longest: most tokens that the request may find.
        """
        first, interval = limits.first_prefill_cut, limits.prefill_interval
        assert first is not None and interval is not None
        for cut in range(longest // interval * interval, first - 1, -interval):
            blocks = self._pages(request, limits, cut)
            if blocks is None:
                continue
            position = cut
            while position + self._block_size <= min(longest, limits.end_of_prefix(cut, self._block_size)):
                block = self._page(
                    request, limits, cut, _Place(self._group_id, len(blocks), position + self._block_size)
                )
                if block is None:
                    break
                blocks.append(block)
                position += self._block_size
            for end in range(position, cut - 1, -self._block_size):
                beside = self._beside(request, limits, cut, end)
                if beside is not None:
                    del blocks[len(blocks) - (position - end) // self._block_size :]
                    return CompressedPrefix(cut, blocks, end, end - len(blocks) * self._block_size, beside)
        return None

    def add(
        self,
        request: Request,
        limits: RequestLimits,
        cut: int,
        blocks: Mapping[int, Sequence[KVCacheBlock]],
        given_up: Iterable[KVCacheBlock] | None = None,
    ) -> bool:
        """Keeps what a prompt holds behind a cut; False: that of another sequence is there.

        Args:
            blocks: all its pages by group, of which none is written any more while it is in the cache.
            given_up: if those of another sequence count only where they do not leave first, pages that are about to be
                among :attr:`leaving`.
        """
        count = limits.prefix_tokens(self._block_size) // self._block_size
        places = [_Place(self._group_id, index, cut) for index in range(count)]
        places += [place for group_id in self.windows for place in self._places_of_window(group_id, cut, cut)]
        cached = [self._page(request, limits, cut, place) for place in places]
        there = [block for block in cached if block is not None]
        if len(there) == len(places) and (given_up is None or not self._leave_first(there, given_up)):
            return False
        own = [blocks[place.group_id][place.at] for place in places]
        pairs = zip(cached, own, strict=True)
        self.forget_cut([block for block, mine in pairs if block is not None and block is not mine], limits, cut)
        for place, block in zip(places, own, strict=True):
            self._add(request, limits, cut, place, block)
        return True

    def _leave_first(self, blocks: Sequence[KVCacheBlock], given_up: Iterable[KVCacheBlock]) -> bool:
        soon = {block.block_id for block in given_up}
        return any(block in self.leaving or block.block_id in soon for block in blocks)

    def add_page(
        self,
        request: Request,
        limits: RequestLimits,
        cut: int,
        index: int,
        blocks: Mapping[int, Sequence[KVCacheBlock]],
        evicted: int,
    ) -> None:
        """Keeps a page that a sequence filled since its last cut, and those of other groups that hold the same tokens.

        Args:
            index: where it is in the sequence.
            blocks: all pages of the sequence by group.
            evicted: tokens of the sequence.
        """
        at = index + evicted // self._block_size
        end = (at + 1) * self._block_size
        for group_id in (self._group_id, *self.windows):
            place = _Place(group_id, index if group_id == self._group_id else at, end)
            self._add(request, limits, cut, place, blocks[group_id][place.at])

    def _add(self, request: Request, limits: RequestLimits, cut: int, place: _Place, block: KVCacheBlock) -> None:
        if not block.is_null:  # as none is that a window still reaches
            key = make_block_hash_with_group_id(self._hash(request, limits, cut, place), place.group_id)
            self._pool._insert_block_hash(key, block, num_tokens=place.end)

    def find_end(self, request: Request, limits: RequestLimits, shortest: int, longest: int) -> CompressedPrefix | None:
        """What an earlier request held at its end, of those that this one begins with the longest that is there whole.

        Args:
            request, limits, longest: as for :meth:`find`.
            shortest: fewest tokens that are worth it.
        """
        size, of_limits = self._block_size, _digest(limits)
        shortest = max(shortest, limits.budget - limits.interval)  # no less is left of what was ever cut
        for position in sorted((end for end in self._ends if shortest <= end <= longest), reverse=True):
            blocks = self._pages_at_end(request, of_limits, position)
            if blocks is not None:
                return CompressedPrefix(None, blocks, position, position - len(blocks) * size, {})
        return None

    def add_end(self, request: Request, limits: RequestLimits, position: int, blocks: Sequence[KVCacheBlock]) -> None:
        """Keeps what a request holds at its end, in the place of what another one held behind the same tokens.

        Args:
            position: behind the last token of ``blocks``, a multiple of the block size.
            blocks: its full pages; it has evicted tokens.
        """
        of_limits = _digest(limits)
        keys = [self._key_at_end(request, of_limits, position, index) for index in range(len(blocks))]
        keys.append(self._key_at_end(request, of_limits, position, len(blocks) - 1, _FIRST))
        self.num_ends += 1
        self._ends.add(position)
        for place, block in zip(keys, [*reversed(blocks), blocks[0]], strict=True):
            key = make_block_hash_with_group_id(place, self._group_id)
            for other in self._pool.get_cached_block(place, [self._group_id]) or ():
                self._forget(other, key.__eq__)
            self._pool._insert_block_hash(key, block, num_tokens=position)

    def begins_with(self, block: KVCacheBlock, limits: RequestLimits, cut: int) -> bool:
        """Whether a page came into the prefix cache for what a prompt held behind this cut, and for no earlier one."""
        key = block.block_hash
        return key is not None and _is_of_cut(key, limits, cut)

    def give_up(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Takes pages out of the prefix cache, to be written."""
        self._pool.evict_blocks({block.block_id for block in blocks if not block.is_null})

    def forget_cut(self, blocks: Sequence[KVCacheBlock], limits: RequestLimits, cut: int) -> None:
        """Takes pages out of what prompts held behind a cut. For other cuts, and as pages from before any, they stay in
        the prefix cache."""
        for block in blocks:
            self._forget(block, lambda key: _is_of_cut(key, limits, cut))

    def _forget(self, block: KVCacheBlock, is_meant: Callable[[bytes], bool]) -> None:
        """Takes a page out of the prefix cache under some of its keys."""
        num_tokens = block.block_hash_num_tokens
        for key in self._pool._remove_cached_block_hashes(block):
            if not is_meant(key):
                self._pool._insert_block_hash(key, block, num_tokens=num_tokens)

    def _pages(self, request: Request, limits: RequestLimits, cut: int) -> list[KVCacheBlock] | None:
        """All that a prompt holds behind a cut; None: some of it is gone."""
        blocks = []
        for index in reversed(range(limits.prefix_tokens(self._block_size) // self._block_size)):
            # Pages behind leave the cache first.
            block = self._page(request, limits, cut, _Place(self._group_id, index, cut))
            if block is None:
                return None
            blocks.append(block)
        return blocks[::-1]

    def _pages_at_end(self, request: Request, of_limits: bytes, position: int) -> list[KVCacheBlock] | None:
        """All that a request held when it ended at ``position``; None: nothing is there, or some of it is gone."""
        blocks: list[KVCacheBlock] = []
        while True:
            index = len(blocks)
            last = self._key_at_end(request, of_limits, position, index)
            found = self._pool.get_cached_block(last, [self._group_id])
            if found is None:
                return None
            blocks += found
            first = self._key_at_end(request, of_limits, position, index, _FIRST)
            if self._pool.get_cached_block(first, [self._group_id]) == found:
                return blocks[::-1]

    def _key_at_end(
        self, request: Request, of_limits: bytes, position: int, index: int, name: bytes = _END
    ) -> BlockHash:
        """Of a page that a request held at its end; index: from the last one on."""
        tokens = self._hash_of_tokens(request, position)
        return BlockHash(tokens + of_limits + name + index.to_bytes(_INDEX_BYTES, "big"))

    def _beside(
        self, request: Request, limits: RequestLimits, cut: int, position: int
    ) -> dict[int, list[KVCacheBlock]] | None:
        """What the layers of other groups attend to from ``position`` on; None: some of it is gone."""
        found: dict[int, list[KVCacheBlock]] = {}
        for group_id in self.windows:
            found[group_id] = [self._pool.null_block] * (position // self._block_size)
            for place in self._places_of_window(group_id, cut, position):
                block = self._page(request, limits, cut, place)
                if block is None:
                    return None
                found[group_id][place.at] = block
        return found

    def _places_of_window(self, group_id: int, cut: int, position: int) -> Iterator[_Place]:
        """Yields the places of the pages that a window reaches from ``position`` on, the last one first."""
        first = max(0, position - self.windows[group_id] + 1) // self._block_size
        for index in reversed(range(first, position // self._block_size)):
            yield _Place(group_id, index, max(cut, (index + 1) * self._block_size))

    def _page(self, request: Request, limits: RequestLimits, cut: int, place: _Place) -> KVCacheBlock | None:
        found = self._pool.get_cached_block(self._hash(request, limits, cut, place), [place.group_id])
        return found[0] if found else None

    def _hash(self, request: Request, limits: RequestLimits, cut: int, place: _Place) -> BlockHash:
        tokens = self._hash_of_tokens(request, place.end)
        return BlockHash(tokens + _of_cut(limits, cut) + place.at.to_bytes(_INDEX_BYTES, "big"))

    def _hash_of_tokens(self, request: Request, end: int) -> BlockHash:
        """Of all tokens before ``end``. vLLM's hashes may be of less than a page where there are several groups."""
        return request.block_hashes[end // self._pool.hash_block_size - 1]


class LeavingFirst:
    """Pages that leave the prefix cache first: a part of vLLM's queue of free pages, behind those that are not in the
    prefix cache and before all others.

    Args:
        block_pool: whose pages they are.
    """

    def __init__(self, block_pool: BlockPool) -> None:
        self._queue = block_pool.free_block_queue
        # Behind it the next page is put. With its key: with another one it is elsewhere in the queue by now.
        self._marker: tuple[KVCacheBlock, bytes | None] = self._queue.fake_free_list_head, None
        # By page: its key when a request found it last, and how many did.
        self._found: list[bytes | None] = [None] * len(block_pool.blocks)
        self._times: list[int] = [0] * len(block_pool.blocks)
        # By page: its key when it was let leave first, until a request finds it.
        self._let: list[bytes | None] = [None] * len(block_pool.blocks)

    def __contains__(self, block: KVCacheBlock) -> bool:
        key = block.block_hash
        return key is not None and not block.ref_cnt and self._let[block.block_id] == key

    def add(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Lets pages that were freed just now leave in this order, but for those that two requests have found."""
        for block in {block.block_id: block for block in blocks}.values():  # two sequences may have given up one
            key = block.block_hash
            if key is not None and not block.ref_cnt and not block.is_null and self._times_found(block) < 2:
                self._queue.remove(block)
                self._put_behind(self._place(), block)
                self._marker = block, key
                self._let[block.block_id] = key

    def note_found(self, blocks: Iterable[KVCacheBlock]) -> None:
        """A request starts with these pages. Call before they leave the queue."""
        found = set()
        for block in blocks:
            if block.block_hash is not None:
                self._times[block.block_id] = self._times_found(block) + 1
                self._found[block.block_id] = block.block_hash
                self._let[block.block_id] = None
                found.add(block.block_id)
        head = self._queue.fake_free_list_head
        last, _ = self._marker
        while last.block_id in found and last.prev_free_block is not None:
            last = last.prev_free_block
            # One without a key may be anywhere by the next time.
            self._marker = (last, last.block_hash) if last.block_hash is not None else (head, None)

    def _times_found(self, block: KVCacheBlock) -> int:
        return self._times[block.block_id] if self._found[block.block_id] == block.block_hash else 0

    def _place(self) -> KVCacheBlock:
        """The page, or the head of the queue, behind which the next one goes."""
        last, key = self._marker
        if last.next_free_block is None or last.block_hash != key:
            last = self._queue.fake_free_list_head
        while (behind := last.next_free_block) is not None and behind.block_hash is None and behind.block_id >= 0:
            last = behind
        return last

    def _put_behind(self, last: KVCacheBlock, block: KVCacheBlock) -> None:
        behind = last.next_free_block
        assert behind is not None, "the tail of the queue is behind all pages"
        last.next_free_block, block.prev_free_block = block, last
        block.next_free_block, behind.prev_free_block = behind, block
        self._queue.num_free_blocks += 1


def _of_cut(limits: RequestLimits, cut: int) -> bytes:
    return _digest(limits) + cut.to_bytes(8, "big")


def _is_of_cut(key: bytes, limits: RequestLimits, cut: int) -> bool:
    of_cut, behind = _of_cut(limits, cut), _INDEX_BYTES + _GROUP_BYTES
    return key[-len(of_cut) - behind : -behind] == of_cut


@functools.lru_cache(maxsize=1024)
def _digest(limits: RequestLimits) -> bytes:
    return hashlib.sha256(repr(limits).encode()).digest()
