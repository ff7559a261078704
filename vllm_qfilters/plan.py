"""What the scheduler tells the workers to evict. It imports nothing of ours: the kernels read these records too."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RequestCompaction:
    """One sequence loses whole pages' worth of tokens before the next step runs.

    The scheduler decides how many, the workers decide which, from the scores: every layer and KV head evicts the same
    count. In page granularity the scheduler has decided which, too: the workers only replace the pages.

    Attributes:
        req_id: the request.
        position: the position of its next token.
        resident_tokens: tokens it holds now.
        evicted_tokens: tokens it loses, a multiple of the block size.
        sinks: first tokens that must stay where they are.
        window: last tokens that must stay, in order.
        block_ids: its pages afterwards. In token granularity the pages taken out of the middle held the end of the
            evictable region, from which the tokens that stay move up, and a page that was shared or prefix-cached and
            must be written is replaced by a private one.
        copied_pages: the private ones, as (place among the sequence's pages before, page).
        shared_pages_out: pages taken out that other sequences hold too, where the workers write beside the tokens of
            all pages.
        distinct_tokens: how many of the kept tokens stay because their values are unlike the others, and not for their
            score.
        unobserved_tokens: how many of its last tokens no prompt's queries have looked at: those since its last cut
            behind the prompt, before the first one all.
    """

    req_id: str
    position: int
    resident_tokens: int
    evicted_tokens: int
    sinks: int
    window: int
    block_ids: tuple[int, ...]
    copied_pages: tuple[tuple[int, int], ...] = ()
    shared_pages_out: tuple[int, ...] = ()
    distinct_tokens: int = 0
    unobserved_tokens: int = 0

    @property
    def kept_before_window(self) -> int:
        """Tokens of one layer and head that stay before the window."""
        return self.resident_tokens - self.evicted_tokens - self.window


@dataclasses.dataclass(frozen=True)
class CompactionPlan:
    """All evictions of one step, applied by the workers before they touch the cache for it."""

    compactions: tuple[RequestCompaction, ...] = ()


@dataclasses.dataclass(frozen=True)
class PrefixHit:
    """One request starts behind a compressed prefix.

    Attributes:
        req_id: the request.
        cut: the position of the last cut before; ``position`` where the prefix is what a request held at its end.
        position: of the first token it computes.
        evicted_tokens: tokens of the prefix that it does not hold.
        block_ids: the pages that a sequence holds right behind that cut.
        resumes: the prefix is what an earlier request held at its end.
    """

    req_id: str
    cut: int
    position: int
    evicted_tokens: int
    block_ids: tuple[int, ...]
    resumes: bool = False
