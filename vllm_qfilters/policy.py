"""What was resolved: the options of KV compression with nothing left open, and what follows for a request.

:func:`resolve` makes a :class:`Policy` of what the user wrote, of what the method is able to do, of the model, and of
the block size. The front end, the scheduler and the workers make the same one, each in its process.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

from vllm_qfilters.budget import RequestLimits, cdiv, min_budget
from vllm_qfilters.config import (
    EVICT_ALWAYS,
    EVICT_PRESSURE,
    EVICTS,
    PREFIX_RESUME,
    REQUEST_BUDGET_KEY,
    REQUEST_EVICT_KEY,
    UNLIMITED,
    KVCompressionConfig,
    check_budget,
    check_choice,
    is_int,
)
from vllm_qfilters.groups import NO_GROUPS, GroupsBeside, LayerKinds
from vllm_qfilters.methods import catalog
from vllm_qfilters.methods.catalog import Entry

# Defaults that are rounded up to whole pages, in tokens.
INTERVAL = 128
CHUNK = 2048
PREFILL_INTERVAL = 512  # unless `chunk` is less: GPUs are busy with as many

PREFILL = "chunked"
RANK = 8
OBSERVED = 32
FILTERS = "auto"
# Neighbours whose values count with a token's own where values unlike the others are looked for. Until a prompt ends,
# words and numbers of several tokens are to stand out, since its end looks at them and at what is around them. A part
# of the budget that is set aside is for whole statements.
DISTINCT_POOL = 7
DISTINCT_SHARE_POOL = 15


@dataclasses.dataclass(frozen=True)
class Policy:
    """How the KV cache of every sequence is kept within its budget.

    Attributes:
        written: what the user wrote. Fields of the same names are described there.
        entry: what the catalogue knows of the method and, for ``qfilters``, of its filter.
        filter: None for methods that have none.
        rank: 0 for methods that have none.
        observed: 0 for methods that do not let the user choose.
        filters: None for methods without filters.
        sliding_window: tokens that the model's layers with a sliding window attend to, the query's own among them,
            where these layers are compressed with the others; 0 if they are not, or there are none, or none shorter
            than the model's longest context.
        beside: the KV cache groups of layers that are not compressed.
    """

    written: KVCompressionConfig
    entry: Entry
    method: str
    budget: int | float
    max_budget: int | float | str
    allow_kv_budget_off: bool
    evict: str
    window: int | float
    sinks: int
    interval: int
    granularity: str
    prefill: str
    scope: str
    prompt_share: float
    distinct_share: float
    chunk: int
    prefill_interval: int
    filter: str | None
    rank: int
    observed: int
    filters: str | None
    prefix: str
    endpoint: bool
    sliding_window: int = 0
    beside: GroupsBeside = NO_GROUPS

    @classmethod
    def from_vllm_config(cls, vllm_config: Any) -> "Policy | None":
        """The policy of a vLLM engine, or None where KV compression is off. Until the model is loaded its block size
        may change: see :meth:`for_block_size`."""
        config = KVCompressionConfig.from_vllm_config(vllm_config)
        if config is None:
            return None
        is_one_group = (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
            or vllm_config.parallel_config.pipeline_parallel_size > 1  # whose stages have different layers
        )
        return resolve(config, vllm_config.model_config, vllm_config.cache_config.block_size, is_one_group)

    def for_block_size(self, block_size: int) -> Self:
        """This policy on pages of ``block_size`` tokens, to which it rounds what the user did not give. Whether the
        rest fits them is for :meth:`check_block_size` to say."""
        interval, chunk, prefill_interval = _in_whole_pages(self.written, block_size)
        return dataclasses.replace(self, interval=interval, chunk=chunk, prefill_interval=prefill_interval)

    def to_dict(self) -> dict[str, Any]:
        """The options that this policy reads, with their values."""
        names = [field.name for field in dataclasses.fields(KVCompressionConfig)]
        unread = _unread_options(self.written, self.entry, self.filter)
        return {name: getattr(self, name) for name in names if name not in unread}

    @property
    def evicts_whole_pages(self) -> bool:
        return self.granularity == "page"

    @property
    def heads_keep_the_same(self) -> bool:
        """Whether the heads of a layer keep the same tokens."""
        return self.granularity == "layer"

    @property
    def distinct_pool(self) -> int:
        """Neighbours whose values count with a token's own where values unlike the others are looked for, odd."""
        return DISTINCT_SHARE_POOL if self.distinct_share else DISTINCT_POOL

    @property
    def resumes(self) -> bool:
        """Whether a request goes on from what an earlier one held at its end."""
        return self.prefix == PREFIX_RESUME

    @property
    def evicts_prompts_in_chunks(self) -> bool:
        """Whether prompts are cut while they are read."""
        return self.prefill == "chunked" and self.scope == "all"

    @property
    def needs_scores(self) -> bool:
        """Whether tokens are scored at all."""
        return not self.entry.recent_only

    @property
    def scores_by_queries(self) -> bool:
        """Whether scores go by queries, expected or observed."""
        return self.entry.needs_filters or self.observed_queries > 0

    @property
    def expects_attention(self) -> bool:
        """Whether scores go by the attention expected of each query head."""
        return self.entry.expects_attention

    @property
    def observed_queries(self) -> int:
        """Last queries of a prompt to keep; 0 where the scores do not go by them."""
        return self.entry.observed_queries(self.observed)

    @property
    def num_planes(self) -> int:
        """Token stats: float32 numbers kept beside every token, per KV head."""
        return self.entry.stats(self.observed)

    @property
    def min_window(self) -> int:
        """Last tokens that layers with a sliding window attend to from the next position on."""
        return max(0, self.sliding_window - 1)

    def min_budget(self, block_size: int = 1) -> int:
        """Fewest tokens a budget may have: after an eviction sinks and window must still fit.

        Args:
            block_size: tokens per page. Matters to page granularity: sinks and window each protect a page they end in;
                and to ``prompt_share``, which whole pages are evicted down to.
        """
        ends = 2 * (block_size - 1) if self.evicts_whole_pages else 0
        windows = (self.window, self.min_window, self._min_last_page(block_size))
        sinks = self.sinks + ends
        return max(min_budget(window, sinks, self.interval, self.prompt_share, block_size) for window in windows)

    def _min_last_page(self, block_size: int) -> int:
        """Most tokens of a last page that is not full, where they stay."""
        return block_size - 1 if self._leaves_last_page else 0

    @property
    def _leaves_last_page(self) -> bool:
        """Whether the tokens of a last page that is not full stay, as others go on from the end of a request. In page
        granularity only full pages go."""
        return self.resumes and not self.evicts_whole_pages

    def check_block_size(self, block_size: int) -> None:
        """Raises ValueError unless every eviction can free whole pages of ``block_size`` tokens."""
        for name in ("interval", "chunk", "prefill_interval"):
            value = getattr(self, name)
            if value % block_size:
                raise ValueError(
                    f"{name}={value} is not a multiple of the block size {block_size}: set {name} to "
                    f"{max(1, round(value / block_size)) * block_size}, or change --block-size"
                )
        self._check_budgets_hold(block_size)

    def request_limits(
        self, extra_args: Mapping[str, Any] | None, prompt_tokens: int, block_size: int = 1
    ) -> RequestLimits | None:
        """The limits of one request, or None if compression is off for it.

        Args:
            extra_args: the request's ``SamplingParams.extra_args`` (``vllm_xargs`` over HTTP); ``kv_budget`` overrides
                ``budget``, and 0 switches compression off; ``kv_evict`` overrides ``evict``.
            prompt_tokens: length of the prompt, for a budget that is a fraction of it.
            block_size: tokens per page, see :meth:`min_budget`.

        Raises:
            ValueError: ``kv_budget`` or ``kv_evict`` is nothing this policy allows.
        """
        extra_args = extra_args or {}
        evict = extra_args.get(REQUEST_EVICT_KEY, self.evict)
        check_choice(REQUEST_EVICT_KEY, evict, EVICTS)
        if evict == EVICT_PRESSURE and self.evict == EVICT_ALWAYS:
            raise ValueError(f"{REQUEST_EVICT_KEY}={evict!r}: this server evicts always; its option evict would let it")
        asked = extra_args.get(REQUEST_BUDGET_KEY, self.budget)
        most = self._most_budget(prompt_tokens, block_size)
        if asked == 0 and not isinstance(asked, bool):
            if not self.allow_kv_budget_off:
                raise ValueError(
                    f"{REQUEST_BUDGET_KEY}=0: this server lets no request switch compression off{_at_most(most)}; its "
                    "option allow_kv_budget_off would"
                )
            return None
        check_budget(REQUEST_BUDGET_KEY, asked)
        self._check_budget_holds(REQUEST_BUDGET_KEY, asked, block_size)
        budget = self._in_tokens(asked, prompt_tokens, block_size)
        if most is not None and budget > most:
            if REQUEST_BUDGET_KEY in extra_args:
                raise ValueError(
                    f"{REQUEST_BUDGET_KEY}={asked!r}: more than this server allows{_at_most(most)}; its option "
                    "max_budget raises the limit"
                )
            budget = most
        limits = self._limits(budget, prompt_tokens, block_size)
        return dataclasses.replace(limits, elastic=evict == EVICT_PRESSURE)

    def max_resident_tokens(self, max_model_len: int, block_size: int = 1) -> int:
        """Most tokens one sequence can hold under the configured budget, its prefill included."""
        limits = self.request_limits(None, max_model_len, block_size)
        assert limits is not None, "a configured budget is never 0"
        return limits.max_resident_tokens(max_model_len)

    def max_compacted_tokens(self, max_model_len: int, block_size: int = 1) -> int:
        """Most tokens that a sequence holds when it is compacted, under any budget that a request may set."""
        most = self._most_budget(max_model_len, block_size)
        if most is None or self.evict == EVICT_PRESSURE:
            return max_model_len
        return self._limits(most, max_model_len, block_size).max_resident_tokens(max_model_len)

    def _limits(self, budget: int, prompt_tokens: int, block_size: int) -> RequestLimits:
        """Of a budget in tokens that is allowed."""
        window = math.floor(self.window * budget) if isinstance(self.window, float) else self.window
        sinks, distinct = self.sinks, math.floor(self.distinct_share * budget)
        if self.scope == "decode":
            # The prompt stays: it counts as sinks, and comes on top of the budget.
            sinks = max(sinks, prompt_tokens)
            budget += prompt_tokens
        if self.evicts_whole_pages:
            sinks = cdiv(sinks, block_size) * block_size
        return RequestLimits(
            budget=budget,
            window=max(window, self.min_window),
            sinks=sinks,
            interval=self.interval,
            chunk=self.chunk if self.evicts_prompts_in_chunks else None,
            prefill_interval=self.prefill_interval if self.evicts_prompts_in_chunks else None,
            observed_queries=self.observed_queries,
            recent_only=self.entry.recent_only,
            keeps_distinct=self.entry.keeps_distinct and not self.evicts_whole_pages,
            distinct=distinct,
            pinned_prompt=max(sinks, math.floor(self.prompt_share * budget)) if self.prompt_share else 0,
            resumes=self._leaves_last_page,
        )

    def _most_budget(self, prompt_tokens: int, block_size: int) -> int | None:
        """``max_budget`` in tokens; None: unlimited."""
        if isinstance(self.max_budget, str):
            return None
        return self._in_tokens(self.max_budget, prompt_tokens, block_size)

    def _in_tokens(self, budget: int | float, prompt_tokens: int, block_size: int) -> int:
        """A fraction of a prompt in tokens is no less than the smallest budget."""
        if is_int(budget):
            return int(budget)
        return max(math.ceil(budget * prompt_tokens), self.min_budget(block_size))

    def _check_budgets_hold(self, block_size: int = 1) -> None:
        self._check_budget_holds("budget", self.budget, block_size)
        if not isinstance(self.max_budget, str):
            self._check_budget_holds("max_budget", self.max_budget, block_size)

    def _check_budget_holds(self, name: str, budget: int | float, block_size: int = 1) -> None:
        """Refuses a number of tokens that is too small; fractions are raised to the smallest budget instead."""
        least = self.min_budget(block_size)
        if is_int(budget) and budget < least:
            pages = ""
            if self.min_budget(block_size=2) > self.min_budget():
                pages = f", in whole pages of {block_size}" if block_size > 1 else ", and more in whole pages"
            window = f"window {self.window}"
            if self.min_window:
                window += f" (at least {self.min_window}, which the model's sliding windows reach back)"
            if last_page := self._min_last_page(block_size):
                window += f" (at least {last_page}, as many as a page that is not full has with prefix='resume')"
            if self.prompt_share:
                window += f" + prompt_share {self.prompt_share}"
            others = "" if name == REQUEST_BUDGET_KEY else " or lower those"
            raise ValueError(
                f"{name}={budget}: at least {least} tokens are needed for {window} + sinks {self.sinks} + "
                f"interval {self.interval}{pages}; raise {name}{others}"
            )


def resolve(
    config: KVCompressionConfig, model_config: Any = None, block_size: int = 1, is_one_group: bool = False
) -> Policy:
    """Decides what the user left open, and refuses what does not fit together or would do nothing.

    Args:
        config: what the user wrote.
        model_config: vLLM's; None: a model without sliding windows.
        block_size: tokens per page; 1 as long as nobody knows, see :meth:`Policy.for_block_size`.
        is_one_group: layers with a sliding window are in one KV cache group with the others, and compressed like them.

    Raises:
        ValueError: names the option, and what to do.
    """
    filter = config.filter if config.filter is not None else _default_filter(config)
    entry = catalog.entry(config.method, filter)
    for name, reason in _unread_options(config, entry, filter).items():
        if getattr(config, name) is not None:
            raise ValueError(f"{name}={getattr(config, name)!r} does nothing with {reason}")
    _check_page_scores(config, entry)
    interval, chunk, prefill_interval = _in_whole_pages(config, block_size)
    policy = Policy(
        written=config,
        entry=entry,
        method=config.method,
        budget=config.budget,
        max_budget=config.budget if config.max_budget is None else config.max_budget,
        allow_kv_budget_off=config.allow_kv_budget_off,
        evict=config.evict,
        window=config.window,
        sinks=config.sinks,
        interval=interval,
        granularity=config.granularity,
        prefill=PREFILL if config.prefill is None else config.prefill,
        scope=config.scope,
        prompt_share=config.prompt_share or 0.0,
        distinct_share=config.distinct_share or 0.0,
        chunk=chunk,
        prefill_interval=prefill_interval,
        filter=filter,
        rank=0 if "rank" not in entry.options else RANK if config.rank is None else config.rank,
        observed=0 if "observed" not in entry.options else OBSERVED if config.observed is None else config.observed,
        filters=None if "filters" not in entry.options else config.filters or FILTERS,
        prefix=config.prefix,
        endpoint=config.endpoint,
    )
    policy._check_budgets_hold()
    _check_prefix(policy)
    if policy.prompt_share and policy.evict == EVICT_PRESSURE:
        raise ValueError(
            f"prompt_share={policy.prompt_share!r} needs evict='always': sequences give up their prompts step by step, "
            "and not as much at once as pages are wanting"
        )
    _check_max_budget(policy)
    if model_config is None:
        return policy
    # Whether the budget holds the sliding windows is asked later: first come models that are not supported at all.
    kinds = LayerKinds.of(model_config)
    beside = NO_GROUPS if is_one_group else GroupsBeside.of(kinds)
    return dataclasses.replace(policy, sliding_window=0 if beside.window else kinds.window, beside=beside)


def _check_max_budget(policy: Policy) -> None:
    """Refuses a limit for requests below the budget of those that set none."""
    limit, budget = policy.max_budget, policy.budget
    if isinstance(limit, str) or is_int(limit) != is_int(budget):
        return  # a fraction and a number of tokens: which is more is for the prompt to say
    if limit < budget:
        raise ValueError(f"max_budget={limit!r} is below budget={budget!r}: give at least that, or {UNLIMITED!r}")


def _check_prefix(policy: Policy) -> None:
    """Refuses to resume where no request would find what an earlier one held."""
    if not policy.resumes:
        return
    if policy.evict == EVICT_PRESSURE:
        raise ValueError("prefix='resume' needs evict='always': what is evicted for want of pages is never shared")
    if policy.scope == "decode":
        raise ValueError("prefix='resume' needs scope='all': a follow-up prompt keeps more than the one before it")
    if not is_int(policy.budget):
        raise ValueError(
            f"prefix='resume' needs a budget in tokens, not budget={policy.budget!r}: a fraction of a follow-up prompt "
            "is another budget, and requests of different budgets share nothing"
        )


def _at_most(most: int | None) -> str:
    """What a message says of the limit of a request."""
    return "" if most is None else f": give {most} tokens at most"


def _default_filter(config: KVCompressionConfig) -> str | None:
    """The first filter whose scores the granularity can use; None for methods without filters."""
    if "filter" not in catalog.METHODS[config.method].options:
        return None
    needs_final = config.granularity == "page"
    return next(name for name, entry in catalog.QFILTERS.items() if entry.scores_are_final or not needs_final)


def _in_whole_pages(config: KVCompressionConfig, block_size: int) -> tuple[int, int, int]:
    """``interval``, ``chunk`` and ``prefill_interval``: as the user gave them, else defaults rounded up to whole pages.

    Raises:
        ValueError: prompts would be cut less often than their chunks allow.
    """

    def whole_pages(tokens: int) -> int:
        return cdiv(tokens, block_size) * block_size

    interval = config.interval if config.interval is not None else whole_pages(INTERVAL)
    chunk = config.chunk if config.chunk is not None else whole_pages(CHUNK)
    prefill_interval = config.prefill_interval
    if prefill_interval is None:
        prefill_interval = min(whole_pages(PREFILL_INTERVAL), chunk)
    if prefill_interval > chunk:
        raise ValueError(f"prefill_interval={prefill_interval}: give at most chunk={chunk}, or raise chunk")
    return interval, chunk, prefill_interval


def _unread_options(config: KVCompressionConfig, entry: Entry, filter: str | None) -> dict[str, str]:
    """Options that nothing reads, by name: what they do nothing with, and what to do if one is given."""
    unread = sorted(catalog.OPTIONS_OF_SOME - entry.options)
    reasons = {name: _unread_by_method(name, config, entry, filter) for name in unread}
    if config.granularity == "page":
        by_token = "drop it, or choose granularity 'layer' or 'head'"
        reasons["prompt_share"] = f"granularity 'page', which evicts pages by score wherever they are: {by_token}"
        if "distinct_share" in entry.options:
            reasons["distinct_share"] = f"granularity 'page', which keeps pages by score alone: {by_token}"
    if config.scope == "decode":
        whole = "scope 'decode', which keeps prompts whole: drop it, or choose scope 'all'"
        return reasons | dict.fromkeys(("prompt_share", "prefill", "chunk", "prefill_interval"), whole)
    if config.prefill == "full":
        whole = "prefill 'full', which reads prompts whole: drop it, or choose prefill 'chunked'"
        reasons |= dict.fromkeys(("chunk", "prefill_interval"), whole)
    return reasons


def _unread_by_method(name: str, config: KVCompressionConfig, entry: Entry, filter: str | None) -> str:
    if "filter" in entry.options:  # another filter of the same method reads it
        is_default = " (the default in page granularity)" if config.filter is None else ""
        return f"filter {filter!r}{is_default}: drop it, or choose filter {_readers(name, catalog.QFILTERS)}"
    return f"method {config.method!r}: drop it, or choose method {_readers(name, catalog.METHODS)}"


def _readers(option: str, entries: Mapping[str, Entry]) -> str:
    return _any_of(name for name, entry in entries.items() if option in entry.options)


def _check_page_scores(config: KVCompressionConfig, entry: Entry) -> None:
    """Refuses page granularity for methods whose scores change after a page is full."""
    if config.granularity != "page" or entry.scores_are_final:
        return
    if "filter" in entry.options:
        final = (name for name, of_filter in catalog.QFILTERS.items() if of_filter.scores_are_final)
        raise ValueError(
            f"filter={config.filter!r} scores a token by where its sequence stands, but the score of a page is final "
            f"when the page is full: with granularity 'page' use filter {_any_of(final)}, or choose granularity "
            "'layer' or 'head'"
        )
    raise ValueError(
        f"method={config.method!r} scores a token anew at every cut, by its whole sequence, but the score of a page is "
        "final when the page is full: choose granularity 'layer' or 'head'"
    )


def _any_of(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names)
