"""How a model makes attention of logits: query heads that differ between layers, sinks, soft caps.

The reference against what they mean, and the C++ operators against the reference; tests/test_triton.py has the others.
"""

from types import SimpleNamespace

import pytest
import torch

from tests.test_csrc import make_statistics, needs_library
from tests.test_layout import Geometry, make_cache
from vllm_qfilters.kernels import cpp, reference
from vllm_qfilters.kernels.ops import Softmax, in_groups_of
from vllm_qfilters.worker.softmax import softmax_of

GEOMETRY = Geometry(num_layers=2, num_blocks=16, block_size=16, head_size=16, dtype=torch.float32)
GROUP, NUM_TOKENS, PAGES = 3, 75, torch.arange(5)
SINKS = torch.linspace(-2, 3, 2 * 2 * GROUP).view(2, 2 * GROUP)
KINDS = {
    "heads differ": Softmax(group_sizes=torch.tensor([2, 3])),
    "sinks": Softmax(sinks=SINKS),
    "capped": Softmax(soft_cap=1.5),
    "all": Softmax(soft_cap=1.5, sinks=SINKS, group_sizes=torch.tensor([3, 1])),
}


def attention(functions, softmax: Softmax, group: int = GROUP, rank: int = 3) -> list[torch.Tensor]:
    """Expected; mean and peak of what is observed."""
    _, cache = make_cache(GEOMETRY)
    means, factors = make_statistics(2, 2 * group, rank, 16)
    queries = torch.randn(2, 2 * group, 8, 16, generator=torch.Generator().manual_seed(0)) / 2
    expected = functions.expected_attention(cache, PAGES, NUM_TOKENS, means, factors, softmax)
    return [expected, *functions.observed_attention(cache, PAGES, NUM_TOKENS, queries, 3, 7, (6, 12), softmax)]


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_csrc_matches_reference(kind):
    for found, expected in zip(attention(cpp, KINDS[kind]), attention(reference, KINDS[kind]), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_heads_behind_those_of_a_layer_do_not_count():
    """Whatever stands there: a model with that many heads in every layer scores the same."""
    _, cache = make_cache(GEOMETRY)
    means, factors = make_statistics(2, 2 * GROUP, 3, 16)
    softmax = Softmax(sinks=SINKS, group_sizes=torch.tensor([2, 2]))
    found = reference.expected_attention(cache, PAGES, NUM_TOKENS, means, factors, softmax)

    def cut(heads: torch.Tensor) -> torch.Tensor:
        return heads.unflatten(1, (2, GROUP))[:, :, :2].flatten(1, 2).contiguous()

    alone = reference.expected_attention(cache, PAGES, NUM_TOKENS, cut(means), cut(factors), Softmax(sinks=cut(SINKS)))
    torch.testing.assert_close(found, alone)


def test_a_sink_takes_its_share_of_the_attention():
    """As another key would that is nobody's token."""
    logits = torch.randn(2, GROUP, 7, generator=torch.Generator().manual_seed(0))
    found = reference.softmax_beside_sinks(logits, Softmax(sinks=SINKS), layer=1)
    others = logits.exp()
    torch.testing.assert_close(found, others / (others.sum(-1, keepdim=True) + SINKS[1].view(2, GROUP, 1).exp()))


def test_the_expectation_of_capped_logits():
    """Exact where there is no variance, and near what integration gives; beyond the cap it would rise without end."""
    cap, points = 50.0, torch.linspace(-12, 12, 4001, dtype=torch.float64)
    weights = (-points.square() / 2).softmax(0)
    for mean in (-30.0, -5.0, 0.0, 10.0, 30.0):
        for variance in (0.0, 1.0, 9.0, 25.0):
            logits = cap * ((mean + variance**0.5 * points) / cap).tanh()
            exact = (weights.log() + logits).logsumexp(0)
            found = reference.expected_logits(torch.tensor(mean), torch.tensor(variance), cap)
            assert abs(float(found) - float(exact)) <= (1e-4 if variance == 0 else 0.2)


def test_padding_stands_behind_the_heads_of_each_kv_head():
    heads = torch.arange(1.0, 5.0).view(1, 4)
    assert in_groups_of(3, heads, num_kv_heads=2, dim=1).tolist() == [[1, 2, 0, 3, 4, 0]]
    assert in_groups_of(2, heads, num_kv_heads=2, dim=1) is heads


@needs_library
@pytest.mark.parametrize(
    "softmax, message",
    [
        (Softmax(group_sizes=torch.tensor([4, 1])), "between 1 and 3"),
        (Softmax(group_sizes=torch.tensor([1])), "for 2 layers"),
        (Softmax(sinks=SINKS[:1]), "for 2 layers and 6 query heads"),
    ],
)
def test_csrc_refuses(softmax, message):
    with pytest.raises(RuntimeError, match=message):
        attention(cpp, softmax)


def layer_of(num_heads: int, scale: float = 0.125, soft_cap: float | None = None, sinks=None) -> SimpleNamespace:
    impl = SimpleNamespace(scale=scale, logits_soft_cap=soft_cap, sinks=sinks)
    return SimpleNamespace(num_heads=num_heads, num_kv_heads=2, impl=impl, layer_name=f"layer of {num_heads}")


def test_the_softmax_of_layers_that_differ():
    """Sinks stand where their query heads do."""
    sinks = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    softmax = softmax_of([[layer_of(2, sinks=sinks)], [layer_of(4)]], torch.device("cpu"))
    assert (softmax.scale, softmax.soft_cap, softmax.group_sizes.tolist()) == (0.125, 0.0, [1, 2])
    assert softmax.sinks[0, [0, 2]].tolist() == [1, 2] and bool((softmax.sinks[1] == float("-inf")).all())
    softmax = softmax_of([[layer_of(2)], [layer_of(2, sinks=sinks), layer_of(2, sinks=sinks + 2)]], torch.device("cpu"))
    assert softmax.group_sizes.tolist() == [1, 2] and softmax.sinks[1].tolist() == [1, 3, 2, 4]
    softmax = softmax_of([[layer_of(4, soft_cap=50.0)]] * 2, torch.device("cpu"))
    assert softmax == Softmax(0.125, 50.0)


@pytest.mark.parametrize("other", [layer_of(4, scale=0.5), layer_of(4, soft_cap=30.0)])
def test_layers_that_scale_or_cap_differently_are_refused(other):
    with pytest.raises(ValueError, match="one scale and one soft cap .* layer of 4 has .* layer of 2 .*knorm"):
        softmax_of([[layer_of(2)], [other]], torch.device("cpu"))
