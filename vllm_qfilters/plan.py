"""What the scheduler tells the workers to evict: frozen messages, sent with every step's scheduler output."""

import dataclasses

from vllm.v1.core.sched.output import SchedulerOutput


@dataclasses.dataclass(frozen=True)
class RequestCompaction:
    """One sequence loses whole pages' worth of tokens before the next step runs.

    The scheduler decides how many, the workers decide which, from the scores: every layer and KV head evicts the same count.

    Attributes:
        req_id: the request.
        position: of its next token.
        resident_tokens: tokens it holds now.
        evicted_tokens: tokens it loses, a multiple of the block size.
        sinks: first tokens that must stay where they are.
        window: last tokens that must stay, in order.
        block_ids: its pages afterwards. The pages taken out of the middle held the end of the evictable region; a page that
            was shared or prefix-cached and must be written is replaced by a private one.
        copied_pages: the private ones, as (place among the sequence's pages before, page).
    """

    req_id: str
    position: int
    resident_tokens: int
    evicted_tokens: int
    sinks: int
    window: int
    block_ids: tuple[int, ...]
    copied_pages: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class CompactionPlan:
    """All evictions of one step, applied by the workers before they touch the cache for it."""

    rows: tuple[RequestCompaction, ...] = ()


@dataclasses.dataclass
class QFiltersSchedulerOutput(SchedulerOutput):
    """A step's scheduler output with the evictions to apply before it runs."""

    compaction: CompactionPlan = CompactionPlan()

    @classmethod
    def from_output(cls, output: SchedulerOutput, compaction: CompactionPlan) -> "QFiltersSchedulerOutput":
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(SchedulerOutput)}
        return cls(**values, compaction=compaction)
