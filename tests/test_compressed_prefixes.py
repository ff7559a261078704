"""Compressed prefixes without a model: is a sequence that starts behind one what it would be, had it read everything?

The workers are stood for by one that keeps in its pages what a cache keeps: a token's entry depends on the token and on
all entries it attends to, survivors move as in ``kernels/reference.py``, and the next token follows from the entries.
So a page that is written while others read it, or a prefix that is not what its tokens make of it, changes all that
comes after. The truth is a sequence of its own, read token by token from an empty cache.
"""

import itertools
import random
import sys

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tests import test_bookkeeping
from tests.test_bookkeeping import BLOCK, NUM_BLOCKS, Simulation, Worker
from vllm_qfilters.budget import RequestLimits, cdiv
from vllm_qfilters.kernels.reference import taken_out
from vllm_qfilters.messages import QFiltersModelRunnerOutput

VOCAB = 500


def entry(token: int, position: int, attended: int) -> int:
    return hash((token, position, attended))


def next_token(entries: list[int]) -> int:
    return 3 + hash((VOCAB, sum(entries))) % (VOCAB - 3)


def survivors(entries: list[int], position: int, evicted: int, sinks: int, window: int) -> list[bool]:
    """Which entries stay, of those between sinks and window the ones of the highest scores."""
    middle = range(sinks, len(entries) - window)
    best = sorted(middle, key=lambda i: hash((entries[i], position)))[evicted:]
    kept = set(best) | set(range(sinks)) | set(range(len(entries) - window, len(entries)))
    return [i in kept for i in range(len(entries))]


def page_score(entries: list[int]) -> float:
    return hash(tuple(entries)) % 2**24 / 2**24


class CachingWorker(Worker):
    """Keeps the entries of tokens in pages, for granularity ``layer`` or ``page``."""

    def __init__(self, rng: random.Random, granularity: str) -> None:
        super().__init__(rng)
        self.moves = granularity == "layer"
        self.cache = [[0] * BLOCK for _ in range(NUM_BLOCKS)]
        self.tokens: dict[str, list[int]] = {}  # of requests until they end, preempted ones too
        self.ended: list[list[int]] = []
        self.cuts: dict[str, int] = {}  # positions of the last cuts

    def step(self, output: SchedulerOutput) -> None:
        # vLLM has a set of names, whose order differs from process to process.
        self.ended += [self.tokens.pop(req_id) for req_id in sorted(output.finished_req_ids) if req_id in self.tokens]
        for req_id in (*output.finished_req_ids, *(output.preempted_req_ids or ())):
            self.cuts.pop(req_id, None)
        for row in output.compaction.compactions:
            self.cuts[row.req_id] = row.position
            if self.moves:
                self.compact(row)
        super().step(output)
        for new in output.scheduled_new_reqs:
            self.tokens.setdefault(new.req_id, list(new.prompt_token_ids))
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            entries, tokens = self.entries(req_id, -num_tokens), self.tokens[req_id]
            attended, position = sum(entries), self.computed[req_id] - num_tokens
            for place in range(len(entries), len(entries) + num_tokens):
                made = entry(tokens[position], position, attended)
                self.cache[self.pages[req_id][place // BLOCK]][place % BLOCK] = made
                attended, position = attended + made, position + 1
            if position >= len(tokens):
                tokens.append(next_token(self.entries(req_id)))

    def answer(self, output: SchedulerOutput, samples: dict[str, bool]) -> ModelRunnerOutput:
        answer = super().answer(output, samples)
        for index, req_id in enumerate(answer.req_ids):
            if samples[req_id]:
                token = next_token(self.entries(req_id))
                assert self.tokens[req_id][self.computed[req_id]] == token, "read again, it says something else"
                answer.sampled_token_ids[index] = [token]
        if isinstance(answer, QFiltersModelRunnerOutput):
            answer.page_scores = tuple(page_score(self.cache[page]) for page in output.pages_to_score)
        return answer

    def entries(self, req_id: str, more: int = 0) -> list[int]:
        resident = self.computed[req_id] + more - self.lengths._evicted.get(req_id, 0)
        return [self.cache[self.pages[req_id][place // BLOCK]][place % BLOCK] for place in range(resident)]

    def compact(self, row) -> None:
        entries, table = self.entries(row.req_id), list(self.pages[row.req_id])
        assert len(entries) == row.resident_tokens
        for place, page in row.copied_pages:
            self.cache[page] = list(self.cache[table[place]])
            table[place] = page
        kept = survivors(entries, row.position, row.evicted_tokens, row.sinks, row.window)
        first_out, after_out = taken_out(len(entries), row.evicted_tokens, row.window, BLOCK)
        places = [*range(first_out), *range(after_out, len(entries))]
        for place, entry in zip(places, itertools.compress(entries, kept), strict=True):
            self.cache[table[place // BLOCK]][place % BLOCK] = entry


def cold(
    tokens: list[int | None],
    num_prompt: int,
    limits: RequestLimits | None,
    moves: bool,
    held: tuple[int, ...] = (),
    start: int = 0,
) -> list[int]:
    """The entries of a sequence alone that has computed ``tokens``, of which the first ones are its prompt; None at
    their end: it has been cut for the next one. held: those that it began with, at position ``start``."""
    entries = list(held)
    for position, token in enumerate(tokens[start:], start):
        evicted = 0
        if limits is not None and position >= num_prompt:
            evicted = limits.evicted_tokens(len(entries), False, BLOCK)
        elif limits is not None and position and limits.is_prefill_cut(position):
            evicted = limits.evicted_tokens(len(entries), True, BLOCK)
        if evicted and moves:
            window = limits.protected_window(len(entries) - evicted)
            if limits.resumes:  # nothing comes in the place of tokens that a follow-up reads again
                window = max(window, (len(entries) - evicted) % BLOCK)
            kept = survivors(entries, position, evicted, limits.sinks, window)
            entries = [made for made, is_kept in zip(entries, kept, strict=True) if is_kept]
        elif evicted:
            window = limits.protected_window(len(entries) - evicted)
            pages = [entries[i : i + BLOCK] for i in range(0, len(entries), BLOCK)]
            choice = range(cdiv(limits.sinks, BLOCK), (len(entries) - window) // BLOCK)
            out = set(sorted(choice, key=lambda i: page_score(pages[i]))[: evicted // BLOCK])
            entries = [made for i, page in enumerate(pages) if i not in out for made in page]
        if token is not None:
            entries.append(entry(token, position, sum(entries)))
    return entries


class Conversations(Simulation):
    """Users who say more, say it again, or say something else; some prompts begin alike."""

    def __init__(self, model, granularity: str, seed: int, **options) -> None:
        def make_worker(rng):
            return CachingWorker(rng, granularity)

        super().__init__(model, granularity, True, "always", seed, make_worker, **options)
        self.budgets = [None, None, {"kv_budget": 32}, {"kv_budget": 0.5}, {"kv_budget": 0}]
        self.num_checked = self.num_checked_behind_prefixes = 0
        self.started: set[str] = set()  # behind a compressed prefix
        self.resumed: dict[str, tuple[tuple[int, ...], int]] = {}  # what they held then, and where

    def words(self, most: int) -> list[int]:
        return [self.rng.randrange(3, VOCAB) for _ in range(self.rng.randint(1, most))]

    def add(self, max_tokens: int | None = None) -> None:
        del self.worker.ended[:-8]
        prompt = self.rng.choice([[], *self.prefixes, *self.worker.ended])[:400]
        if prompt and self.rng.random() < 0.3:
            prompt = prompt[: self.rng.randint(1, len(prompt))]
        max_tokens, priority = max_tokens or self.rng.randint(1, 80), self.rng.randrange(3)
        self.ask([*prompt, *self.words(60)], self.rng.choice(self.budgets), max_tokens, priority=priority)

    def ask(self, prompt: list[int], extra_args=None, max_tokens: int = 1, **request) -> str:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args)
        name = f"simulated-{self.added}"
        self.scheduler.add_request(Request(name, prompt, params, None, block_hasher=self.hasher, **request))
        self.added += 1
        return name

    def step(self) -> None:
        super().step()
        output, _ = self.in_flight[-1] if self.in_flight else (None, None)
        if output is not None:
            self.started |= {hit.req_id for hit in output.prefix_hits}
            for req_id in output.preempted_req_ids or ():
                self.resumed.pop(req_id, None)
            for hit in output.prefix_hits:
                if hit.resumes:
                    held = self.worker.entries(hit.req_id, -output.num_scheduled_tokens[hit.req_id])
                    self.resumed[hit.req_id] = tuple(held), hit.position
        running = [request.request_id for request in self.scheduler.running]
        running = [req_id for req_id in running if req_id in self.worker.computed]
        if running:
            self.check(self.rng.choice(running))

    def check(self, req_id: str) -> None:
        worker, request = self.worker, self.scheduler.requests[req_id]
        tokens: list[int | None] = [*worker.tokens[req_id][: worker.computed[req_id]]]
        if worker.cuts.get(req_id) == len(tokens):
            tokens.append(None)
        limits = self.scheduler.block_manager.limits.get(req_id)
        expected = cold(tokens, request.num_prompt_tokens, limits, worker.moves, *self.resumed.get(req_id, ()))
        assert sorted(worker.entries(req_id)) == sorted(expected), f"{req_id} is not what a cold reading gives"
        self.num_checked += 1
        self.num_checked_behind_prefixes += req_id in self.started


@pytest.mark.parametrize(
    "chunk, prefill_interval, seed, policy", [(32, 8, 4, "fcfs"), (24, 24, 2, "priority"), (64, 2, 3, "fcfs")]
)
@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_what_starts_behind_a_prefix_is_what_a_cold_reading_gives(
    granularity, chunk, prefill_interval, seed, policy, tiny_model
):
    options = dict(chunk=chunk, prefill_interval=prefill_interval, policy=policy)
    simulation = Conversations(tiny_model, granularity, seed, **options)
    scheduler, rng = simulation.scheduler, simulation.rng
    for number in range(1000):
        # By turns, there is room for prefixes, and too little for those that run.
        while len(scheduler.requests) < (24 if number // 100 % 2 else 4):
            simulation.add()
        if rng.random() < 0.02:
            scheduler.finish_requests(rng.choice(list(scheduler.requests)), RequestStatus.FINISHED_ABORTED)
            simulation.ended += 1
        if rng.random() < 0.003:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        simulation.step()
        if number % 250 == 249:
            simulation.audit()
    simulation.finish()
    simulation.audit_ended()
    stats = scheduler.compression_stats
    assert stats.prefix_hits > 5 and stats.prefix_hit_tokens > 50 * stats.prefix_hits
    assert simulation.num_checked_behind_prefixes > 10 and simulation.preemptions > 5


class Asked:
    """One request after another, each alone."""

    def __init__(self, model, granularity: str = "layer", **options) -> None:
        self.simulation = Conversations(model, granularity, 0, **dict(chunk=32, prefill_interval=8) | options)

    def __call__(self, prompt: list[int], extra_args=None, max_tokens: int = 4, **request) -> int:
        """How many tokens of the prompt were not read again."""
        stats, scheduler = self.simulation.scheduler.compression_stats, self.simulation.scheduler
        before = stats.prefix_hit_tokens
        self.simulation.ask(prompt, extra_args, max_tokens, **request)
        self.simulation.finish()
        self.simulation.audit()
        assert not scheduler.block_manager._standings
        return stats.prefix_hit_tokens - before


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(num_tokens)]


@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_a_longer_prompt_starts_at_the_end_of_the_last_one(granularity, tiny_model):
    ask = Asked(tiny_model, granularity)
    prompt = prompt_of(333)
    assert ask(prompt[:301]) == 0
    assert ask(prompt) == 300  # whole pages
    assert ask(prompt) == 332
    assert ask(prompt[:301]) == 300


@pytest.mark.parametrize("num_tokens", [20, 21, 22, 23])
def test_pages_that_an_answer_fills_one_by_one_are_found(num_tokens, tiny_model):
    """Of a sequence that was never cut, as with plain vLLM."""
    simulation = Asked(tiny_model).simulation
    simulation.ask(prompt_of(9), max_tokens=num_tokens)
    simulation.finish()
    history = simulation.worker.ended[-1]
    simulation.ask([*history, *prompt_of(5, seed=1)], max_tokens=4)
    simulation.step()
    (new,) = simulation.in_flight[-1][0].scheduled_new_reqs
    computed = 9 + num_tokens - 1  # the last token was not
    assert new.num_computed_tokens == computed // BLOCK * BLOCK


def test_a_prompt_that_begins_alike_starts_at_a_cut_that_was_kept(tiny_model):
    """Cuts are at multiples of 8, the first at 80; every ninth stays, for 72 tokens are held behind each. Behind one
    are three more pages up to the next."""
    ask = Asked(tiny_model)
    prompt = prompt_of(333)
    assert ask(prompt) == 0
    assert ask([*prompt[:270], *prompt_of(40, seed=1)]) == 80 + 2 * 72 + 6
    assert ask([*prompt[:151], *prompt_of(40, seed=2)]) == 86
    assert ask([*prompt[:79], *prompt_of(40, seed=3)]) == 0


def test_limits_salts_and_prompts_share_nothing_with_others(tiny_model):
    ask = Asked(tiny_model)
    prompt = prompt_of(87)
    assert ask(prompt) == 0
    assert ask(prompt, {"kv_budget": 46}) == 0
    assert ask(prompt, {"kv_budget": 0.5}) == 0
    assert ask([*prompt, 7], {"kv_budget": 0.5}) == 86  # the same half, rounded up
    assert ask(prompt[:-3], {"kv_budget": 0.5}) == 0
    assert ask(prompt, cache_salt="one") == 0
    assert ask(prompt, cache_salt="two") == 0
    assert ask(prompt, cache_salt="two") == 86
    assert ask(prompt) == 86
    assert ask([prompt[0] + 1, *prompt[1:]]) == 0


def test_nothing_is_found_after_a_reset_or_where_it_may_not_be_read(tiny_model):
    ask = Asked(tiny_model)
    prompt = prompt_of(301)
    assert ask(prompt) == 0 and ask(prompt) == 300
    assert ask.simulation.scheduler.reset_prefix_cache()
    assert ask(prompt) == 0


@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_what_a_preempted_prompt_did_not_compute_is_not_found(granularity, tiny_model):
    """It is cut in the plan of a step, and preempted before that step is sent."""
    ask = Asked(tiny_model, granularity)
    simulation, prompt = ask.simulation, prompt_of(301)
    scheduler = simulation.scheduler
    name = simulation.ask(prompt, max_tokens=4)
    while scheduler.requests[name].num_computed_tokens < 160:
        simulation.step()
    plan_compaction = scheduler._plan_compaction

    def plan_and_preempt():
        plan = plan_compaction()
        if plan.compactions:
            scheduler._preempt_lowest_priority()
            scheduler._plan_compaction = plan_compaction
        return plan

    scheduler._plan_compaction = plan_and_preempt
    simulation.finish()
    assert scheduler._plan_compaction == plan_compaction and simulation.preemptions == 1
    assert ask(prompt) == 300


@pytest.mark.parametrize("position", [512, 1152], ids=["before-any-cut", "behind-a-prefix"])
@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_what_a_request_preempted_in_its_own_step_did_not_compute_is_not_found(granularity, position, tiny_model):
    """Under priority scheduling vLLM preempts requests for others that come after them in the same step."""
    simulation = Conversations(tiny_model, granularity, 0, chunk=640, prefill_interval=640, policy="priority")
    scheduler, pages = simulation.scheduler, simulation.scheduler.kv_cache_manager
    urgent = simulation.ask(prompt_of(9, seed=1), max_tokens=40, priority=0)
    simulation.step()
    name = simulation.ask(prompt_of(1400), max_tokens=4, priority=1)
    allocate_slots = pages.allocate_slots
    while scheduler.requests[name].num_computed_tokens < position:
        simulation.step()

    def find_no_page(request, *args, **kwargs):
        if request.request_id == urgent:
            pages.allocate_slots = allocate_slots
            return None
        return allocate_slots(request, *args, **kwargs)

    pages.allocate_slots = find_no_page
    scheduler.running.reverse()
    simulation.step()
    assert pages.allocate_slots == allocate_slots and simulation.preemptions == 1
    simulation.finish()
    simulation.audit_ended()
    assert simulation.num_checked > 50


def test_pages_behind_a_cut_are_those_of_one_sequence(tiny_model):
    """Two prompts begin alike and are read at once. The pages that the longer one fills behind the last cut of the
    shorter one follow its own pages of that cut, which are not in the prefix cache."""
    ask = Asked(tiny_model)
    prompt = prompt_of(333)
    for num_tokens in (243, 333):
        ask.simulation.ask(prompt[:num_tokens])
    ask.simulation.finish()
    assert ask(prompt[:248]) == 242


@pytest.mark.parametrize("max_tokens", [1, 4])
@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_a_prompt_leaves_its_own_pages_where_those_of_another_are_gone(granularity, max_tokens, tiny_model):
    """Two prompts begin alike and are read at once. The longer one is cut first, and its pages of the cut that is the
    last of the shorter one leave the prefix cache before that ends."""
    ask = Asked(tiny_model, granularity)
    simulation, prompt = ask.simulation, prompt_of(333)
    scheduler, pages = simulation.scheduler, simulation.scheduler.block_manager
    longer, shorter = (
        simulation.ask(prompt[:num_tokens], max_tokens=tokens) for num_tokens, tokens in ((333, 4), (243, max_tokens))
    )
    while scheduler.requests[shorter].num_computed_tokens < 243:
        simulation.step()
    last = pages._standings[shorter]
    assert last.cut == 240 and not last.is_own
    request = scheduler.requests[longer]
    scheduler.kv_cache_manager.block_pool.evict_blocks(
        {block.block_id for block in pages.prefixes._pages(request, pages.limits[longer], last.cut)}
    )
    simulation.finish()
    simulation.audit()
    assert ask(prompt[:248]) >= 242


def test_a_prompt_leaves_its_own_pages_where_those_of_another_leave_first(tiny_model):
    """Two prompts begin alike and are read at once. The last cut of the shorter one is one of those that the longer one
    keeps pages of while there is room."""
    ask, prompt = Asked(tiny_model), prompt_of(333)
    for num_tokens in (333, 230):
        ask.simulation.ask(prompt[:num_tokens])
    ask.simulation.finish()
    ask.simulation.audit()
    for seed in range(1, 5):
        assert ask(prompt_of(400, seed=seed)) == 0
    assert ask([*prompt[:230], 7, 8]) == 230


def test_what_comes_in_the_place_of_a_prefix_leaves_others_alone(tiny_model):
    """Behind both cuts of a prompt stand some of the same pages. Those of the first one leave the cache in part, and
    another prompt's come in their place."""
    ask = Asked(tiny_model)
    simulation, prompt = ask.simulation, prompt_of(95)
    pages, pool = simulation.scheduler.block_manager, simulation.scheduler.kv_cache_manager.block_pool
    assert ask(prompt) == 0
    name = simulation.ask([*prompt[:85], *prompt_of(9, seed=1)])
    found = pages.prefixes.find(simulation.scheduler.requests[name], pages.limits[name], 81)
    assert found.cut == 80
    pool.evict_blocks({found.blocks[5].block_id})
    simulation.finish()
    assert ask(prompt) == 94


def test_memory_goes_to_prefixes_only_while_nobody_needs_it(tiny_model):
    """A cache that requests fill leaves no prefix behind, and no request waits for one."""
    ask = Asked(tiny_model)
    prompt = prompt_of(301)
    assert ask(prompt) == 0
    for seed in range(1, 12):
        ask(prompt_of(700, seed=seed), {"kv_budget": 0}, max_tokens=1)
    assert ask(prompt) == 0


@pytest.mark.parametrize("prefix", ["exact", "resume"])
def test_conversations_find_where_they_ended_in_a_cache_of_half_of_what_plain_vllm_needs(prefix, tiny_model):
    """What prompts gave up at earlier cuts makes room for it. The next turn of each comes when all others have had
    theirs."""
    ask, histories = Asked(tiny_model, prefix=prefix), [prompt_of(300, seed=seed) for seed in range(12)]
    assert len(histories) * 300 > 2 * NUM_BLOCKS * BLOCK
    for turn in range(2):
        for number, history in enumerate(histories):
            found = ask(history, max_tokens=20)
            assert found == 0 if turn == 0 else found >= len(history) - 50
            histories[number] = [*ask.simulation.worker.ended[-1], *prompt_of(7, seed=turn)]


def test_what_two_have_found_stays_as_long_as_what_prompts_end_with(tiny_model):
    ask, shared = Asked(tiny_model), prompt_of(81)
    for seed in range(2):
        assert ask([*shared, *prompt_of(300, seed=seed)]) == (0 if seed == 0 else 80)
    for seed in range(2, 9):  # which have more pages than there are
        assert ask([*shared, *prompt_of(300, seed=seed)]) == 80, seed


def test_keys_are_of_all_tokens_where_hashes_are_of_half_pages(tiny_model):
    """As with several groups and --prefix-match-unit."""
    ask = Asked(tiny_model)
    prefixes = ask.simulation.scheduler.block_manager.prefixes
    prefixes._pool.hash_block_size = BLOCK // 2
    hasher = get_request_block_hasher(BLOCK // 2, sha256)
    requests = [
        Request(f"{end}", [*prompt_of(end), *prompt_of(100, seed=end)], SamplingParams(), None, block_hasher=hasher)
        for end in (40, 80, 120)
    ]
    hashes = [prefixes._hash_of_tokens(request, 80) for request in requests]
    assert hashes[0] != hashes[1] == hashes[2]


WHOLE_PROMPTS = {"prefill": "full", "chunk": None, "prefill_interval": None}
SMALL_WINDOW = {"budget": 45, "window": 2}


@pytest.mark.parametrize(
    "options, block",
    [({}, BLOCK), (WHOLE_PROMPTS, BLOCK), (SMALL_WINDOW, 8)],
    ids=["chunked", "full", "small-window"],
)
@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_a_session_goes_on_from_what_it_held(granularity, options, block, tiny_model, monkeypatch):
    """All of it: what is behind its last whole page are the last tokens, which are read again."""
    for module in (test_bookkeeping, sys.modules[__name__]):
        monkeypatch.setattr(module, "BLOCK", block)
    simulation = Asked(tiny_model, granularity, prefix="resume", **options).simulation
    worker, scheduler = simulation.worker, simulation.scheduler
    stats, tokens, held, start = scheduler.compression_stats, [], (), 0
    num_cut_in_last_page = 0
    for turn, num_tokens in enumerate((150, 30, 1, 200)):
        prompt, before = tokens + prompt_of(num_tokens, seed=turn), stats.prefix_hit_tokens
        name = simulation.ask(prompt, max_tokens=41)
        limits = scheduler.block_manager.limits[name]
        made, computed = {}, start
        while name in scheduler.requests:
            simulation.step()
            if name in worker.pages:
                newest = range(computed, worker.computed[name])
                entries, computed = worker.entries(name), worker.computed[name]
                made |= zip(newest, entries[len(entries) - len(newest) :], strict=True)
                cut = worker.cuts.get(name, 0)
        simulation.finish()
        assert stats.prefix_hit_tokens - before == start and stats.resumed_requests == turn
        tokens = worker.ended[-1]
        seen = [*tokens[:computed], *([None] if cut == computed else [])]  # for a token that was not to come
        expected = cold(seen, len(prompt), limits, worker.moves, held, start)
        assert sorted(entries) == sorted(expected) and computed == len(tokens) - 1
        start = computed // BLOCK * BLOCK
        num_held = len(entries) - (computed - start)
        held = tuple(entries[:num_held])
        assert entries[num_held:] == [made[position] for position in range(start, computed)]
        num_cut_in_last_page += start < cut
    assert num_cut_in_last_page or options != SMALL_WINDOW
    simulation.audit()
    simulation.audit_ended()


def test_no_session_goes_on_from_an_end_that_was_cut_beyond_its_last_token(tiny_model, monkeypatch):
    """It is aborted while the step that computes that token is in flight, and is to be cut for the next one."""
    monkeypatch.setattr(test_bookkeeping, "IN_FLIGHT", 3)
    simulation = Asked(tiny_model, prefix="resume").simulation
    scheduler, worker = simulation.scheduler, simulation.worker
    name = simulation.ask(prompt_of(150), max_tokens=100)
    request = scheduler.requests[name]
    while worker.cuts.get(name, 0) < max(160, request.num_tokens):
        simulation.step()
        assert name in scheduler.requests
    scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    simulation.ended += 1
    assert not scheduler.block_manager.prefixes.num_ends
    simulation.finish()
    simulation.audit_ended()


def test_a_session_is_found_by_its_tokens_limits_and_salt_and_only_where_it_is_asked_for(tiny_model):
    for prefix in ("exact", "resume"):
        ask, prompt = Asked(tiny_model, prefix=prefix), prompt_of(101)
        assert ask(prompt, max_tokens=61) == 0
        (history,) = ask.simulation.worker.ended
        follow_up = [*history, *prompt_of(7, seed=1)]
        assert ask(follow_up, {"kv_budget": 46}) == 0
        assert ask(follow_up, cache_salt="one") == 0
        assert ask([*prompt, 7, *history[102:]]) == 100  # another answer
        assert ask([*history[:150], 7]) == 100  # not all of the answer
        assert ask(follow_up) == {"exact": 150, "resume": 160}[prefix]
        assert ask([*history, 7, 8]) == {"exact": 158, "resume": 160}[prefix]
        assert ask.simulation.scheduler.compression_stats.resumed_requests == {"exact": 0, "resume": 2}[prefix]


def test_pages_from_before_any_cut_are_preferred_to_an_end_behind_fewer_tokens(tiny_model):
    """Another budget left them there."""
    ask, prompt = Asked(tiny_model, prefix="resume", chunk=400), prompt_of(51)
    assert ask(prompt, max_tokens=61) == 0
    (history,) = ask.simulation.worker.ended
    longer = [*history, *prompt_of(150, seed=1)]
    assert ask(longer, {"kv_budget": 0}) == 0
    ask.simulation.ask([*longer, 7, 8])
    ask.simulation.step()
    ((output, _),) = ask.simulation.in_flight
    (new,) = output.scheduled_new_reqs
    assert new.num_computed_tokens == len(longer) // BLOCK * BLOCK
    ask.simulation.finish()
    assert ask.simulation.scheduler.compression_stats.resumed_requests == 0


@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_what_a_session_held_is_not_written_by_those_that_go_on_from_it(granularity, tiny_model):
    simulation = Conversations(tiny_model, granularity, 4, chunk=32, prefill_interval=8, prefix="resume")
    scheduler, rng = simulation.scheduler, simulation.rng
    simulation.budgets = [None, {"kv_budget": 32}]
    for number in range(600):
        while len(scheduler.requests) < 8:
            simulation.add(max_tokens=rng.randint(1, 30))
        if rng.random() < 0.02:
            scheduler.finish_requests(rng.choice(list(scheduler.requests)), RequestStatus.FINISHED_ABORTED)
            simulation.ended += 1
        simulation.step()
        if number % 200 == 199:
            simulation.audit()
    simulation.finish()
    simulation.audit_ended()
    assert scheduler.compression_stats.resumed_requests > 5 and not simulation.preemptions
