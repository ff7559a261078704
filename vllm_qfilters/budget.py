"""How many tokens a sequence evicts and when: pure integers, no engine, no tensors.

Counts depend on positions alone, never on how the scheduler batched them, so that a prompt served from the prefix
cache, a prompt chunked beside other requests and a prompt served alone are cut at the same tokens.
"""

import dataclasses
import math


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def min_budget(window: int | float, sinks: int, interval: int, prompt_share: float = 0, block_size: int = 1) -> int:
    """Fewest tokens a budget may have so that ``budget - interval`` still holds window and sinks, or the share of the
    prompt instead of them, rounded up so that whole pages of the prompt were evicted.
    """

    def protected(budget: int) -> int:
        of_prompt = math.floor(prompt_share * budget)
        window_tokens = math.floor(window * budget) if isinstance(window, float) else window
        return window_tokens + (max(sinks, of_prompt) + block_size - 1 if prompt_share else sinks)

    budget = interval + protected(0)
    while budget - interval < protected(budget):
        # What is missing, at least 1: a larger budget protects more, so this never steps over the smallest.
        budget = interval + protected(budget)
    return budget


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """The limits of one request, in tokens.

    Attributes:
        budget: most tokens resident while decoding.
        window: last tokens, never evicted.
        sinks: first tokens, never evicted.
        interval: tokens evicted in one go; a multiple of the block size.
        chunk: most tokens resident beside the budget while a prompt is read; None: a prompt is cut when decoding
            begins.
        prefill_interval: positions at which a prompt is cut are the multiples of this, at most ``chunk``; None where
            ``chunk`` is.
        observed_queries: last queries of a prompt that scores go by. Where there are any, the workers write beside
            tokens of the window too, when the sequence evicts.
        recent_only: nothing is scored, the most recent tokens stay beside the sinks (StreamingLLM).
        keeps_distinct: what a prompt holds beyond the budget are the tokens whose values are most unlike the others.
        distinct: tokens of the budget that are such tokens, too.
        elastic: the sequence is cut when pages are wanting, and else holds any number of tokens.
        pinned_prompt: tokens of the prompt that stay to the end, up to a page more so that whole pages go; 0: none, and
            tokens of the prompt compete with generated ones.
        resumes: others go on from what the sequence holds at its end, in whole pages. So the last tokens stay where
            they do not fill one: they are read again, and nothing else is held behind the last whole page.
    """

    budget: int
    window: int
    sinks: int
    interval: int
    chunk: int | None
    prefill_interval: int | None
    observed_queries: int = 0
    recent_only: bool = False
    keeps_distinct: bool = False
    distinct: int = 0
    elastic: bool = False
    pinned_prompt: int = 0
    resumes: bool = False

    def max_resident_tokens(self, length: int) -> int:
        """Most tokens that a sequence of ``length`` tokens holds at any time; an elastic one can be cut to as many."""
        return length if self.chunk is None else min(length, self.budget + self.chunk)

    def evicted_tokens(self, resident: int, is_prefilling: bool, block_size: int) -> int:
        """Tokens to evict before the next step of a sequence, a multiple of the block size.

        Args:
            resident: tokens the sequence holds now.
            is_prefilling: more of the prompt is to come; the sequence then stands at a multiple of
                ``prefill_interval``.
            block_size: tokens per page.

        Returns:
            0 if nothing is due. After eviction the sequence holds at least ``budget - interval`` tokens, and never more
            with those of the next step than ``budget`` while decoding, ``budget + chunk`` before.
        """
        surplus = resident - self._kept_while_prefilling if is_prefilling else resident + 1 - self.budget
        if surplus <= 0:
            return 0
        evicted = cdiv(surplus, block_size) * block_size
        return evicted if is_prefilling else max(self.interval, evicted)

    def reducible_tokens(self, resident: int, is_prefilling: bool, block_size: int) -> int:
        """Tokens that an elastic sequence gives up when pages are wanting, a multiple of the block size: all beyond its
        budget. 0 while a prompt that is to be attended whole is read.

        Args:
            resident, is_prefilling, block_size: as for :meth:`evicted_tokens`, at any position of a prompt.
        """
        if is_prefilling and self.chunk is None:
            return 0
        return self.evicted_tokens(resident, is_prefilling, block_size)

    def protected_window(self, kept: int) -> int:
        """Last tokens that must be among the ``kept`` ones."""
        return kept - self.sinks if self.recent_only else self.window

    def prompt_surplus(self, prompt_tokens: int, evicted: int, block_size: int) -> int:
        """Tokens that a sequence which has read its prompt still evicts from it, before any that it generated; a
        multiple of the block size.

        Args:
            prompt_tokens: length of the prompt.
            evicted: tokens the sequence has evicted.
            block_size: tokens per page.
        """
        if not self.pinned_prompt:
            return 0
        return max(0, (prompt_tokens - self.pinned_prompt) // block_size * block_size - evicted)

    def protected(self, kept: int, position: int, prompt_tokens: int, evicted: int, block_size: int) -> tuple[int, int]:
        """First and last tokens that must be among the ``kept`` ones of an eviction.

        Args:
            position: of the next token.
            prompt_tokens, evicted, block_size: as for :meth:`prompt_surplus`; ``evicted`` before the eviction.
        """
        sinks, window = self.sinks, self.window
        if self.resumes:
            window = max(window, kept % block_size)
        if self.pinned_prompt and position >= prompt_tokens:
            if self.prompt_surplus(prompt_tokens, evicted, block_size):
                window = max(window, position - prompt_tokens)
            else:
                sinks = max(sinks, prompt_tokens - self.prompt_surplus(prompt_tokens, 0, block_size))
        return sinks, kept - sinks if self.recent_only else window

    def distinct_tokens(self, kept: int, protected: int, reads_prompt: bool) -> int:
        """How many of ``kept`` tokens stay because their values are unlike the others: those of the budget that are set
        aside for it, and while a prompt is read all that the budget does not hold.

        What the end of a prompt will ask for shows in no query yet, but it is seldom what the rest of the prompt is
        like.

        Args:
            protected: those of ``kept`` that stay in any case, as sinks or window.
            reads_prompt: more of the prompt is to come.
        """
        beyond = max(0, kept - self.budget) if self.keeps_distinct and reads_prompt else 0
        return max(0, min(self.distinct + beyond, kept - protected))

    @property
    def private_window(self) -> bool:
        """Whether the workers write beside tokens of the window, when the sequence evicts."""
        return self.observed_queries > 0

    @property
    def shares_prefixes(self) -> bool:
        """Whether what a prompt holds behind a cut is a function of its tokens and these limits, so that prompts that
        begin alike can share it.

        The cuts of elastic sequences depend on others. And the queries that the next cut goes by must be computed.
        """
        if self.prefill_interval is None or self.elastic:
            return False
        return self.observed_queries <= self.prefill_interval

    def prefix_tokens(self, block_size: int) -> int:
        """Tokens that a prompt holds behind each of its cuts."""
        return self._kept_while_prefilling // block_size * block_size

    def end_of_prefix(self, cut: int, block_size: int) -> int:
        """The last position, at a multiple of the block size, from which a long enough prompt computes all queries that
        its next cut goes by."""
        assert self.prefill_interval is not None
        return cut + self.prefill_interval - cdiv(max(1, self.observed_queries), block_size) * block_size

    def keeps_prefix(self, cut: int, block_size: int) -> bool:
        """Whether what a prompt holds behind a cut stays in the prefix cache after the next one: so often that a prompt
        leaves no more pages behind cuts than it has tokens."""
        assert self.prefill_interval is not None and self.first_prefill_cut is not None
        spacing = max(1, cdiv(self.prefix_tokens(block_size), self.prefill_interval))
        return (cut - self.first_prefill_cut) // self.prefill_interval % spacing == 0

    @property
    def first_prefill_cut(self) -> int | None:
        """The position at which a long enough prompt is first cut; None if prompts are attended whole."""
        if self.prefill_interval is None:
            return None
        return (self._kept_while_prefilling // self.prefill_interval + 1) * self.prefill_interval

    def is_prefill_cut(self, position: int) -> bool:
        """Whether a prompt of which more is to come can be cut at ``position``."""
        return self.prefill_interval is not None and position % self.prefill_interval == 0

    def tokens_to_next_cut(self, position: int) -> int | None:
        """Tokens a prompt may be prefilled from ``position`` before the next place where it can be cut."""
        first = self.first_prefill_cut
        if first is None or self.prefill_interval is None:
            return None
        return max(first - position, self.prefill_interval - position % self.prefill_interval)

    @property
    def _kept_while_prefilling(self) -> int:
        """Tokens that leave room for those up to the next cut. What the end of a prompt asks for is known at its end
        alone: until then all the room there is serves to keep more of it."""
        assert self.chunk is not None and self.prefill_interval is not None
        return self.budget + self.chunk - self.prefill_interval
