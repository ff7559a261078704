"""Counters of KV compression: kept by the scheduler, shown in its log line and under ``/metrics``.

vLLM sends its ``SchedulerStats`` from the engine process to the front end, where :class:`KVCompressionStatLogger`, put there by
compat.py, takes ours off before vLLM's own loggers see them.
"""

import dataclasses

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

_KEY = "kv_compression"


@dataclasses.dataclass
class KVCompressionStats:
    """Totals since the engine started, and gauges of now.

    Attributes:
        compactions: evictions carried out (one per sequence and time).
        evicted_tokens: tokens evicted from sequences.
        freed_pages: pages that evictions gave up and nobody else held.
        resident_tokens: tokens that running sequences hold now.
        compressed_requests: running sequences that have evicted tokens.
    """

    compactions: int = 0
    evicted_tokens: int = 0
    freed_pages: int = 0
    resident_tokens: int = 0
    compressed_requests: int = 0

    def __str__(self) -> str:
        return (
            f"KV compression: {self.compactions} compactions, {self.evicted_tokens} tokens evicted, "
            f"{self.freed_pages} pages freed; now {self.resident_tokens} tokens resident, "
            f"{self.compressed_requests} running requests compressed"
        )


def attach_stats(scheduler_stats: SchedulerStats, stats: KVCompressionStats) -> None:
    """Lets ``stats`` travel with ``scheduler_stats``; :func:`detach_stats` takes them off on the other side.

    A SchedulerStats subclass would lose its fields in transit. ``kv_connector_stats`` is an open dictionary, unused here: KV
    connectors are refused at start.
    """
    assert scheduler_stats.kv_connector_stats is None
    scheduler_stats.kv_connector_stats = {_KEY: dataclasses.asdict(stats)}


def detach_stats(scheduler_stats: SchedulerStats | None) -> KVCompressionStats | None:
    """The inverse of :func:`attach_stats`; None where KV compression is off."""
    if scheduler_stats is None or not scheduler_stats.kv_connector_stats or _KEY not in scheduler_stats.kv_connector_stats:
        return None
    values = scheduler_stats.kv_connector_stats.pop(_KEY)
    scheduler_stats.kv_connector_stats = None
    return KVCompressionStats(**values)


class KVCompressionStatLogger(AggregateStatLoggerBase):
    """``vllm:kv_compression_*`` in the front end, labelled like vLLM's own metrics. Stands before vLLM's loggers."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        labels = ["model_name", "engine"]
        self.counters = {
            name: Counter(f"vllm:kv_compression_{name}", text, labels)
            for name, text in (
                ("compactions", "Evictions carried out."),
                ("evicted_tokens", "Tokens evicted from the KV cache."),
                ("freed_pages", "KV cache pages that evictions freed."),
            )
        }
        self.gauges = {
            name: Gauge(f"vllm:kv_compression_{name}", text, labels, multiprocess_mode="mostrecent")
            for name, text in (
                ("resident_tokens", "Tokens that running sequences hold."),
                ("compressed_requests", "Running sequences that have evicted tokens."),
            )
        }
        self._labels = {index: (vllm_config.model_config.served_model_name, str(index)) for index in engine_indexes}
        self._last = {index: KVCompressionStats() for index in engine_indexes}
        for index in engine_indexes:
            self._update(index, KVCompressionStats())  # so that every metric shows from the start, at 0

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        stats = detach_stats(scheduler_stats)
        if stats is not None:
            self._update(engine_idx, stats)

    def log_engine_initialized(self) -> None:
        """The worker has logged what is active; nothing to add."""

    def _update(self, engine_idx: int, stats: KVCompressionStats) -> None:
        labels, last = self._labels[engine_idx], self._last[engine_idx]
        for name, counter in self.counters.items():
            counter.labels(*labels).inc(getattr(stats, name) - getattr(last, name))
        for name, gauge in self.gauges.items():
            gauge.labels(*labels).set(getattr(stats, name))
        self._last[engine_idx] = stats
