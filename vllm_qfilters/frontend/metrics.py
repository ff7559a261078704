"""Counters of KV compression: kept by the scheduler, shown in its log line and under ``/metrics``.

vLLM sends its ``SchedulerStats`` from the engine process to the front end, where :class:`KVCompressionStatLogger`, put
there by compat.py, takes ours off before vLLM's own loggers see them. What is counted travels as the increase since the
last message: a server of several front ends sends each message to one of them, and Prometheus adds up what they count.
"""

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.buckets import histogram_buckets
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from vllm_qfilters.stats import COUNTERS, RunningSequence, detach_stats

PREFIX = "vllm:kv_compression_"
GAUGES = {
    "resident_tokens": "Tokens that running sequences hold.",
    "compressed_requests": "Running sequences that have evicted tokens.",
    "saved_pages": "KV cache pages that running sequences would hold without compression, less those they hold.",
}
HISTOGRAMS = {
    "request_resident_tokens": "Most tokens a sequence held at once, of sequences that have ended.",
}


class KVCompressionStatLogger(AggregateStatLoggerBase):
    """``vllm:kv_compression_*`` in the front end, labelled like vLLM's own metrics. Stands before vLLM's loggers.

    Attributes:
        sequences: running on each engine when it recorded them last, where the endpoint is on.
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
        gauges = {
            name: Gauge(PREFIX + name, text, labels, multiprocess_mode="mostrecent") for name, text in GAUGES.items()
        }
        histograms = {
            name: Histogram(PREFIX + name, text, labels, buckets=buckets) for name, text in HISTOGRAMS.items()
        }
        self.sequences: dict[int, list[RunningSequence]] = {index: [] for index in engine_indexes}
        # By engine and name. Labelled here, so that every metric shows from the start, at 0.
        self._counters: dict[int, dict[str, Counter]] = {}
        self._gauges: dict[int, dict[str, Gauge]] = {}
        self._histograms: dict[int, dict[str, Histogram]] = {}
        for index in engine_indexes:
            values = model.served_model_name, str(index)
            self._counters[index] = {name: metric.labels(*values) for name, metric in counters.items()}
            self._gauges[index] = {name: metric.labels(*values) for name, metric in gauges.items()}
            self._histograms[index] = {name: metric.labels(*values) for name, metric in histograms.items()}

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
        for name, counter in self._counters[engine_idx].items():
            counter.inc(getattr(news, name))
        for name, gauge in self._gauges[engine_idx].items():
            gauge.set(getattr(news, name))
        for name, histogram in self._histograms[engine_idx].items():
            for observed in getattr(news, name):
                histogram.observe(observed)
        if news.sequences is not None:
            self.sequences[engine_idx] = [RunningSequence(*row) for row in news.sequences]

    def log_engine_initialized(self) -> None:
        """The worker has logged what is active; nothing to add."""
