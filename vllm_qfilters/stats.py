"""What the scheduler counts, and how it travels to the front end with vLLM's own statistics."""

import dataclasses
from typing import NamedTuple

from vllm.v1.metrics.stats import SchedulerStats

COUNTERS = {
    "compactions": "Evictions carried out, one per sequence and time.",
    "pressure_compactions": "Those of them for want of pages, with evict 'pressure'.",
    "evicted_tokens": "Tokens evicted from the KV cache.",
    "freed_pages": "KV cache pages that evictions gave up and nobody else held.",
    "prefix_hits": "Requests that started behind a compressed prefix.",
    "prefix_hit_tokens": "Tokens of those prefixes, which were not read again.",
    "resumed_requests": "Those of them that went on from what a request held at its end, with prefix 'resume'.",
    "compaction_seconds": "Seconds one rank spent choosing and moving tokens; nothing is moved with page granularity.",
}
_KEY = "kv_compression"


class RunningSequence(NamedTuple):
    """A sequence the scheduler is running.

    Attributes:
        request_id: vLLM's, which begins with the id of the response.
        prompt_tokens: the length of its prompt.
        position: the position of its next token.
        resident_tokens: the tokens it holds.
        budget: the most tokens it holds while decoding; None where compression is off for it.
        evictions: how many it went through.
    """

    request_id: str
    prompt_tokens: int
    position: int
    resident_tokens: int
    budget: int | None
    evictions: int


@dataclasses.dataclass
class KVCompressionStats:
    """Totals since the engine started, and gauges of now. A message to the front end carries increases since the last
    message in the place of totals.

    Attributes:
        compactions: how many evictions were carried out, one per sequence and time.
        pressure_compactions: those of them for want of pages.
        evicted_tokens: tokens evicted from sequences.
        freed_pages: pages that evictions gave up and nobody else held.
        prefix_hits: requests that started behind a compressed prefix.
        prefix_hit_tokens: tokens of those prefixes.
        resumed_requests: those of the requests that went on from what an earlier one held at its end.
        compaction_seconds: the time one rank spent compacting.
        resident_tokens: tokens that running sequences hold now.
        compressed_requests: running sequences that have evicted tokens.
        saved_pages: pages that running sequences would hold uncompressed, less those they hold.
        request_resident_tokens: the most tokens held at once by each sequence that ended since the last message.
        sequences: the running sequences, where the endpoint is on; None: those of the last message are recent enough.
    """

    compactions: int = 0
    pressure_compactions: int = 0
    evicted_tokens: int = 0
    freed_pages: int = 0
    prefix_hits: int = 0
    prefix_hit_tokens: int = 0
    resumed_requests: int = 0
    compaction_seconds: float = 0.0
    resident_tokens: int = 0
    compressed_requests: int = 0
    saved_pages: int = 0
    request_resident_tokens: list[int] = dataclasses.field(default_factory=list)
    sequences: list[RunningSequence] | None = None

    def __str__(self) -> str:
        return (
            f"KV compression: {self.compactions} compactions in {self.compaction_seconds:.3g} s, {self.evicted_tokens} "
            f"tokens evicted, {self.freed_pages} pages freed; now {self.resident_tokens} tokens resident, "
            f"{self.compressed_requests} running requests compressed, {self.saved_pages} pages saved"
        )

    def take_news(self, sent: "KVCompressionStats") -> "KVCompressionStats":
        """The message after ``sent``, the totals as of the last one, which becomes what these are now."""
        news = dataclasses.replace(self, **{name: getattr(self, name) - getattr(sent, name) for name in COUNTERS})
        for name in COUNTERS:
            setattr(sent, name, getattr(self, name))
        self.request_resident_tokens, self.sequences = [], None
        return news


def attach_stats(scheduler_stats: SchedulerStats, news: KVCompressionStats) -> None:
    """Lets ``news`` travel with ``scheduler_stats``; :func:`detach_stats` takes them off on the other side.

    A SchedulerStats subclass would lose its fields in transit. ``kv_connector_stats`` is an open dictionary, unused
    here: KV connectors are refused at start.
    """
    assert scheduler_stats.kv_connector_stats is None
    scheduler_stats.kv_connector_stats = {_KEY: vars(news)}


def detach_stats(scheduler_stats: SchedulerStats | None) -> KVCompressionStats | None:
    """The inverse of :func:`attach_stats`; None where KV compression is off."""
    if (
        scheduler_stats is None
        or not scheduler_stats.kv_connector_stats
        or _KEY not in scheduler_stats.kv_connector_stats
    ):
        return None
    values = scheduler_stats.kv_connector_stats.pop(_KEY)
    scheduler_stats.kv_connector_stats = None
    return KVCompressionStats(**values)
