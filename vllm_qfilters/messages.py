"""What travels with the outputs of a step: plans to the workers, scores of pages and times back to the scheduler.

Page granularity needs an answer: a step's scheduler output names the pages it fills, and its model runner output brings
their scores, in the same order.
"""

import dataclasses

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_qfilters.plan import CompactionPlan, PrefixHit


@dataclasses.dataclass
class QFiltersSchedulerOutput(SchedulerOutput):
    """A step's scheduler output with the evictions to apply before it runs.

    Attributes:
        compaction: the evictions.
        prefix_hits: requests that start this step behind a compressed prefix.
        pages_to_score: pages this step fills, whose scores are wanted back; page granularity alone.
    """

    compaction: CompactionPlan = dataclasses.field(default_factory=CompactionPlan)
    prefix_hits: tuple[PrefixHit, ...] = ()
    pages_to_score: tuple[int, ...] = ()

    @classmethod
    def from_output(
        cls, output: SchedulerOutput, compaction: CompactionPlan, prefix_hits: tuple[PrefixHit, ...] = ()
    ) -> "QFiltersSchedulerOutput":
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(SchedulerOutput)}
        return cls(**values, compaction=compaction, prefix_hits=prefix_hits)


@dataclasses.dataclass
class QFiltersModelRunnerOutput(ModelRunnerOutput):
    """A step's model runner output with the scores of the pages it filled, and the time compaction took.

    A subclass of vLLM's output reaches the scheduler whole: outputs are pickled between processes, and asynchronous
    ones are replaced by what their ``get_output`` returns.

    Attributes:
        page_scores: the scores of the step's ``pages_to_score``, in their order.
        compaction_seconds: the time that the rank which reports to the scheduler spent compacting since its last
            output.
    """

    page_scores: tuple[float, ...] = ()
    compaction_seconds: float = 0.0

    @classmethod
    def from_output(
        cls, output: ModelRunnerOutput, *, page_scores: tuple[float, ...] = (), compaction_seconds: float = 0.0
    ) -> "QFiltersModelRunnerOutput":
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(ModelRunnerOutput)}
        return cls(**values, page_scores=page_scores, compaction_seconds=compaction_seconds)
