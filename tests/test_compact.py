"""Selecting and compacting, against loops over single tokens."""

import dataclasses
import math
import random

import pytest
import torch

from tests.paged import one_sequence
from tests.test_layout import Geometry, make_cache
from vllm_qfilters.kernels import CPU_OPS, PagedCache
from vllm_qfilters.kernels.reference import write_scores
from vllm_qfilters.methods.base import Method, Model
from vllm_qfilters.plan import RequestCompaction
from vllm_qfilters.worker.compactor import Compactor

SEEDS = range(3)
compact, select_kept = CPU_OPS.functions.compact, CPU_OPS.functions.select_kept


def make_scores(shape: tuple[int, ...], seed: int, is_tied: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if is_tied:
        return torch.randint(3, shape, generator=generator).to(torch.float32)
    scale = torch.tensor([1.0, 100.0, 0.01]).repeat(math.ceil(shape[1] / 3))[: shape[1]]
    return torch.randn(shape, generator=generator) * scale[:, None] + scale[:, None] * 3


def mean_standardised(rows: list[list[float]]) -> list[float]:
    """The mean over heads of each token's z-score within its head."""
    total = [0.0] * len(rows[0])
    for row in rows:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row))
        for token, value in enumerate(row):
            total[token] += (value - mean) / deviation if deviation else 0.0
    return [value / len(rows) for value in total]


SELECTIONS = {
    # id: (resident, kept, sinks, window)
    "middle": (100, 60, 4, 20),
    "odd": (131, 77, 7, 45),
    "one-of-the-middle": (50, 25, 4, 20),
    "all-but-one-of-the-middle": (50, 49, 4, 20),
    "no-sinks": (80, 40, 0, 16),
    "no-window": (80, 40, 5, 0),
    "nothing-protected": (80, 17, 0, 0),
    "recent-only": (100, 60, 4, 56),
    "many-sinks": (100, 90, 70, 10),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("is_tied", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("shared_by_heads", [False, True], ids=["head", "layer"])
@pytest.mark.parametrize("case", SELECTIONS)
def test_the_best_scores_are_kept_beside_sinks_and_window(case, shared_by_heads, is_tied, seed):
    resident, kept, sinks, window = SELECTIONS[case]
    scores = make_scores((2, 3, resident), seed, is_tied)
    before = scores.clone()
    is_kept = select_kept(scores, kept, sinks, window, shared_by_heads)
    assert torch.equal(scores, before)
    assert is_kept.dtype == torch.bool and is_kept.shape == scores.shape
    for layer in range(2):
        rows = scores[layer, :, sinks : resident - window].tolist()
        shared = mean_standardised(rows)
        for head in range(3):
            mask = is_kept[layer, head].tolist()
            assert sum(mask) == kept
            assert all(mask[:sinks]) and all(mask[resident - window :])
            values = shared if shared_by_heads else rows[head]
            middle = mask[sinks : resident - window]
            best = [value for value, is_in in zip(values, middle, strict=True) if is_in]
            rest = [value for value, is_in in zip(values, middle, strict=True) if not is_in]
            tolerance = 1e-5 if shared_by_heads else 0.0
            assert not best or not rest or min(best) >= max(rest) - tolerance
        if shared_by_heads:
            assert bool((is_kept[layer] == is_kept[layer, :1]).all())


@pytest.mark.parametrize("shared_by_heads", [False, True], ids=["head", "layer"])
def test_exactly_as_many_are_kept_when_all_scores_are_equal(shared_by_heads):
    is_kept = select_kept(torch.full((2, 3, 1000), 0.1), 300, 4, 100, shared_by_heads)
    assert bool((is_kept.sum(-1) == 300).all())


def test_a_head_with_equal_scores_has_no_say_in_a_shared_selection():
    scores = torch.full((1, 2, 100), 0.3)
    scores[0, 1] = torch.randn(100, generator=torch.Generator().manual_seed(0))
    alone = select_kept(scores[:, 1:], 40, 4, 10, shared_by_heads=False)
    assert torch.equal(select_kept(scores, 40, 4, 10, shared_by_heads=True), alone.expand(1, 2, -1))


def test_a_shared_selection_does_not_see_the_scores_of_sinks_and_window():
    scores = make_scores((2, 3, 100), seed=0, is_tied=False)
    expected = select_kept(scores, 60, 4, 20, shared_by_heads=True)
    scores[..., :4], scores[..., -20:] = 1e6, -1e6
    assert torch.equal(select_kept(scores, 60, 4, 20, shared_by_heads=True), expected)


@dataclasses.dataclass(frozen=True)
class Eviction:
    """One sequence before an eviction, in tokens."""

    block_size: int
    resident: int
    evicted: int
    sinks: int
    window: int

    @property
    def kept(self) -> int:
        return self.resident - self.evicted

    @property
    def pages_taken_out(self) -> range:
        """By their place in the sequence: the last whole pages before the window."""
        first = (self.kept - self.window) // self.block_size
        return range(first, first + self.evicted // self.block_size)

    @property
    def pages_written(self) -> set[int]:
        """By their place in the sequence before: those with tokens that may be replaced, and not taken out."""
        pages = {token // self.block_size for token in range(self.sinks, self.resident - self.window)}
        return pages - set(self.pages_taken_out)


EVICTIONS = {
    "bs16-window-below-a-page": Eviction(16, resident=100, evicted=32, sinks=4, window=9),
    "bs16-window-above-a-page": Eviction(16, resident=150, evicted=48, sinks=5, window=37),
    "bs32-window-below-a-page": Eviction(32, resident=230, evicted=96, sinks=3, window=21),
    "bs32-window-above-a-page": Eviction(32, resident=200, evicted=64, sinks=7, window=45),
    "bs16-survivors-fill-whole-pages": Eviction(16, resident=96, evicted=32, sinks=4, window=32),
    "bs16-no-sinks": Eviction(16, resident=85, evicted=16, sinks=0, window=33),
    "bs32-no-window": Eviction(32, resident=160, evicted=64, sinks=4, window=0),
    "bs16-sinks-above-a-page": Eviction(16, resident=160, evicted=48, sinks=21, window=30),
    "bs32-sinks-above-a-page": Eviction(32, resident=250, evicted=96, sinks=40, window=50),
    "bs16-sinks-of-whole-pages": Eviction(16, resident=130, evicted=32, sinks=32, window=27),
    "bs16-recent-only": Eviction(16, resident=130, evicted=32, sinks=4, window=94),
    "bs32-recent-only-sinks-above-a-page": Eviction(32, resident=230, evicted=64, sinks=40, window=126),
    "bs16-recent-only-no-sinks": Eviction(16, resident=75, evicted=16, sinks=0, window=59),
    "bs16-few-survivors-before-the-window": Eviction(16, resident=100, evicted=32, sinks=4, window=60),
    "bs32-few-survivors-before-the-window": Eviction(32, resident=160, evicted=64, sinks=40, window=42),
}


def random_eviction(seed: int) -> Eviction:
    numbers = random.Random(seed)
    block_size = numbers.choice((16, 32))
    sinks, window = numbers.randrange(0, 50), numbers.randrange(0, 80)
    evicted = block_size * numbers.randint(1, 4)
    return Eviction(block_size, sinks + window + evicted + numbers.randrange(0, 100), evicted, sinks, window)


SEQUENCES = {f"{name}-seed{seed}": (eviction, seed) for name, eviction in EVICTIONS.items() for seed in SEEDS}
SEQUENCES |= {f"random-seed{seed}": (random_eviction(seed), seed) for seed in range(50)}


class Sequence:
    """A sequence in a cache of random numbers, and what an eviction made of it.

    Every layer and head keeps other tokens; some pages the eviction writes to are replaced by private copies.
    """

    def __init__(self, eviction: Eviction, seed: int) -> None:
        numbers = random.Random(seed)
        bs = eviction.block_size
        num_pages = math.ceil(eviction.resident / bs) + numbers.randint(
            0, 1
        )  # one more where the next token's page is there
        geometry = Geometry(num_layers=2, num_blocks=2 * num_pages + 3, num_kv_heads=2, block_size=bs)
        self.buffer, self.cache = make_cache(geometry, seed)
        pages = numbers.sample(range(geometry.num_blocks), geometry.num_blocks)
        self.old_pages, free = pages[:num_pages], pages[num_pages:]
        replaced = {i for i in eviction.pages_written if numbers.random() < 0.5}
        self.new_pages = [
            free.pop() if i in replaced else page
            for i, page in enumerate(self.old_pages)
            if i not in eviction.pages_taken_out
        ]
        scores = make_scores((2, 2, eviction.resident), seed, is_tied=False)
        self.is_kept = select_kept(scores, eviction.kept, eviction.sinks, eviction.window, shared_by_heads=False)

        self.eviction = eviction
        self.page_bytes_before = self.page_bytes()
        self.before = triples(self.cache, self.old_pages, eviction.resident)
        compact(
            self.cache,
            torch.tensor(self.old_pages),
            torch.tensor(self.new_pages),
            self.is_kept,
            eviction.window,
        )
        self.after = triples(self.cache, self.new_pages, eviction.kept)

    def page_bytes(self) -> torch.Tensor:
        return self.buffer.view(self.cache.num_layers, self.cache.num_blocks, -1).clone()

    def heads(self) -> list[tuple[int, int]]:
        return [(layer, head) for layer in range(self.cache.num_layers) for head in range(self.cache.num_kv_heads)]


Triples = dict[tuple[int, int], list[tuple[bytes, bytes, bytes]]]


def triples(cache: PagedCache, pages: list[int], num_tokens: int) -> Triples:
    """The bytes of (key, value, planes) of each token of a sequence, by (layer, head)."""
    page = torch.tensor(pages).repeat_interleave(cache.block_size)[:num_tokens]
    slot = torch.arange(cache.block_size).repeat(len(pages))[:num_tokens]
    found = {}
    for layer in range(cache.num_layers):
        for head in range(cache.num_kv_heads):
            elements = cache.pages[layer, page, head]
            keys, values = elements.gather(1, cache.layout.keys[slot]), elements.gather(1, cache.layout.values[slot])
            numbers = cache.planes[layer, page, :, head, slot]
            rows = zip(keys.numpy(), values.numpy(), numbers.numpy(), strict=True)
            found[layer, head] = [tuple(part.tobytes() for part in row) for row in rows]
    return found


@pytest.fixture(scope="module", params=SEQUENCES)
def sequence(request):
    return Sequence(*SEQUENCES[request.param])


def test_survivors_stay_in_order_with_their_values_and_scores(sequence):
    for layer, head in sequence.heads():
        mask = sequence.is_kept[layer, head].tolist()
        survivors = [triple for triple, is_kept in zip(sequence.before[layer, head], mask, strict=True) if is_kept]
        assert sequence.after[layer, head] == survivors


def test_all_other_pages_stay_as_they_were(sequence):
    """Other sequences', the ones taken out, the ones copied from, and the ones of sinks and window alone."""
    eviction = sequence.eviction
    written = [sequence.old_pages[i] for i in eviction.pages_written if sequence.old_pages[i] in sequence.new_pages]
    copies = set(sequence.new_pages) - set(sequence.old_pages)
    others = [page for page in range(sequence.cache.num_blocks) if page not in written and page not in copies]
    assert set(sequence.old_pages) - set(sequence.new_pages) <= set(others)
    assert torch.equal(sequence.page_bytes()[:, others], sequence.page_bytes_before[:, others])


@pytest.mark.parametrize("granularity", ["head", "layer", "layer, ranks"])
def test_the_compactor_goes_by_the_scores_stored_beside_the_keys(granularity):
    """Other ranks, where there are any, think the opposite, and are more."""
    shared_by_heads, mean_over_ranks = granularity != "head", torch.neg if "ranks" in granularity else torch.clone
    _, cache = make_cache(Geometry(num_layers=2, num_blocks=12, num_kv_heads=3, block_size=16))
    old_pages, new_block_ids, resident, kept, sinks, window = [7, 2, 9, 4, 11, 0], (7, 5, 11, 0), 90, 58, 4, 21
    method = Method(Model(cache, CPU_OPS))
    before = triples(cache, old_pages, resident)
    scores = torch.tensor(
        [
            [
                [cache.scores[layer, old_pages[token // 16], head, token % 16] for token in range(resident)]
                for head in range(3)
            ]
            for layer in range(2)
        ]
    )
    batch = one_sequence(old_pages, resident)
    assert torch.equal(method.scores(batch, [None]).view(2, 3, -1), scores)
    is_kept = select_kept(scores if mean_over_ranks is torch.clone else -scores, kept, sinks, window, shared_by_heads)
    row = RequestCompaction("a", resident, resident, resident - kept, sinks, window, new_block_ids)
    copied = tuple(
        (i, new) for i, (old, new) in enumerate(zip((7, 2, 11, 0), new_block_ids, strict=True)) if old != new
    )
    row = dataclasses.replace(row, copied_pages=copied)
    Compactor(method, 3, shared_by_heads, mean_over_ranks).apply([row], [0], batch.block_table, [None])
    for (layer, head), rows in triples(cache, list(new_block_ids), kept).items():
        survivors = [row for token, row in enumerate(before[layer, head]) if is_kept[layer, head, token]]
        assert rows == survivors


@pytest.mark.parametrize("padding", [(), (0,), (2, 5, 9)], ids=["none", "first", "several"])
def test_scores_are_written_to_the_slots_of_their_tokens_alone(padding):
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(5, 2, 16, generator=generator)
    slots = torch.randperm(80, generator=generator)[:10]
    slots[list(padding)] = -1
    scores = torch.randn(13, 2, generator=generator)  # three more than there are slots
    expected = plane.clone()
    for token, slot in enumerate(slots.tolist()):
        for head in range(2):
            if slot >= 0:
                expected[slot // 16, head, slot % 16] = scores[token, head]
    write_scores(scores, plane, slots)
    assert torch.equal(plane, expected)
