"""Paged caches as vLLM lays them out on GPUs, and sequences scattered over them. Needs PyTorch alone."""

import dataclasses
import random
import weakref
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_qfilters.kernels.batch import CompactionBatch
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.plan import RequestCompaction

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
LAYOUTS = ("LBNHC", "LBHNC", "BLNHC", "BLHNC")  # L layers, B blocks, N tokens, H heads, C content


class ForbiddenReads(TorchFunctionMode):
    """Where it is entered, code may not read tensors on the host: on a GPU it would wait for it."""

    READS = frozenset({
        "item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique",
        "equal", "allclose", "is_nonzero",
        "__bool__", "__int__", "__float__", "__index__", "__iter__", "__contains__",
    })  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in self.READS, f"{name} waits for the device"
        if name in ("__getitem__", "__setitem__"):
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            is_mask = [isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices]
            assert not any(is_mask), "a mask as an index waits for the device"
        return func(*args, **(kwargs or {}))


class PeakMemory(TorchDispatchMode):
    """Watches tensors that are made where it is entered: ``bytes`` is the most that was alive of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._alive = 0
        self._holders: Counter[int] = Counter()  # by address of what they hold: tensors
        self._older: set[int] = set()  # addresses of what was there before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self._older |= {address(tensor) for tensor in given} - set(self._holders)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and address(tensor) not in self._older:
                self._watch(tensor)
        return made

    def _watch(self, tensor: torch.Tensor) -> None:
        at, size = address(tensor), tensor.untyped_storage().nbytes()
        if not self._holders[at]:
            self._alive += size
            self.bytes = max(self.bytes, self._alive)
        self._holders[at] += 1
        weakref.finalize(tensor, self._let_go, at, size)

    def _let_go(self, at: int, size: int) -> None:
        self._holders[at] -= 1
        if not self._holders[at]:
            del self._holders[at]
            self._alive -= size


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclasses.dataclass(frozen=True)
class Geometry:
    num_layers: int = 2
    num_blocks: int = 8
    num_kv_heads: int = 2
    block_size: int = 16
    head_size: int = 8
    dtype: torch.dtype = torch.float32
    layout: str = "LBHNC"
    num_planes: int = 2
    value_size: int | None = None  # elements; None: as many as of a key

    @property
    def content(self) -> int:
        return self.head_size + (self.head_size if self.value_size is None else self.value_size)

    @property
    def page_bytes(self) -> int:
        return self.num_kv_heads * self.block_size * (self.content * self.dtype.itemsize + 4 * self.num_planes)

    @property
    def cache_bytes(self) -> int:
        return self.num_layers * self.num_blocks * self.page_bytes


def make_cache(
    geometry: Geometry, seed: int = 0, device: torch.device = DEVICE
) -> tuple[torch.Tensor, list[torch.Tensor], StridedCache]:
    """A cache as vLLM lays it out: its bytes, the views of its layers, and our view of it. Full of small integers."""
    generator = torch.Generator().manual_seed(seed)
    # No pattern of such bytes is NaN in any dtype, so that equality means the same bits.
    buffer = torch.randint(1, 60, (geometry.cache_bytes,), generator=generator, dtype=torch.uint8).to(device)
    views = layer_views(buffer, geometry)
    cache = StridedCache(views, geometry.num_planes, value_size=geometry.value_size)
    cache.planes.copy_(torch.randn(cache.planes.shape, generator=generator))
    return buffer, views, cache


def layer_views(buffer: torch.Tensor, geometry: Geometry) -> list[torch.Tensor]:
    """What vLLM gives to attention layers of a cache that lies in ``buffer``."""
    g = geometry
    content = g.content
    page = g.page_bytes // g.dtype.itemsize
    in_page = {"NHC": (content, g.num_kv_heads * content, 1), "HNC": (g.block_size * content, content, 1)}[g.layout[2:]]
    layer_stride, block_stride = (g.num_blocks * page, page) if g.layout[0] == "L" else (page, g.num_layers * page)
    elements = buffer.view(g.dtype)
    shape = (g.num_blocks, g.num_kv_heads, g.block_size, content)
    return [
        elements.as_strided(shape, (block_stride, *in_page), elements.storage_offset() + layer * layer_stride)
        for layer in range(g.num_layers)
    ]


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@dataclasses.dataclass(frozen=True)
class Eviction:
    """One sequence before an eviction, in tokens."""

    resident: int
    evicted: int
    sinks: int
    window: int

    @property
    def kept(self) -> int:
        return self.resident - self.evicted


def random_evictions(seed: int, bs: int = 16) -> list[Eviction]:
    numbers = random.Random(seed)
    evictions = []
    for _ in range(numbers.randint(1, 4)):
        pages = numbers.randint(1, 5)
        kept = numbers.randint(1, 8 * bs)
        sinks = numbers.randint(0, min(kept, 40))
        evictions.append(Eviction(kept + pages * bs, pages * bs, sinks, numbers.randint(0, kept - sinks)))
    return evictions


def pages_taken_out(eviction: Eviction, bs: int) -> range:
    first = (eviction.kept - eviction.window) // bs
    return range(first, first + eviction.evicted // bs)


class Sequences:
    """Sequences scattered over a cache, and the batch that evicts from them; some pages they write to are to be
    copied.
    """

    def __init__(self, evictions: list[Eviction], geometry: Geometry, seed: int, device: torch.device = DEVICE) -> None:
        numbers, bs = random.Random(seed), geometry.block_size
        lengths = [-(-eviction.resident // bs) + numbers.randint(0, 1) for eviction in evictions]
        geometry = dataclasses.replace(geometry, num_blocks=2 * sum(lengths) + 3)
        self.buffer, self.views, self.cache = make_cache(geometry, seed, device)
        free = numbers.sample(range(geometry.num_blocks), geometry.num_blocks)
        self.evictions, self.old_pages, self.new_pages, self.compactions = evictions, [], [], []
        block_table = torch.full((2 * len(evictions) + 1, max(lengths) + 2), -(2**30), dtype=torch.int32)
        for index, (eviction, length) in enumerate(zip(evictions, lengths, strict=True)):
            old = [free.pop() for _ in range(length)]
            out = pages_taken_out(eviction, bs)
            written = set(range(eviction.sinks // bs, out.start))
            if (eviction.kept - eviction.window) % bs:
                written.add(out.stop)
            copies = {page: free.pop() for i, page in enumerate(old) if i in written and numbers.random() < 0.5}
            copied = [(i, copies[page]) for i, page in enumerate(old) if page in copies]
            new = [copies.get(page, page) for i, page in enumerate(old) if i not in out]
            block_table[2 * index, :length] = torch.tensor(old)
            self.compactions.append(
                RequestCompaction(
                    f"request {index}",
                    1000 + index,
                    eviction.resident,
                    eviction.evicted,
                    eviction.sinks,
                    eviction.window,
                    tuple(new),
                    tuple(copied),
                    unobserved_tokens=numbers.choice((0, 1, eviction.window, eviction.resident)),
                )
            )
            self.old_pages.append(torch.tensor(old, device=device))
            self.new_pages.append(torch.tensor(new, device=device))
        self.table_rows = [2 * index for index in range(len(evictions))]
        self.batch = CompactionBatch.make(self.compactions, self.table_rows, block_table.to(device))

    def scores_of(self, index: int) -> torch.Tensor:
        """Shape ``[num_layers, num_kv_heads, resident_tokens]``."""
        scores = self.cache.scores[:, self.old_pages[index]].permute(0, 2, 1, 3).flatten(2)
        return scores[..., : self.evictions[index].resident]


def one_sequence(
    pages: list[int], num_tokens: int, position: int = 1000, device: torch.device = CPU
) -> CompactionBatch:
    """A batch of one sequence that is looked at and loses nothing."""
    looked_at = RequestCompaction("request", position, num_tokens, 0, 0, 0, tuple(pages))
    return CompactionBatch.make([looked_at], [0], torch.tensor([pages], dtype=torch.int32, device=device))
