"""The catalogue of methods: one entry per method, its file beside this one. It imports the standard library alone.

What a method is able to do stands here as facts, so that the configuration, the scheduler and the workers ask for those
and never for a name. To add a method, write its file (see :mod:`vllm_qfilters.methods.base`) and one entry here.
"""

import dataclasses
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method, or one of the ways ``qfilters`` scores.

    Attributes:
        summary: one line for ``--help``, with the paper.
        implementation: ``module:class`` below ``vllm_qfilters.methods``, a subclass of :class:`.base.Method`.
        options: fields of the configuration that only some methods read, those that this one reads.
        stats: how many float32 token stats stand beside each token and KV head; may depend on ``observed``.
        needs_filters: filters are found or calibrated before serving.
        needs_query_statistics: the filters must hold the statistics of queries before RoPE, which published ones lack.
        scores_are_final: a token's score is known when it is written and stays, so that whole pages can be scored.
        recent_only: nothing is scored; the most recent tokens stay beside the sinks.
        expects_attention: scores go by the attention expected of each query head.
        observed_queries: last queries of a prompt that are kept until its first cut behind the end; from ``observed``.
        follows_decoding: the queries of generated tokens are kept likewise, for every cut.
        reads_latents: also works on caches of latents, whose keys have no values beside them (MLA).
    """

    summary: str
    implementation: str
    options: frozenset[str] = frozenset()
    stats: Callable[[int], int] = lambda observed: 1
    needs_filters: bool = False
    needs_query_statistics: bool = False
    scores_are_final: bool = False
    recent_only: bool = False
    expects_attention: bool = False
    observed_queries: Callable[[int], int] = lambda observed: 0
    follows_decoding: bool = False
    reads_latents: bool = False

    @property
    def keeps_distinct(self) -> bool:
        """Whether a prompt that is read holds, beyond its budget, the tokens whose values are most unlike the others.
        Methods that know such tokens can set a part of the budget aside for them, too."""
        return "distinct_share" in self.options


def _no_stats(observed: int) -> int:
    return 0


_QFILTERS = "what the model's queries, known from calibration, will attend to (Q-Filters, arXiv 2503.02812)"

_EXPECTED = Entry(
    _QFILTERS,
    "qfilters.expected:ExpectedAttention",
    options=frozenset({"filter", "filters", "rank", "observed", "distinct_share"}),
    stats=lambda observed: 1 if observed else 0,
    needs_filters=True,
    needs_query_statistics=True,
    expects_attention=True,
    observed_queries=lambda observed: observed,
    reads_latents=True,
)

QFILTERS: Mapping[str, Entry] = {  # by the option `filter`
    "expected": _EXPECTED,
    "sampled": dataclasses.replace(
        _EXPECTED,
        summary="tokens drawn in proportion to what `expected` scores, anew at every cut",
        implementation="qfilters.sampled:SampledAttention",
    ),
    "rotary": Entry(
        _QFILTERS,
        "qfilters.rotary:RotaryFilter",
        options=frozenset({"filter", "filters", "distinct_share"}),
        stats=_no_stats,
        needs_filters=True,
        needs_query_statistics=True,
        reads_latents=True,
    ),
    "static": Entry(
        _QFILTERS,
        "qfilters.static:StaticFilter",
        options=frozenset({"filter", "filters", "distinct_share"}),
        needs_filters=True,
        scores_are_final=True,
        reads_latents=True,
    ),
}

METHODS: Mapping[str, Entry] = {
    "qfilters": QFILTERS["expected"],
    "streaming": Entry(
        "the first `sinks` tokens and the most recent ones (StreamingLLM, arXiv 2309.17453)",
        "streaming:Streaming",
        stats=_no_stats,
        scores_are_final=True,
        recent_only=True,
        reads_latents=True,
    ),
    "knorm": Entry("keys of small norm first (arXiv 2406.11430)", "knorm:KeyNorm", scores_are_final=True),
    "keydiff": Entry(
        "keys unlike the mean of the sequence's keys first (arXiv 2504.15364)",
        "keydiff:KeyDiff",
        stats=_no_stats,
        reads_latents=True,
    ),
    "random": Entry(
        "tokens drawn at random, anew at every cut (arXiv 2609.03430)",
        "random:Random",
        stats=_no_stats,
        reads_latents=True,
    ),
    "random_once": Entry(
        "tokens drawn at random, each once, when it is written: the floor every method must beat",
        "random_once:RandomOnce",
        scores_are_final=True,
        reads_latents=True,
    ),
    "snapkv": Entry(
        "what the last 32 queries attend to (SnapKV, arXiv 2404.14469)",
        "snapkv:SnapKV",
        observed_queries=lambda observed: 32,
        follows_decoding=True,
        reads_latents=True,
    ),
    "tova": Entry(
        "what the last query attends to (TOVA, arXiv 2401.06104)",
        "tova:Tova",
        observed_queries=lambda observed: 1,
        follows_decoding=True,
        reads_latents=True,
    ),
    "lagkv": Entry(
        "tokens that vary most, measured by the ones that follow (LagKV, arXiv 2504.04704)",
        "lagkv:LagKV",
        stats=_no_stats,
    ),
    "cur": Entry(
        "large keys times large values, through fresh random projections (CUR, arXiv 2606.03928)",
        "cur:Cur",
        stats=_no_stats,
    ),
}

OPTIONS_OF_SOME = frozenset().union(*(entry.options for entry in (*METHODS.values(), *QFILTERS.values())))


def entry(method: str, filter: str | None = None) -> Entry:
    """The entry of a method; of ``qfilters`` that of its ``filter``, the default if None."""
    if method == "qfilters" and filter is not None:
        return QFILTERS[filter]
    return METHODS[method]
