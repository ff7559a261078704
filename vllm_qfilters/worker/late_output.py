"""Outputs of steps that the device has not come to yet, with something of ours to be sent along."""

from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput


class LateOutput(AsyncModelRunnerOutput):
    """Goes around an output of vLLM; ``get_output`` is for subclasses."""

    def __init__(self, output: AsyncModelRunnerOutput) -> None:
        self._output = output

    def get_kv_connector_output(self) -> Any:
        """vLLM's own. Asked for from 0.33 on, when ``get_output`` fails."""
        return self._output.get_kv_connector_output()
