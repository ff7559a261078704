"""How many tokens a sequence evicts and when: pure integers, no engine, no tensors.

Counts depend on positions alone, never on how the scheduler batched them, so that a prompt served from the prefix cache, a
prompt chunked beside other requests and a prompt served alone are cut at the same tokens.
"""

import dataclasses
import math


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def min_budget(window: int | float, sinks: int, interval: int) -> int:
    """Fewest tokens a budget may have so that ``budget - interval`` still holds sinks and window."""
    if isinstance(window, float):
        budget = sinks + interval
        while budget - interval < math.floor(window * budget) + sinks:
            # What is missing, at least 1: a larger budget has a larger window, so this never steps over the smallest.
            budget = interval + math.floor(window * budget) + sinks
        return budget
    return window + sinks + interval


@dataclasses.dataclass(frozen=True)
class RequestLimits:
    """The limits of one request, in tokens.

    Attributes:
        budget: most tokens resident while decoding.
        window: last tokens, never evicted.
        sinks: first tokens, never evicted.
        interval: tokens evicted in one go; a multiple of the block size.
        chunk: positions at which a prompt is cut are the multiples of this; None: a prompt is cut when decoding begins.
        private_window: the workers write beside tokens of the window too, when the sequence evicts.
        recent_only: nothing is scored, the most recent tokens stay beside the sinks (StreamingLLM).
    """

    budget: int
    window: int
    sinks: int
    interval: int
    chunk: int | None
    private_window: bool = False
    recent_only: bool = False

    @property
    def max_resident_tokens(self) -> int | float:
        """Most tokens resident at any time; unbounded while prompts are attended whole."""
        return math.inf if self.chunk is None else self.budget + self.chunk

    def evicted_tokens(self, resident: int, is_prefilling: bool, block_size: int) -> int:
        """Tokens to evict before the next step of a sequence, a multiple of the block size.

        Args:
            resident: tokens the sequence holds now.
            is_prefilling: more of the prompt is to come; the sequence then stands at a multiple of ``chunk``.
            block_size: tokens per page.

        Returns:
            0 if nothing is due. After eviction the sequence holds at least ``budget - interval`` tokens and, while decoding,
            never more than ``budget`` with the token of the next step.
        """
        surplus = resident - self.budget if is_prefilling else resident + 1 - self.budget
        if surplus <= 0:
            return 0
        evicted = cdiv(surplus, block_size) * block_size
        return evicted if is_prefilling else max(self.interval, evicted)

    def protected_window(self, kept: int) -> int:
        """Last tokens that must be among the ``kept`` ones."""
        return kept - self.sinks if self.recent_only else self.window

    @property
    def first_prefill_cut(self) -> int | None:
        """The position at which a long enough prompt is first cut; None if prompts are attended whole."""
        return None if self.chunk is None else (self.budget // self.chunk + 1) * self.chunk

    def tokens_to_next_cut(self, position: int) -> int | None:
        """Tokens a prompt may be prefilled from ``position`` before the next place where it can be cut."""
        if self.chunk is None:
            return None
        return max(self.first_prefill_cut - position, self.chunk - position % self.chunk)
