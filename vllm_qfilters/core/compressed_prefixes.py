"""Compressed prefixes: what prompts hold behind a cut, kept in vLLM's own prefix cache for prompts that begin alike.

Runs in the engine process; the block manager calls it. What a sequence holds while its prompt is read is a function of
its tokens up to there and of its limits: prompts are cut at multiples of ``prefill_interval``, and what a cut keeps
follows from the tokens before it. So the pages behind a cut are found again by the hash of those tokens, as vLLM has
it (salt and adapter are in it), the limits, the cut, and the place of the page. They are in vLLM's map of hashes and in
its queue of free pages, and leave both as other pages do.

The pages of a cut belong together: another prompt that was cut at the same tokens may have decided a tie otherwise, for
other tokens were computed beside its own. Therefore the pages of one sequence alone are there at a time.

What a request holds at its end is no such function: its answer was generated under the decoding budget, and other
requests that end with the same tokens may hold others of them. It is kept where the user wants follow-up prompts to go
on from there, by the hash of all its tokens, the limits, and the place of the page, counted from the last one.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.request import Request

from vllm_qfilters.budget import RequestLimits, cdiv

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
    """

    cut: int | None
    blocks: list[KVCacheBlock]
    position: int
    evicted: int


class CompressedPrefixes:
    """Finds and keeps compressed prefixes.

    Args:
        block_pool: whose pages they are.
        block_size: tokens per page.
        group_id: of the KV cache group.
    """

    def __init__(self, block_pool: BlockPool, block_size: int, group_id: int) -> None:
        self._pool = block_pool
        self._block_size = block_size
        self._group_id = group_id

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
                block = self._page(request, limits, cut, len(blocks))
                if block is None:
                    break
                blocks.append(block)
                position += self._block_size
            return CompressedPrefix(cut, blocks, position, position - len(blocks) * self._block_size)
        return None

    def add(self, request: Request, limits: RequestLimits, cut: int, blocks: Sequence[KVCacheBlock]) -> bool:
        """Keeps what a prompt holds behind a cut; False: that of another sequence is there.

        Args:
            blocks: all its pages, of which none is written any more while it is in the cache.
        """
        places = range(limits.prefix_tokens(self._block_size) // self._block_size)
        cached = [self._page(request, limits, cut, index) for index in places]
        if all(block is not None for block in cached):
            return False
        others = [block for block, own in zip(cached, blocks, strict=False) if block is not None and block is not own]
        self.forget_cut(others, limits, cut)
        for index in places:
            self.add_page(request, limits, cut, index, blocks[index])
        return True

    def add_page(self, request: Request, limits: RequestLimits, cut: int, index: int, block: KVCacheBlock) -> None:
        """Keeps a full page of a sequence that was cut last at ``cut``; index: its place in the sequence."""
        key = make_block_hash_with_group_id(self._hash(request, limits, cut, index), self._group_id)
        self._pool._insert_block_hash(key, block, num_tokens=self._end(limits, cut, index))

    def find_end(self, request: Request, limits: RequestLimits, shortest: int, longest: int) -> CompressedPrefix | None:
        """What an earlier request held at its end, of those that this one begins with the longest that is there whole.

        Args:
            request, limits, longest: as for :meth:`find`.
            shortest: fewest tokens that are worth it.
        """
        size = self._block_size
        shortest = max(shortest, limits.budget - limits.interval)  # no less is left of what was ever cut
        for position in range(longest // size * size, cdiv(shortest, size) * size - 1, -size):
            blocks = self._pages_at_end(request, limits, position)
            if blocks is not None:
                return CompressedPrefix(None, blocks, position, position - len(blocks) * size)
        return None

    def add_end(self, request: Request, limits: RequestLimits, position: int, blocks: Sequence[KVCacheBlock]) -> None:
        """Keeps what a request holds at its end, in the place of what another one held behind the same tokens.

        Args:
            position: behind the last token of ``blocks``, a multiple of the block size.
            blocks: its full pages; it has evicted tokens.
        """
        keys = [self._key_at_end(request, limits, position, index) for index in range(len(blocks))]
        keys.append(self._key_at_end(request, limits, position, len(blocks) - 1, _FIRST))
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
        self._pool.evict_blocks({block.block_id for block in blocks})

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
            block = self._page(request, limits, cut, index)  # pages behind leave the cache first
            if block is None:
                return None
            blocks.append(block)
        return blocks[::-1]

    def _pages_at_end(self, request: Request, limits: RequestLimits, position: int) -> list[KVCacheBlock] | None:
        """All that a request held when it ended at ``position``; None: nothing is there, or some of it is gone."""
        blocks: list[KVCacheBlock] = []
        while True:
            last, first = (self._key_at_end(request, limits, position, len(blocks), name) for name in (_END, _FIRST))
            found = self._pool.get_cached_block(last, [self._group_id])
            if found is None:
                return None
            blocks += found
            if self._pool.get_cached_block(first, [self._group_id]) == found:
                return blocks[::-1]

    def _key_at_end(
        self, request: Request, limits: RequestLimits, position: int, index: int, name: bytes = _END
    ) -> BlockHash:
        """Of a page that a request held at its end; index: from the last one on."""
        tokens = request.block_hashes[position // self._block_size - 1]
        return BlockHash(tokens + _digest(limits) + name + index.to_bytes(_INDEX_BYTES, "big"))

    def _page(self, request: Request, limits: RequestLimits, cut: int, index: int) -> KVCacheBlock | None:
        found = self._pool.get_cached_block(self._hash(request, limits, cut, index), [self._group_id])
        return found[0] if found else None

    def _hash(self, request: Request, limits: RequestLimits, cut: int, index: int) -> BlockHash:
        tokens = request.block_hashes[self._end(limits, cut, index) // self._block_size - 1]
        return BlockHash(tokens + _of_cut(limits, cut) + index.to_bytes(_INDEX_BYTES, "big"))

    def _end(self, limits: RequestLimits, cut: int, index: int) -> int:
        """How many tokens a page is a function of: all up to the cut, or up to its own last one."""
        return cut + max(0, (index + 1) * self._block_size - limits.prefix_tokens(self._block_size))


def _of_cut(limits: RequestLimits, cut: int) -> bytes:
    return _digest(limits) + cut.to_bytes(8, "big")


def _is_of_cut(key: bytes, limits: RequestLimits, cut: int) -> bool:
    of_cut, behind = _of_cut(limits, cut), _INDEX_BYTES + _GROUP_BYTES
    return key[-len(of_cut) - behind : -behind] == of_cut


@functools.lru_cache(maxsize=1024)
def _digest(limits: RequestLimits) -> bytes:
    return hashlib.sha256(repr(limits).encode()).digest()
