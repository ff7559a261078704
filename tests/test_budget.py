"""Eviction counts, over whole lives of sequences: prompts read in steps of any size, then one token at a time."""

import dataclasses
import itertools
import math

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_qfilters.budget import RequestLimits, min_budget

BLOCK_SIZES = (1, 16, 32, 128)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a sequence.

    Attributes:
        position: tokens computed before it.
        resident_before, evicted_tokens: before the step ran.
        resident: with the tokens of the step.
        is_decoding: the prompt was complete before it.
    """

    position: int
    resident_before: int
    evicted_tokens: int
    resident: int
    is_decoding: bool


@dataclasses.dataclass(frozen=True)
class Case:
    limits: RequestLimits
    block_size: int
    prompt_tokens: int
    new_tokens: int


@st.composite
def cases(draw, is_chunked: bool | None = None) -> Case:
    """Valid limits and a sequence that crosses them several times."""
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    interval = block_size * draw(st.integers(1, 4))
    window, sinks = draw(st.integers(0, 200)), draw(st.integers(0, 150))
    budget = window + sinks + interval + draw(st.integers(0, 300))
    if is_chunked is None:
        is_chunked = draw(st.booleans())
    chunk = block_size * draw(st.integers(1, 6)) if is_chunked else None
    prefill_interval = block_size * draw(st.integers(1, chunk // block_size)) if is_chunked else None
    prompt_tokens = draw(st.integers(1, 3 * budget))
    new_tokens = draw(st.integers(1, budget))
    return Case(
        RequestLimits(budget, window, sinks, interval, chunk, prefill_interval), block_size, prompt_tokens, new_tokens
    )


step_sizes = st.lists(st.integers(1, 700), min_size=1, max_size=20)


def live(case: Case, sizes: list[int]) -> list[Step]:
    """The steps of a sequence whose prompt a scheduler reads in steps of at most ``sizes``, over and over."""
    limits = case.limits
    position, resident, steps = 0, 0, []
    while position < case.prompt_tokens + case.new_tokens:
        before, evicted, is_decoding = resident, 0, position >= case.prompt_tokens
        if is_decoding:
            evicted = limits.evicted_tokens(resident, is_prefilling=False, block_size=case.block_size)
        elif limits.is_prefill_cut(position):
            evicted = limits.evicted_tokens(resident, is_prefilling=True, block_size=case.block_size)
        num_tokens = 1
        if not is_decoding:
            num_tokens = min(sizes[len(steps) % len(sizes)], case.prompt_tokens - position)
            to_next_cut = limits.tokens_to_next_cut(position)
            if to_next_cut is not None:
                num_tokens = min(num_tokens, to_next_cut)
        resident = before - evicted + num_tokens
        steps.append(Step(position, before, evicted, resident, is_decoding))
        position += num_tokens
    return steps


def cuts(steps: list[Step]) -> list[tuple[int, int]]:
    return [(step.position, step.evicted_tokens) for step in steps if step.evicted_tokens]


@settings(deadline=None)
@given(cases(), step_sizes)
def test_a_decoding_sequence_never_holds_more_than_its_budget(case, sizes):
    for step in live(case, sizes):
        assert not step.is_decoding or step.resident <= case.limits.budget


@settings(deadline=None)
@given(cases(), step_sizes)
def test_no_sequence_ever_holds_more_than_its_budget_and_a_chunk(case, sizes):
    most = math.inf if case.limits.chunk is None else case.limits.budget + case.limits.chunk
    length = case.prompt_tokens + case.new_tokens
    assert case.limits.max_resident_tokens(length) == min(length, most)
    assert all(step.resident <= min(length, most) for step in live(case, sizes))


@settings(deadline=None)
@given(cases(), step_sizes)
def test_after_an_eviction_sinks_and_window_are_still_there(case, sizes):
    limits = case.limits
    for step in live(case, sizes):
        if step.evicted_tokens:
            left = step.resident_before - step.evicted_tokens
            assert left >= limits.budget - limits.interval >= limits.window + limits.sinks


@settings(deadline=None)
@given(cases(), step_sizes)
def test_whole_pages_are_evicted(case, sizes):
    assert all(step.evicted_tokens % case.block_size == 0 for step in live(case, sizes))


@settings(deadline=None)
@given(cases(), step_sizes)
def test_nothing_is_evicted_while_there_is_room_for_the_tokens_before_the_next_cut(case, sizes):
    limits = case.limits
    for step in live(case, sizes):
        if step.evicted_tokens and step.is_decoding:
            assert step.resident_before + 1 > limits.budget
        elif step.evicted_tokens:
            assert step.resident_before + limits.prefill_interval > limits.budget + limits.chunk


@settings(deadline=None)
@given(cases(is_chunked=True), step_sizes)
def test_a_prompt_keeps_all_it_has_room_for_until_its_end(case, sizes):
    limits = case.limits
    steps = live(dataclasses.replace(case, prompt_tokens=case.prompt_tokens + limits.first_prefill_cut), sizes)
    kept = [
        step.resident_before - step.evicted_tokens for step in steps if step.evicted_tokens and not step.is_decoding
    ]
    room = limits.budget + limits.chunk - limits.prefill_interval
    assert kept and all(room - case.block_size < tokens <= room for tokens in kept)


@settings(deadline=None)
@given(cases(), step_sizes)
def test_in_steady_state_each_eviction_is_one_interval_and_they_are_one_interval_apart(case, sizes):
    case = dataclasses.replace(case, new_tokens=case.limits.budget + 5 * case.limits.interval)
    decode_cuts = cuts([step for step in live(case, sizes) if step.is_decoding])
    assert len(decode_cuts) >= 4
    assert {evicted for _, evicted in decode_cuts[1:]} == {case.limits.interval}
    positions = [position for position, _ in decode_cuts[1:]]
    assert {later - earlier for earlier, later in itertools.pairwise(positions)} == {case.limits.interval}


@settings(deadline=None)
@given(cases(), step_sizes, step_sizes)
def test_cuts_depend_on_positions_alone(case, sizes, other_sizes):
    """However a scheduler slices the prompt."""
    assert cuts(live(case, sizes)) == cuts(live(case, other_sizes))


@settings(deadline=None)
@given(cases(is_chunked=True), step_sizes)
def test_a_long_prompt_is_first_cut_at_the_last_place_before_there_is_no_room(case, sizes):
    limits = case.limits
    first, most = limits.first_prefill_cut, limits.budget + limits.chunk
    assert limits.is_prefill_cut(first) and first <= most < first + limits.prefill_interval
    case = dataclasses.replace(case, prompt_tokens=case.prompt_tokens + first)
    assert cuts(live(case, sizes))[0][0] == first


@settings(deadline=None)
@given(cases(is_chunked=True), step_sizes)
def test_a_prompt_that_ends_at_or_before_the_first_cut_is_cut_when_decoding_begins(case, sizes):
    prompt_tokens = min(case.prompt_tokens, case.limits.first_prefill_cut)
    case = dataclasses.replace(case, prompt_tokens=prompt_tokens)
    assert all(position >= prompt_tokens for position, _ in cuts(live(case, sizes)))


@settings(deadline=None)
@given(cases(is_chunked=True), st.integers(0, 5000))
def test_the_tokens_to_the_next_cut_end_at_it_and_cross_none(case, position):
    limits = case.limits
    places = [limits.first_prefill_cut]
    while places[-1] <= position:
        places.append(places[-1] + limits.prefill_interval)
    assert position + limits.tokens_to_next_cut(position) == places[-1]


@settings(deadline=None)
@given(cases(is_chunked=False), step_sizes)
def test_a_prompt_attended_whole_is_cut_once_when_decoding_begins(case, sizes):
    limits = case.limits
    assert limits.first_prefill_cut is None and limits.tokens_to_next_cut(0) is None
    case = dataclasses.replace(case, prompt_tokens=case.prompt_tokens + limits.budget)
    steps = live(case, sizes)
    assert all(step.evicted_tokens == 0 for step in steps if not step.is_decoding)
    first = next(step for step in steps if step.is_decoding)
    assert first.evicted_tokens and first.resident <= limits.budget


@settings(deadline=None)
@given(cases(), st.integers(-100, 700), st.booleans())
def test_an_eviction_is_the_fewest_pages_that_do_and_while_decoding_one_interval_at_least(case, surplus, is_prefilling):
    limits = case.limits
    assume(limits.chunk is not None or not is_prefilling)
    most = limits.budget + (limits.chunk - limits.prefill_interval if is_prefilling else 0)
    resident = max(0, most + surplus)
    evicted = limits.evicted_tokens(resident, is_prefilling, case.block_size)
    holds = resident if is_prefilling else resident + 1
    fewest = 0
    while holds - fewest > most:
        fewest += case.block_size
    assert evicted == (max(fewest, limits.interval) if fewest and not is_prefilling else fewest)


@settings(deadline=None)
@given(cases(), st.integers(0, 1000))
def test_a_sequence_that_keeps_recent_tokens_only_protects_all_but_the_sinks(case, extra):
    kept = case.limits.window + case.limits.sinks + extra
    assert case.limits.protected_window(kept) == case.limits.window
    recent = dataclasses.replace(case.limits, recent_only=True)
    assert recent.protected_window(kept) == kept - case.limits.sinks


@dataclasses.dataclass(frozen=True)
class Cut:
    """One eviction of a sequence that has read its prompt, and what it holds of prompt and generated text behind it."""

    generated_tokens: int
    evicted: tuple[int, int]
    sinks: int
    window: int
    held: tuple[int, int]


def decode(limits: RequestLimits, block_size: int, prompt_tokens: int, resident: int, new_tokens: int) -> list[Cut]:
    """Goes on behind a prompt of which ``resident`` tokens are held, following the rule by what is protected alone."""
    of_prompt, generated, evicted, cuts = resident, 0, prompt_tokens - resident, []
    for position in range(prompt_tokens, prompt_tokens + new_tokens):
        due = limits.evicted_tokens(of_prompt + generated, is_prefilling=False, block_size=block_size)
        if due:
            due = min(due, limits.prompt_surplus(prompt_tokens, evicted, block_size) or due)
            kept = of_prompt + generated - due
            sinks, window = limits.protected(kept, position, prompt_tokens, evicted, block_size)
            assert sinks + window <= kept, "there is no choice that protects both"
            first, end = sinks, of_prompt + generated - window  # what is evicted lies between
            in_prompt = max(0, min(of_prompt, end) - first)
            assert first >= of_prompt or end <= of_prompt or not limits.pinned_prompt, "of both at once"
            gone = due if first < of_prompt else 0
            assert gone <= in_prompt or not limits.pinned_prompt
            of_prompt, generated = of_prompt - gone, generated - (due - gone)
            evicted += due
            cuts.append(Cut(position - prompt_tokens, (gone, due - gone), sinks, window, (of_prompt, generated)))
        generated += 1
        assert of_prompt + generated <= limits.budget
    return cuts


@st.composite
def pinned_cases(draw) -> tuple[RequestLimits, int, int, int]:
    """Limits with a share for the prompt, the block size, the tokens of a prompt, and how many of them are held."""
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    interval = block_size * draw(st.integers(1, 4))
    window, sinks = draw(st.floats(0, 0.4)), draw(st.integers(0, 150))
    share = draw(st.floats(0.01, 0.5))
    budget = min_budget(window, sinks, interval, share, block_size) + draw(st.integers(0, 300))
    limits = RequestLimits(budget, math.floor(window * budget), sinks, interval, None, None)
    limits = dataclasses.replace(limits, pinned_prompt=max(sinks, math.floor(share * budget)))
    prompt_tokens = draw(st.integers(1, 3 * budget))
    most_evicted = max(0, prompt_tokens - budget) // block_size  # while it was read
    return limits, block_size, prompt_tokens, prompt_tokens - block_size * draw(st.integers(0, most_evicted))


@settings(deadline=None)
@given(pinned_cases(), st.booleans())
def test_a_prompt_gives_way_down_to_its_share_and_then_never_more(case, is_recent_only):
    limits, block_size, prompt_tokens, resident = case
    assume(limits.pinned_prompt)
    limits = dataclasses.replace(limits, recent_only=is_recent_only)
    cuts = decode(limits, block_size, prompt_tokens, resident, 3 * limits.budget)
    share = min(prompt_tokens, limits.pinned_prompt)
    left = [cut.held[0] for cut in cuts]
    assert left == sorted(left, reverse=True) and share <= left[-1] < share + block_size
    assert left[-1] == prompt_tokens - limits.prompt_surplus(prompt_tokens, 0, block_size)
    for cut in cuts:
        assert not cut.evicted[0] or cut.held[1] == cut.generated_tokens, "generated text goes only after the prompt's"
        assert cut.sinks >= limits.sinks and cut.window >= (0 if is_recent_only else limits.window)
    assert sum(cut.evicted[1] for cut in cuts) > 0


windows = st.one_of(st.integers(0, 1000), st.floats(0, 0.95), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9]))


def has_room(budget: int, window: int | float, sinks: int, interval: int) -> bool:
    """After the eviction of an interval, sinks and window still fit."""
    window_tokens = math.floor(window * budget) if isinstance(window, float) else window
    return budget - interval >= window_tokens + sinks


@settings(deadline=None)
@given(st.floats(0, 0.5), st.floats(0.01, 0.45), st.integers(0, 200), st.integers(1, 8), st.sampled_from(BLOCK_SIZES))
def test_the_smallest_budget_has_room_for_the_share_of_a_prompt(window, share, sinks, pages, block_size):
    interval = pages * block_size
    budget = min_budget(window, sinks, interval, share, block_size)

    def room(budget: int) -> int:
        pinned = max(sinks, math.floor(share * budget)) + block_size - 1  # evicted down to in whole pages
        return budget - interval - math.floor(window * budget) - pinned

    assert room(budget) >= 0 > room(budget - 1)


@settings(deadline=None)
@given(windows, st.integers(0, 200), st.integers(1, 512), st.integers(0, 2000))
def test_every_budget_from_the_smallest_on_has_room(window, sinks, interval, extra):
    assert has_room(min_budget(window, sinks, interval) + extra, window, sinks, interval)


@settings(deadline=None, max_examples=300)
@given(windows, st.integers(0, 200), st.integers(1, 512))
def test_no_smaller_budget_than_the_smallest_has_room(window, sinks, interval):
    smallest = min_budget(window, sinks, interval)
    assume(smallest > 0)
    assert not has_room(smallest - 1, window, sinks, interval)


@given(st.sampled_from(BLOCK_SIZES[1:]), st.integers(1, 64), st.integers(0, 512), st.integers(0, 8))
def test_a_prompt_that_starts_behind_a_cut_computes_the_queries_of_the_next(block_size, pages, observed, cut):
    """Or what stands there would be shared with those that start behind it."""
    interval = pages * block_size
    limits = RequestLimits(4096, 0, 0, block_size, 2048, interval, observed_queries=observed)
    assume(limits.shares_prefixes)
    end = limits.end_of_prefix(cut * interval, block_size)
    assert cut * interval <= end and end % block_size == 0
    next_cut = (cut + 1) * interval
    assert max(1, observed) <= next_cut - end < max(1, observed) + block_size
