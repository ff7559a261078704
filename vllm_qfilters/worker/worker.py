"""What the workers of all platforms share: what the command line asks of them."""

from typing import Any

from vllm_qfilters.filters.format import STORED_RANK, save
from vllm_qfilters.filters.load import cache_path


class CompressedWorker:
    """Goes before a worker of vLLM whose model runner is a ``CompressedModelRunner``."""

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """See :meth:`_refuse_new_weights`."""
        self._refuse_new_weights("reload_weights")
        super().reload_weights(*args, **kwargs)

    def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """See :meth:`_refuse_new_weights`."""
        self._refuse_new_weights("update_weights")
        super().update_weights(*args, **kwargs)

    def _refuse_new_weights(self, how: str) -> None:
        """Raises ValueError where scores go by filters of the old weights; it says what to do."""
        if self.model_runner.compression.entry.needs_filters:
            raise ValueError(
                f"KV compression does not support {how} with filters, which were calibrated for the weights before: "
                "start the engine again, or choose a method without filters"
            )

    def calibrate_filters(
        self, sequences: list[list[int]], description: str, path: str, rank: int = STORED_RANK
    ) -> str:
        """Calibrates filters and writes them to ``path``, or where ``filters: auto`` looks for them if it is empty.

        Called on all workers of an idle engine (``LLM.collective_rpc``).

        Args:
            rank: the largest that the filters are to be used with.

        Returns:
            The path.
        """
        model = self.model_runner.identity
        path = path or str(cache_path(model, self.model_runner.weights_fingerprint()))
        filters = self.model_runner.calibrate_filters(sequences, description, rank)
        if self.rank == 0:
            save(path, filters, model)
        return path

    def record_kept_tokens(self) -> None:
        """See :meth:`vllm_qfilters.worker.runner.CompressedModelRunner.record_kept_tokens`."""
        self.model_runner.record_kept_tokens()

    def take_kept_tokens(self) -> dict[str, Any]:
        """See :meth:`vllm_qfilters.worker.runner.CompressedModelRunner.take_kept_tokens`."""
        return self.model_runner.take_kept_tokens()
