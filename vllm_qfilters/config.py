"""What the user wrote: one frozen record of the options of KV compression.

It travels as JSON in vLLM's ``additional_config["kv_compression"]``. It is never edited: an option that is not given
stays None, or holds its default where the default depends on nothing. What the engine and the workers read is the
:class:`vllm_qfilters.policy.Policy` that :func:`vllm_qfilters.policy.resolve` makes of it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_qfilters.methods.catalog import METHODS, QFILTERS

ADDITIONAL_CONFIG_KEY = "kv_compression"
REQUEST_BUDGET_KEY = "kv_budget"
REQUEST_EVICT_KEY = "kv_evict"

GRANULARITIES = ("head", "layer", "page")
PREFILLS = ("chunked", "full")
SCOPES = ("all", "decode")
PREFIX_EXACT, PREFIX_RESUME = PREFIXES = ("exact", "resume")
UNLIMITED = "unlimited"  # a max_budget
EVICT_ALWAYS, EVICT_PRESSURE = EVICTS = ("always", "pressure")
FP8_CACHE_DTYPES = ("fp8", "fp8_e4m3", "fp8_e5m2")  # by vLLM's names

_SMALLEST = {"window": 0, "sinks": 0, "interval": 1, "chunk": 1, "prefill_interval": 1, "rank": 0, "observed": 0}


@dataclasses.dataclass(frozen=True)
class KVCompressionConfig:
    """The options, each checked by itself; :func:`vllm_qfilters.policy.resolve` checks that they fit together.

    Attributes:
        method: which tokens stay; one of ``vllm_qfilters.methods.catalog.METHODS``.
        budget: most tokens a decoding sequence keeps resident per layer and head. An ``int`` counts tokens; a ``float``
            in (0, 1] is a fraction of the sequence's prompt. A request may set its own as ``kv_budget``.
        max_budget: the largest budget that a request may set as ``kv_budget``, given like ``budget``, or ``unlimited``.
            It also bounds ``budget``, where one of the two is a fraction. None, the default, becomes ``budget``:
            requests may lower it, and not raise it.
        allow_kv_budget_off: a request may set ``kv_budget`` to 0, which switches compression off for it.
        evict: ``always``: a sequence is cut when it reaches its budget; ``pressure``: only when the cache has no page
            left for a running or waiting request, those furthest beyond their budget first. Until then answers are
            plain vLLM's; what is evicted depends on load. A request may set ``kv_evict`` to ``always``.
        window: the last tokens of a sequence, never evicted. An ``int`` counts tokens, a ``float`` in [0, 1) is a
            fraction of the sequence's budget. Never fewer than layers with a sliding window attend to, where these are
            compressed too.
        sinks: the first tokens of a sequence, never evicted.
        interval: tokens evicted in one go by a sequence that reached its budget; a multiple of the block size. None,
            the default, becomes 128, or as many tokens as fill a page where that is more.
        granularity: ``head``: every KV head keeps its own best tokens (the paper); ``layer``: the heads of a layer keep
            the same tokens, by the mean of their standardised scores; ``page``: all layers and heads keep the same
            pages, by the mean score of their tokens, and nothing moves. Sinks then protect every page they reach into.
        prefill: ``chunked``: a prompt is cut while it is read, so that a sequence never holds more than ``budget +
            chunk``, and to the budget at its end; ``full``: the whole prompt is attended first and cut when decoding
            begins. None, the default, becomes ``chunked``.
        scope: ``all``: prompt and generated tokens share the budget; ``decode``: the prompt is kept, and the budget is
            for generated tokens alone.
        prompt_share: the part of a budget that the prompt's tokens hold to the end, in [0, 1). Once a prompt is read,
            sequences evict from it alone until no more of it is left than that; from then on they evict from what was
            generated alone. A shorter prompt stays whole, and of a longer one what scores highest. Not with
            ``evict: pressure``. None, the default, becomes 0: all tokens compete.
        distinct_share: the part of a budget, in [0, 1), that goes to tokens whose values are most unlike the others, as
            far as sinks, window and interval leave room: details that are stated once, long before anything asks for
            them, such as numbers. The rest of the text is remembered less well. None, the default, becomes 0.
        chunk: tokens a sequence holds beside its budget while its prompt is read, at most; a multiple of the block
            size. None, the default, becomes 2048.
        prefill_interval: prompt tokens between two cuts of ``chunked`` prefill, at most ``chunk``; a multiple of the
            block size. A step reads no more of a prompt once it is cut, and a cut makes no more room than that, so that
            the end of a prompt still finds the best of it. None, the default, becomes 512 or ``chunk``, whichever is
            less.
        filter: how ``qfilters`` scores a key. ``expected``: the attention it is expected to get, from mean and
            covariance of the queries before RoPE, turned to the coming positions, times the norm of its value;
            ``sampled``: as ``expected``, but tokens are drawn by lot in proportion to that score, anew at every cut;
            ``rotary``: its projection on the mean query, turned likewise; ``static``: its projection on one vector per
            KV head (the paper). None, the default, becomes ``expected``, and ``static`` in page granularity, whose
            scores are final when a page is full.
        rank: the rank of the covariance that ``expected`` goes by. 0 leaves the mean query alone; the covariance is
            exact from the head size on. None, the default, becomes 8.
        observed: last queries of a prompt whose attention is mixed into ``expected``; 0: none. None, the default,
            becomes 32.
        filters: a filters file, a Hugging Face repository of published filters, or ``auto``: the cached filters of this
            model, else calibrate now and cache them. ``@`` and a commit behind a repository pin it. None, the default,
            becomes ``auto``.
        prefix: ``exact``: a prompt that begins as an earlier one did starts behind what that one's tokens made of a
            prefix, and its answer is a cold reading's; ``resume``: one that begins with an earlier prompt and its whole
            answer goes on from what that request held at its end, as a session that never left the engine. It reads
            what is new alone; its answer depends on what the cache still holds. It needs ``evict: always``, ``scope:
            all``, a budget in tokens, and vLLM's prefix cache.
        endpoint: a server answers ``GET /kv_compression`` with the sequences it is running. Their request ids are
            visible to whoever reaches it: vLLM asks for its API key below ``/v1`` alone.

    Raises:
        ValueError: a value is out of its range; the message names the value and the range.
    """

    method: str = "qfilters"
    budget: int | float = 2048
    max_budget: int | float | str | None = None
    allow_kv_budget_off: bool = False
    evict: str = EVICT_ALWAYS
    window: int | float = 0.25
    sinks: int = 4
    interval: int | None = None
    granularity: str = "layer"
    prefill: str | None = None
    scope: str = "all"
    prompt_share: float | None = None
    distinct_share: float | None = None
    chunk: int | None = None
    prefill_interval: int | None = None
    filter: str | None = None
    rank: int | None = None
    observed: int | None = None
    filters: str | None = None
    prefix: str = PREFIX_EXACT
    endpoint: bool = False

    def __post_init__(self) -> None:
        check_choice("method", self.method, tuple(METHODS))
        if self.filter is not None:
            check_choice("filter", self.filter, tuple(QFILTERS))
        check_choice("granularity", self.granularity, GRANULARITIES)
        if self.prefill is not None:
            check_choice("prefill", self.prefill, PREFILLS)
        check_choice("scope", self.scope, SCOPES)
        check_choice("evict", self.evict, EVICTS)
        check_choice("prefix", self.prefix, PREFIXES)
        check_budget("budget", self.budget)
        if self.max_budget not in (None, UNLIMITED):
            check_budget("max_budget", self.max_budget)
        if not is_int(self.window) and not (isinstance(self.window, float) and 0 <= self.window < 1):
            raise ValueError(
                f"window={self.window!r}: give tokens (an integer >= 0) or a fraction of the budget (0 <= window < 1)"
            )
        self._check_share("prompt_share")
        self._check_share("distinct_share")
        share, window = self.prompt_share, self.window
        if share is not None and isinstance(window, float) and share + window >= 1:
            raise ValueError(
                f"prompt_share={share!r} and window={window!r} leave nothing to evict: lower one, so that both "
                "together are less than 1"
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, least in _SMALLEST.items():
            value = getattr(self, name)
            if (isinstance(value, float) and name == "window") or (value is None and defaults[name] is None):
                continue
            if not is_int(value) or value < least:
                unit = "" if name == "rank" else " (tokens)"
                raise ValueError(f"{name}={value!r}: give an integer >= {least}{unit}")
        if self.filters is not None and (not isinstance(self.filters, str) or not self.filters):
            raise ValueError(f"filters={self.filters!r}: give 'auto', a file, or a repository of published filters")
        for name in ("endpoint", "allow_kv_budget_off"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: give true or false")

    def _check_share(self, name: str) -> None:
        share = getattr(self, name)
        if share is None:
            return
        if isinstance(share, bool) or (share != 0 and not (isinstance(share, float) and 0 <= share < 1)):
            raise ValueError(f"{name}={share!r}: give a fraction of the budget (0 <= {name} < 1)")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "KVCompressionConfig":
        """Reads ``{"budget": 1024, ...}``; unknown keys are refused by name."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown KV compression option {', '.join(unknown)}; the options are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> "KVCompressionConfig | None":
        """What a vLLM engine was started with, or None where KV compression is off."""
        additional = vllm_config.additional_config
        values = additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, dict) else None
        return None if values is None else cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """All options, as :meth:`from_dict` reads them."""
        return dataclasses.asdict(self)


def is_int(value: Any) -> bool:
    """Whether a value is an integer and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_budget(name: str, value: Any) -> None:
    """Refuses what is neither a number of tokens nor a fraction of the prompt.

    Args:
        name: what the message calls it.

    Raises:
        ValueError: names value and range.
    """
    if is_int(value) and value > 0:
        return
    if isinstance(value, float) and 0 < value <= 1:
        return
    other = {
        REQUEST_BUDGET_KEY: " or 0 to switch compression off where the server lets you",
        "max_budget": f" or {UNLIMITED!r}",
    }.get(name, "")
    raise ValueError(
        f"{name}={value!r}: give tokens (an integer > 0), a fraction of the prompt (0 < {name} <= 1.0){other}"
    )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError for what is none of ``choices``, which the message lists."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
