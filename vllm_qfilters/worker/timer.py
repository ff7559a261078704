"""Seconds this rank spends compacting, sent to the scheduler with the outputs of steps. Nothing waits for the
device.
"""

import contextlib
import time
from collections.abc import Iterator

import torch
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_qfilters.messages import QFiltersModelRunnerOutput
from vllm_qfilters.worker.late_output import LateOutput


class CompactionTimer:
    """Measures between two marks: clock readings on CPUs, which compute at once, and events in the stream on GPUs.

    Args:
        device: where compaction takes place.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._intervals: list[tuple[float, float] | tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        start = self._mark()
        yield
        self._intervals.append((start, self._mark()))

    def attach(
        self, output: ModelRunnerOutput | AsyncModelRunnerOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        """The step's output with the seconds measured since the last one.

        Pipeline stages before the last have no output, or an empty one: it stays as it is, and nothing comes with it
        that would have waited for the device.
        """
        intervals, self._intervals = self._intervals, []
        if not intervals or output is None or output is EMPTY_MODEL_RUNNER_OUTPUT:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _LateTimedOutput(output, intervals)
        return _timed(output, intervals)

    def _mark(self) -> "float | torch.cuda.Event":
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _LateTimedOutput(LateOutput):
    """An output still on its way from the device. Once it is there, the compaction before it has ended."""

    def __init__(self, output: AsyncModelRunnerOutput, intervals: list) -> None:
        super().__init__(output)
        self._intervals = intervals

    def get_output(self) -> ModelRunnerOutput:
        return _timed(self._output.get_output(), self._intervals)


def _timed(output: ModelRunnerOutput, intervals: list) -> QFiltersModelRunnerOutput:
    # No output has page scores as well: with page granularity nothing is compacted here.
    return QFiltersModelRunnerOutput.from_output(
        output, compaction_seconds=sum(_seconds(*interval) for interval in intervals)
    )


def _seconds(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
