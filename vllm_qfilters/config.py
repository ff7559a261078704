"""The configuration of KV compression: one frozen dataclass, one way to read it.

Knows nobody: the command line, the engine core and the workers all import this module. The configuration travels as
JSON in vLLM's ``additional_config["kv_compression"]`` and is read back by :meth:`KVCompressionConfig.from_vllm_config`
alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vllm_qfilters.budget import RequestLimits, cdiv, min_budget

ADDITIONAL_CONFIG_KEY = "kv_compression"
REQUEST_BUDGET_KEY = "kv_budget"

METHODS = {
    "qfilters": "what the model's queries, known from calibration, will attend to (Q-Filters, arXiv 2503.02812)",
    "streaming": "the first `sinks` tokens and the most recent ones (StreamingLLM, arXiv 2309.17453)",
    "knorm": "keys of small norm first (arXiv 2406.11430)",
    "keydiff": "keys unlike the mean of the sequence's keys first (arXiv 2504.15364)",
    "random": "random tokens, the floor every method must beat",
}
FILTERS = ("expected", "rotary", "static")
GRANULARITIES = ("head", "layer", "page")
PREFILLS = ("chunked", "full")
SCOPES = ("all", "decode")
FP8_CACHE_DTYPES = ("fp8", "fp8_e4m3", "fp8_e5m2")  # by vLLM's names
PREFILL_INTERVAL = 512  # tokens, unless chunk is less: GPUs are busy with as many


@dataclasses.dataclass(frozen=True)
class KVCompressionConfig:
    """How the KV cache of every sequence is kept within its budget.

    Attributes:
        method: which tokens stay; one of ``METHODS``.
        budget: most tokens a decoding sequence keeps resident per layer and head. An ``int`` counts tokens; a ``float``
            in (0, 1] is a fraction of the sequence's prompt. A request may set its own as ``kv_budget``.
        window: the last tokens of a sequence, never evicted. An ``int`` counts tokens, a ``float`` in [0, 1) is a
            fraction of the sequence's budget. Never fewer than layers with a sliding window attend to.
        sinks: the first tokens of a sequence, never evicted.
        interval: tokens evicted in one go by a sequence that reached its budget; a multiple of the block size.
        granularity: ``head``: every KV head keeps its own best tokens (the paper); ``layer``: the heads of a layer keep
            the same tokens, by the mean of their standardised scores; ``page``: all layers and heads keep the same
            pages, by the mean score of their tokens, and nothing moves. Sinks then protect every page they reach into.
        prefill: ``chunked``: a prompt is cut while it is read, so that a sequence never holds more than ``budget +
            chunk``, and to the budget at its end; ``full``: the whole prompt is attended first and cut when decoding
            begins.
        scope: ``all``: prompt and generated tokens share the budget; ``decode``: the prompt is kept, and the budget is
            for generated tokens alone.
        chunk: tokens a sequence holds beside its budget while its prompt is read, at most; a multiple of the block
            size.
        prefill_interval: prompt tokens between two cuts of ``chunked`` prefill, at most ``chunk``; a multiple of the
            block size. A step reads no more of a prompt once it is cut, and a cut makes no more room than that, so that
            the end of a prompt still finds the best of it. None, the default, becomes 512 or ``chunk``, whichever is
            less.
        filter: how ``qfilters`` scores a key. ``expected``: the attention it is expected to get, from mean and
            covariance of the queries before RoPE, turned to the coming positions, times the norm of its value;
            ``rotary``: its projection on the mean query, turned likewise; ``static``: its projection on one vector per
                KV head (the paper). None, the default,
            becomes ``expected``, and ``static`` in page granularity, whose scores are final when a page is full.
        rank: of the covariance ``expected`` goes by; 0: the mean query alone, from the head size on: exact.
        observed: last queries of a prompt whose attention is mixed into ``expected``; 0: none.
        filters: a filters file, a Hugging Face repository of published filters, or ``auto``: the cached filters of this
            model, else published ones, else calibrate now and cache them. Used by ``qfilters`` alone.
        endpoint: a server answers ``GET /kv_compression`` with the sequences it is running. Their request ids are
            visible to whoever reaches it: vLLM asks for its API key below ``/v1`` alone.
        sliding_window: tokens that the model's layers with a sliding window attend to, the query's own among them; 0 if
            it has none, or none shorter than its longest context. No option: :meth:`from_vllm_config` knows the model.

    Raises:
        ValueError: a value is out of its range; the message names the value and the range.
    """

    method: str = "qfilters"
    budget: int | float = 2048
    window: int | float = 0.25
    sinks: int = 4
    interval: int = 128
    granularity: str = "layer"
    prefill: str = "chunked"
    scope: str = "all"
    chunk: int = 2048
    prefill_interval: int | None = None
    filter: str | None = None
    rank: int = 8
    observed: int = 32
    filters: str = "auto"
    endpoint: bool = False
    sliding_window: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.filter is None:
            object.__setattr__(self, "filter", "static" if self.evicts_whole_pages else "expected")
        _check_choice("method", self.method, tuple(METHODS))
        _check_choice("filter", self.filter, FILTERS)
        _check_choice("granularity", self.granularity, GRANULARITIES)
        _check_choice("prefill", self.prefill, PREFILLS)
        _check_choice("scope", self.scope, SCOPES)
        _check_budget("budget", self.budget)
        if not _is_int(self.window) and not (isinstance(self.window, float) and 0 <= self.window < 1):
            raise ValueError(
                f"window={self.window!r}: give tokens (an integer >= 0) or a fraction of the budget (0 <= window < 1)"
            )
        ranges = {"window": 0, "sinks": 0, "interval": 1, "chunk": 1, "prefill_interval": 1, "rank": 0, "observed": 0}
        for name, least in ranges.items():
            value = getattr(self, name)
            if (isinstance(value, float) and name == "window") or (value is None and name == "prefill_interval"):
                continue
            if not _is_int(value) or value < least:
                unit = "" if name == "rank" else " (tokens)"
                raise ValueError(f"{name}={value!r}: give an integer >= {least}{unit}")
        if self.prefill_interval is None:
            object.__setattr__(self, "prefill_interval", min(PREFILL_INTERVAL, self.chunk))
        if self.prefill_interval > self.chunk:
            raise ValueError(
                f"prefill_interval={self.prefill_interval}: give at most chunk={self.chunk}, or raise chunk"
            )
        if not isinstance(self.filters, str) or not self.filters:
            raise ValueError(f"filters={self.filters!r}: give 'auto', a file, or a repository of published filters")
        if not isinstance(self.endpoint, bool):
            raise ValueError(f"endpoint={self.endpoint!r}: give true or false")
        if self.evicts_whole_pages and self.method == "qfilters" and self.filter != "static":
            raise ValueError(
                f"filter={self.filter!r} scores a token by where its sequence stands, but the score of a page is final when the "
                "page is full: with granularity 'page' use filter 'static', or choose granularity 'layer' or 'head'"
            )
        if self.evicts_whole_pages and self.method == "keydiff":
            raise ValueError(
                "method='keydiff' scores a token by all keys of its sequence: choose granularity 'layer' or 'head'"
            )
        if _is_int(self.budget):
            self._check_budget_holds("budget", self.budget)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "KVCompressionConfig":
        """Reads ``{"budget": 1024, ...}``; unknown keys are refused by name."""
        known = [field.name for field in dataclasses.fields(cls) if field.init]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown KV compression option {', '.join(unknown)}; the options are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> "KVCompressionConfig | None":
        """The configuration a vLLM engine was started with, or None where KV compression is off."""
        additional = vllm_config.additional_config
        values = additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, dict) else None
        if values is None:
            return None
        config = cls.from_dict(values)
        object.__setattr__(config, "sliding_window", _sliding_window(vllm_config.model_config))
        return config

    def to_dict(self) -> dict[str, Any]:
        """The options, as :meth:`from_dict` reads them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    @property
    def min_window(self) -> int:
        """Last tokens that layers with a sliding window attend to from the next position on."""
        return max(0, self.sliding_window - 1)

    @property
    def evicts_whole_pages(self) -> bool:
        return self.granularity == "page"

    @property
    def heads_keep_the_same(self) -> bool:
        """The heads of a layer keep the same tokens."""
        return self.granularity == "layer"

    @property
    def needs_scores(self) -> bool:
        """Whether keys are scored as they are written."""
        return self.method != "streaming"

    def min_budget(self, block_size: int = 1) -> int:
        """Fewest tokens a budget may have: after an eviction sinks and window must still fit.

        Args:
            block_size: tokens per page. Matters to page granularity: sinks and window each protect a page they end in.
        """
        ends = 2 * (block_size - 1) if self.evicts_whole_pages else 0
        windows = (self.window, self.min_window)
        return max(min_budget(window=window, sinks=self.sinks + ends, interval=self.interval) for window in windows)

    @property
    def expects_attention(self) -> bool:
        """Scores go by the attention expected of each query head."""
        return self.method == "qfilters" and self.filter == "expected"

    @property
    def observed_queries(self) -> int:
        """Last queries of a prompt to keep; 0 where the scores do not go by them."""
        return self.observed if self.expects_attention else 0

    @property
    def num_planes(self) -> int:
        """float32 numbers kept beside every token, per KV head."""
        return 2 if self.observed_queries else 1

    @property
    def evicts_prompts_in_chunks(self) -> bool:
        return self.prefill == "chunked" and self.scope == "all"

    def check_block_size(self, block_size: int) -> None:
        """Raises ValueError unless every eviction can free whole pages of ``block_size`` tokens."""
        for name in ("interval", "chunk", "prefill_interval"):
            value = getattr(self, name)
            if value % block_size:
                raise ValueError(
                    f"{name}={value} is not a multiple of the block size {block_size}: set {name} to "
                    f"{max(1, round(value / block_size)) * block_size}, or change --block-size"
                )
        if _is_int(self.budget):
            self._check_budget_holds("budget", self.budget, block_size)

    def request_limits(
        self, extra_args: Mapping[str, Any] | None, prompt_tokens: int, block_size: int = 1
    ) -> RequestLimits | None:
        """The limits of one request, or None if compression is off for it.

        Args:
            extra_args: the request's ``SamplingParams.extra_args`` (``vllm_xargs`` over HTTP); ``kv_budget`` overrides
                ``budget``, and 0 switches compression off.
            prompt_tokens: length of the prompt, for a budget that is a fraction of it.
            block_size: tokens per page, see :meth:`min_budget`.

        Raises:
            ValueError: ``kv_budget`` is no budget this configuration allows.
        """
        budget = (extra_args or {}).get(REQUEST_BUDGET_KEY, self.budget)
        if budget == 0 and not isinstance(budget, bool):
            return None
        _check_budget(REQUEST_BUDGET_KEY, budget)
        if _is_int(budget):
            self._check_budget_holds(REQUEST_BUDGET_KEY, budget, block_size)
        else:
            budget = max(math.ceil(budget * prompt_tokens), self.min_budget(block_size))
        window = math.floor(self.window * budget) if isinstance(self.window, float) else self.window
        window = max(window, self.min_window)
        sinks = self.sinks
        if self.scope == "decode":
            # The prompt stays: it counts as sinks, and comes on top of the budget.
            sinks = max(sinks, prompt_tokens)
            budget += prompt_tokens
        if self.evicts_whole_pages:
            sinks = cdiv(sinks, block_size) * block_size
        return RequestLimits(
            budget=budget,
            window=window,
            sinks=sinks,
            interval=self.interval,
            chunk=self.chunk if self.evicts_prompts_in_chunks else None,
            prefill_interval=self.prefill_interval if self.evicts_prompts_in_chunks else None,
            private_window=bool(self.observed_queries),
            recent_only=self.method == "streaming",
            keeps_distinct=self.method == "qfilters" and not self.evicts_whole_pages,
        )

    def max_resident_tokens(self, max_model_len: int, block_size: int = 1) -> int:
        """Most tokens one sequence can hold under the configured budget, its prefill included."""
        if not self.evicts_prompts_in_chunks:
            return max_model_len
        limits = self.request_limits(None, max_model_len, block_size)
        return min(max_model_len, limits.max_resident_tokens)

    def _check_budget_holds(self, name: str, budget: int, block_size: int = 1) -> None:
        least = self.min_budget(block_size)
        if budget < least:
            pages = f", in whole pages of {block_size}" if self.evicts_whole_pages else ""
            window = f"window {self.window}"
            if self.min_window:
                window += f" (at least {self.min_window}, which the model's sliding windows reach back)"
            raise ValueError(
                f"{name}={budget}: at least {least} tokens are needed for {window} + sinks {self.sinks} + "
                f"interval {self.interval}{pages}; raise {name} or lower those"
            )


def _sliding_window(model_config: Any) -> int:
    """That of a model of which some layers have one, and a shorter one than its longest context; else 0."""
    window, layer_types = model_config.get_sliding_window(), getattr(model_config.hf_text_config, "layer_types", None)
    if (
        window is None
        or window >= model_config.max_model_len
        or (layer_types and "sliding_attention" not in layer_types)
    ):
        return 0
    return window


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")


def _check_budget(name: str, value: Any) -> None:
    if _is_int(value) and value > 0:
        return
    if isinstance(value, float) and 0 < value <= 1:
        return
    off = " or 0 to switch compression off" if name == REQUEST_BUDGET_KEY else ""
    raise ValueError(
        f"{name}={value!r}: give tokens (an integer > 0), a fraction of the prompt (0 < {name} <= 1.0){off}"
    )
