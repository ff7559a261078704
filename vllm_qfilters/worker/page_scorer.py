"""Scores of the pages a step fills, on this rank's layers and heads. The model runner calls it around each step.

No state is kept per page: a page is scored once, when it is full, from the scores of its tokens.
"""

from collections.abc import Callable, Sequence

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_qfilters.messages import QFiltersModelRunnerOutput, QFiltersSchedulerOutput
from vllm_qfilters.worker.late_output import LateOutput


class PageScorer:
    """Scores pages, and sends the scores to the scheduler with the step's output.

    Args:
        page_scores: the kernel, with the signature of :func:`vllm_qfilters.kernels.reference.page_scores`.
        scores: of all tokens, shape ``[num_layers, num_blocks, num_kv_heads, block_size]``, float32.
        mean, std: of the scores of each head, shape ``[num_layers, num_kv_heads]``. A head whose scores do not vary has
            no say.
        mean_over_ranks: the mean of a tensor over the ranks that hold other heads of the same layers; returns it.
    """

    def __init__(
        self,
        page_scores: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        scores: torch.Tensor,
        mean: torch.Tensor,
        std: torch.Tensor,
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._page_scores = page_scores
        self._scores = scores
        self._mean = mean.to(scores).contiguous()
        self._std = std.masked_fill(std <= 0, torch.inf).to(scores).contiguous()
        self._mean_over_ranks = mean_over_ranks
        self._of_step: torch.Tensor | None = None  # [num_pages] on the host, once the device has come to it

    def warm_up(self) -> None:
        """Scores the null page, for nobody."""
        self._mean_over_ranks(self._page_scores(self._scores, self._on_device([0]), self._mean, self._std))

    def score_filled_pages(self, scheduler_output: SchedulerOutput) -> None:
        """Call when the step's forward pass is launched, and before its output is made.

        On a device nothing waits here: the output's own synchronisation covers the copy to the host, which comes before
        it.
        """
        if not isinstance(scheduler_output, QFiltersSchedulerOutput) or not scheduler_output.pages_to_score:
            return
        pages = self._on_device(scheduler_output.pages_to_score)
        scores = self._mean_over_ranks(self._page_scores(self._scores, pages, self._mean, self._std))
        # Only a copy to pinned memory is asynchronous.
        self._of_step = torch.empty(scores.shape, pin_memory=scores.is_cuda).copy_(scores, non_blocking=True)

    def _on_device(self, pages: Sequence[int]) -> torch.Tensor:
        on_host = torch.tensor(pages, dtype=torch.int64, pin_memory=self._scores.is_cuda)
        return on_host.to(self._scores.device, non_blocking=True)

    def attach(self, output: ModelRunnerOutput | AsyncModelRunnerOutput) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """The step's output with the scores of its pages."""
        scores, self._of_step = self._of_step, None
        if scores is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return LatePageScores(output, scores)
        return QFiltersModelRunnerOutput.from_output(output, page_scores=tuple(scores.tolist()))


class LatePageScores(LateOutput):
    """An output still on its way from the device, and page scores that arrive before it does."""

    def __init__(self, output: AsyncModelRunnerOutput, scores: torch.Tensor) -> None:
        super().__init__(output)
        self._scores = scores

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        return QFiltersModelRunnerOutput.from_output(output, page_scores=tuple(self._scores.tolist()))
