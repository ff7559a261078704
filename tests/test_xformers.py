"""An attention written by others over caches our kernels have compacted: on a GPU, or under Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

import triton

pytest.importorskip("xformers", reason="xformers is not installed: pip install 'vllm-qfilters[xformers]'")

from tests.paged import Eviction, Geometry, Sequences, random_tensor
from tests.paged_attention import attend, attend_masked, keys_and_values, paged_bias
from vllm_qfilters.kernels.triton.compaction import compact, copy_pages
from vllm_qfilters.kernels.triton.selection import gather_scores, mean_standardised, select_kept

GROUP = 3
CASES = {
    "bs16-D32": (Geometry(num_kv_heads=2, head_size=32, dtype=torch.float16, layout="LBNHC"), 1),
    "bs64-D64": (Geometry(num_kv_heads=2, block_size=64, head_size=64, dtype=torch.float16, layout="BLHNC"), 2),
}


def evictions(bs: int) -> list[Eviction]:
    return [
        Eviction(6 * bs + 3, 2 * bs, 4, bs + 5),
        Eviction(3 * bs, bs, 2 * bs - 4, 4),
        Eviction(4 * bs + 1, 3 * bs, 0, 9),
    ]


class Compacted:
    """Sequences that lost tokens, and what each layer and head had kept of them, read before anything moved."""

    def __init__(self, geometry: Geometry, seed: int, is_shared: bool) -> None:
        self.sequences = Sequences(evictions(geometry.block_size), geometry, seed)
        cache, batch = self.sequences.cache, self.sequences.batch
        cache.key_values.copy_(random_tensor(*cache.key_values.shape, seed=seed))
        scores, selections = gather_scores(cache.scores, batch), cache.num_kv_heads
        if is_shared:
            scores, selections = mean_standardised(scores, batch, cache.num_layers, selections), 1
        is_kept = select_kept(scores, batch, cache.num_layers, selections)
        self.kept = []  # per sequence [num_layers, num_kv_heads, kept_tokens, 2 * head_size]
        for index, flags in enumerate(batch.split(is_kept, cache.num_layers, selections)):
            eviction, pages = self.sequences.evictions[index], self.sequences.old_pages[index]
            tokens = cache.key_values[:, pages].transpose(1, 2).flatten(2, 3)[:, :, : eviction.resident]
            kept = tokens[flags.bool().expand(-1, cache.num_kv_heads, -1)]
            self.kept.append(kept.view(*tokens.shape[:2], eviction.kept, -1))
        copy_pages(cache, batch)
        compact(cache, batch, is_kept, selections)


@pytest.fixture(scope="module", params=[(name, is_shared) for name in CASES for is_shared in (False, True)], ids=str)
def compacted(request):
    name, is_shared = request.param
    return Compacted(*CASES[name], is_shared)


def attend_to_kept(query: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Dense attention of a sequence's last tokens.

    Args:
        query: shape ``[num_queries, num_kv_heads, group, head_size]``.
        kept: shape ``[num_kv_heads, kept_tokens, 2 * head_size]``, in the order of positions.
    """
    key, value = kept.float().chunk(2, dim=-1)
    logits = torch.einsum("qhgd,hnd->hgqn", query.float(), key) * query.shape[-1] ** -0.5
    num_queries, num_tokens = logits.shape[-2:]
    is_future = torch.ones_like(logits, dtype=torch.bool).triu(num_tokens - num_queries + 1)
    return torch.einsum("hgqn,hnd->qhgd", logits.masked_fill(is_future, float("-inf")).softmax(-1), value)


@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize("attention", [attend, attend_masked])
def test_attention_over_a_compacted_cache_is_attention_over_the_kept_tokens(compacted, attention, num_queries):
    if attention is attend and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        pytest.skip("xformers' kernel uses block pointers, which Triton 3.9 no longer has")
    sequences, cache = compacted.sequences, compacted.sequences.cache
    lengths = [eviction.kept for eviction in sequences.evictions]
    pages = [row.tolist() for row in sequences.new_pages]
    bias = paged_bias(pages, lengths, num_queries, cache.block_size, cache.key_values.device)
    for layer in range(cache.num_layers):
        shape = (1, num_queries * len(lengths), cache.num_kv_heads, GROUP, cache.head_size)
        query = random_tensor(*shape, seed=layer, dtype=cache.key_values.dtype)
        found = attention(query, *keys_and_values(cache.key_values[layer], GROUP), bias)[0].split(num_queries)
        for part, own_query, kept in zip(found, query[0].split(num_queries), compacted.kept, strict=True):
            torch.testing.assert_close(part.float(), attend_to_kept(own_query, kept[layer]), atol=2e-3, rtol=1e-2)
