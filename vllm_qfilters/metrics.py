"""Counters of KV compression: kept by the scheduler, shown in its log line and under ``/metrics``.

vLLM sends its ``SchedulerStats`` from the engine process to the front end, where :class:`KVCompressionStatLogger`, put there by
compat.py, takes ours off before vLLM's own loggers see them. What is counted travels as the increase since the last message: a
server of several front ends sends each message to one of them, and Prometheus adds up what they count.
"""

import dataclasses
from typing import NamedTuple

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.buckets import histogram_buckets
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

PREFIX = "vllm:kv_compression_"
COUNTERS = {
    "compactions": "Evictions carried out, one per sequence and time.",
    "evicted_tokens": "Tokens evicted from the KV cache.",
    "freed_pages": "KV cache pages that evictions gave up and nobody else held.",
    "compaction_seconds": "Seconds one rank spent choosing and moving tokens; nothing is moved with page granularity.",
}
GAUGES = {
    "resident_tokens": "Tokens that running sequences hold.",
    "compressed_requests": "Running sequences that have evicted tokens.",
    "saved_pages": "KV cache pages that running sequences would hold without compression, less those they hold.",
}
HISTOGRAMS = {
    "request_resident_tokens": "Most tokens a sequence held at once, of sequences that have ended.",
}
_KEY = "kv_compression"


class RunningSequence(NamedTuple):
    """A sequence the scheduler is running.

    Attributes:
        request_id: begins with the id of the response.
        prompt_tokens: of its request.
        position: of its next token.
        resident_tokens: it holds.
        budget: most tokens it holds while decoding; None: compression is off for it.
        evictions: it went through.
    """

    request_id: str
    prompt_tokens: int
    position: int
    resident_tokens: int
    budget: int | None
    evictions: int


@dataclasses.dataclass
class KVCompressionStats:
    """Totals since the engine started, and gauges of now; of what is sent, increases since the last message instead of totals.

    Attributes:
        compactions: evictions carried out (one per sequence and time).
        evicted_tokens: tokens evicted from sequences.
        freed_pages: pages that evictions gave up and nobody else held.
        compaction_seconds: that one rank spent compacting.
        resident_tokens: tokens that running sequences hold now.
        compressed_requests: running sequences that have evicted tokens.
        saved_pages: pages that running sequences would hold uncompressed, less those they hold.
        request_resident_tokens: of sequences that ended since the last message: the most tokens each held at once.
        sequences: running now, where the endpoint is on.
    """

    compactions: int = 0
    evicted_tokens: int = 0
    freed_pages: int = 0
    compaction_seconds: float = 0.0
    resident_tokens: int = 0
    compressed_requests: int = 0
    saved_pages: int = 0
    request_resident_tokens: list[int] = dataclasses.field(default_factory=list)
    sequences: list[RunningSequence] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"KV compression: {self.compactions} compactions in {self.compaction_seconds:.3g} s, {self.evicted_tokens} tokens "
            f"evicted, {self.freed_pages} pages freed; now {self.resident_tokens} tokens resident, "
            f"{self.compressed_requests} running requests compressed, {self.saved_pages} pages saved"
        )

    def take_news(self, sent: "KVCompressionStats") -> "KVCompressionStats":
        """The message after ``sent``, the totals as of the last one, which becomes what these are now."""
        news = dataclasses.replace(self, **{name: getattr(self, name) - getattr(sent, name) for name in COUNTERS})
        for name in COUNTERS:
            setattr(sent, name, getattr(self, name))
        self.request_resident_tokens = []
        return news


def attach_stats(scheduler_stats: SchedulerStats, news: KVCompressionStats) -> None:
    """Lets ``news`` travel with ``scheduler_stats``; :func:`detach_stats` takes them off on the other side.

    A SchedulerStats subclass would lose its fields in transit. ``kv_connector_stats`` is an open dictionary, unused here: KV
    connectors are refused at start.
    """
    assert scheduler_stats.kv_connector_stats is None
    scheduler_stats.kv_connector_stats = {_KEY: vars(news)}


def detach_stats(scheduler_stats: SchedulerStats | None) -> KVCompressionStats | None:
    """The inverse of :func:`attach_stats`; None where KV compression is off."""
    if scheduler_stats is None or not scheduler_stats.kv_connector_stats or _KEY not in scheduler_stats.kv_connector_stats:
        return None
    values = scheduler_stats.kv_connector_stats.pop(_KEY)
    scheduler_stats.kv_connector_stats = None
    return KVCompressionStats(**values)


class KVCompressionStatLogger(AggregateStatLoggerBase):
    """``vllm:kv_compression_*`` in the front end, labelled like vLLM's own metrics. Stands before vLLM's loggers.

    Attributes:
        sequences: running on each engine after its last step, where the endpoint is on.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        labels = ["model_name", "engine"]
        model = vllm_config.model_config
        buckets = histogram_buckets(
            "request_tokens",
            max_model_len=model.max_model_len,
            overrides=vllm_config.observability_config.custom_histogram_buckets,
        )
        counters = {name: Counter(PREFIX + name, text, labels) for name, text in COUNTERS.items()}
        gauges = {name: Gauge(PREFIX + name, text, labels, multiprocess_mode="mostrecent") for name, text in GAUGES.items()}
        histograms = {name: Histogram(PREFIX + name, text, labels, buckets=buckets) for name, text in HISTOGRAMS.items()}
        self.sequences: dict[int, list[RunningSequence]] = {index: [] for index in engine_indexes}
        # Labelled here, so that every metric shows from the start, at 0.
        self._metrics = {
            index: {
                name: metric.labels(model.served_model_name, str(index))
                for name, metric in {**counters, **gauges, **histograms}.items()
            }
            for index in engine_indexes
        }

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        news = detach_stats(scheduler_stats)
        if news is None:
            return
        metrics = self._metrics[engine_idx]
        for name in COUNTERS:
            metrics[name].inc(getattr(news, name))
        for name in GAUGES:
            metrics[name].set(getattr(news, name))
        for name in HISTOGRAMS:
            for observed in getattr(news, name):
                metrics[name].observe(observed)
        self.sequences[engine_idx] = [RunningSequence(*row) for row in news.sequences]

    def log_engine_initialized(self) -> None:
        """The worker has logged what is active; nothing to add."""
