"""The scheduler of page granularity: asks the workers for the scores of pages that a step fills, and evicts by them.

Scores come back with the step's output: at once without async scheduling, one step late or more with it. Choosing among
pages whose scores are still to come would make what is evicted a matter of timing. A sequence that would have to, which
happens at the cuts of its prompt (or with a window of less than a few tokens), sits out the step, and is cut in the
next one: it computes no token meanwhile, so it stays within its budget, and evictions are the same with and without
async scheduling.
"""

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_qfilters.core.page_manager import PageManager
from vllm_qfilters.core.scheduler import QFiltersScheduler
from vllm_qfilters.messages import QFiltersModelRunnerOutput, QFiltersSchedulerOutput


class QFiltersPageScheduler(QFiltersScheduler):
    """Frees the lowest-scoring pages of sequences that reach their budget."""

    block_manager: PageManager

    def schedule(self, throttle_prefills: bool = False) -> QFiltersSchedulerOutput:
        output = super().schedule(throttle_prefills)
        if self.compression.needs_scores:
            filled = []
            for req_id, num_tokens in output.num_scheduled_tokens.items():
                request, num_unverified = self.requests[req_id], self.unverified_drafts.get(req_id, 0)
                # Whole pages are evicted: positions end with them.
                if request.num_computed_tokens % self.block_manager.block_size < num_tokens + num_unverified:
                    filled += self.block_manager.expect_scores(request, num_tokens, num_unverified)
            output.pages_to_score = tuple(filled)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        # First: what follows may end requests, and their pages keep their scores for whoever finds them in the prefix
        # cache.
        assert isinstance(scheduler_output, QFiltersSchedulerOutput)
        if scheduler_output.pages_to_score:
            assert isinstance(model_runner_output, QFiltersModelRunnerOutput)
            self.block_manager.receive_scores(scheduler_output.pages_to_score, model_runner_output.page_scores)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _sits_out(self, request: Request, evicted_tokens: int) -> bool:
        return super()._sits_out(request, evicted_tokens) or self.block_manager.awaits_scores(request, evicted_tokens)
