"""What the scheduler tells the workers to evict, and what they tell it of pages: messages sent with the outputs of a step.

Page granularity needs an answer: a step's scheduler output names the pages it fills, and its model runner output brings their
scores, in the same order.
"""

import dataclasses

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput


@dataclasses.dataclass(frozen=True)
class RequestCompaction:
    """One sequence loses whole pages' worth of tokens before the next step runs.

    The scheduler decides how many, the workers decide which, from the scores: every layer and KV head evicts the same count.
    In page granularity the scheduler has decided which, too: the workers only replace the pages.

    Attributes:
        req_id: the request.
        position: of its next token.
        resident_tokens: tokens it holds now.
        evicted_tokens: tokens it loses, a multiple of the block size.
        sinks: first tokens that must stay where they are.
        window: last tokens that must stay, in order.
        block_ids: its pages afterwards. In token granularity the pages taken out of the middle held the end of the evictable
            region, and a page that was shared or prefix-cached and must be written is replaced by a private one.
        copied_pages: the private ones, as (place among the sequence's pages before, page).
        shared_pages_out: pages taken out that other sequences hold too, where the workers write beside the tokens of all pages.
        distinct_tokens: of those kept, how many stay because their keys are unlike the others, and not for their score.
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


@dataclasses.dataclass(frozen=True)
class CompactionPlan:
    """All evictions of one step, applied by the workers before they touch the cache for it."""

    rows: tuple[RequestCompaction, ...] = ()


@dataclasses.dataclass
class QFiltersSchedulerOutput(SchedulerOutput):
    """A step's scheduler output with the evictions to apply before it runs.

    Attributes:
        compaction: the evictions.
        pages_to_score: pages this step fills, whose scores are wanted back; page granularity alone.
    """

    compaction: CompactionPlan = CompactionPlan()
    pages_to_score: tuple[int, ...] = ()

    @classmethod
    def from_output(cls, output: SchedulerOutput, compaction: CompactionPlan) -> "QFiltersSchedulerOutput":
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(SchedulerOutput)}
        return cls(**values, compaction=compaction)


@dataclasses.dataclass
class QFiltersModelRunnerOutput(ModelRunnerOutput):
    """A step's model runner output with the scores of the pages it filled, and the time compaction took.

    A subclass of vLLM's output reaches the scheduler whole: outputs are pickled between processes, and asynchronous ones are
    replaced by what their ``get_output`` returns.

    Attributes:
        page_scores: of the step's ``pages_to_score``, in their order.
        compaction_seconds: that the rank which reports to the scheduler spent compacting since its last output.
    """

    page_scores: tuple[float, ...] = ()
    compaction_seconds: float = 0.0

    @classmethod
    def from_output(
        cls, output: ModelRunnerOutput, *, page_scores: tuple[float, ...] = (), compaction_seconds: float = 0.0
    ) -> "QFiltersModelRunnerOutput":
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(ModelRunnerOutput)}
        return cls(**values, page_scores=page_scores, compaction_seconds=compaction_seconds)
