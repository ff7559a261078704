"""Taking RoPE off queries again, against vLLM's own rotary embeddings."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_qfilters.filters.rotary import unrotate
from vllm_qfilters.filters.statistics import LayerStatistics

HEAD_SIZE, NUM_HEADS, NUM_TOKENS, MAX_POSITION = 64, 3, 200, 4096

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=512,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=1024)
DEFAULT = dict(rope_type="default", rope_theta=10000.0)

ROPES = {
    # id: (rotary parameters, neox style, dtype of the table)
    "neox": (DEFAULT, True, torch.float32),
    "interleaved": (DEFAULT, False, torch.float32),
    "neox-partial": ({**DEFAULT, "partial_rotary_factor": 0.5}, True, torch.float32),
    "interleaved-partial": ({**DEFAULT, "partial_rotary_factor": 0.25}, False, torch.float32),
    "llama3": (LLAMA3, True, torch.float32),
    "yarn": (YARN, True, torch.float32),
    "yarn-partial-interleaved": ({**YARN, "partial_rotary_factor": 0.5}, False, torch.float32),
    "neox-bf16-table": (DEFAULT, True, torch.bfloat16),
}


def make_rope(case: str):
    parameters, is_neox_style, dtype = ROPES[case]
    with set_current_vllm_config(VllmConfig()):
        return get_rope(HEAD_SIZE, MAX_POSITION, is_neox_style, dict(parameters), dtype)


@pytest.fixture
def before():
    return torch.randn(NUM_TOKENS, NUM_HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def positions():
    """In no order, some twice, both ends among them."""
    positions = torch.randint(MAX_POSITION, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    positions[:3] = torch.tensor([MAX_POSITION - 1, 0, MAX_POSITION - 1])
    return positions


def rotate(rope, positions: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    flat = query.flatten(1)
    rotated, _ = rope.forward_native(positions, flat.clone(), flat.clone())
    return rotated.view_as(query)


@pytest.mark.parametrize("case", ROPES)
def test_unrotate_inverts_vllms_rotary_embedding(case, before, positions):
    rope = make_rope(case)
    after = rotate(rope, positions, before)
    assert (after - before).abs().max() > 1
    torch.testing.assert_close(unrotate(after, positions, rope), before, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("case", ["neox-partial", "interleaved-partial"])
def test_elements_beyond_a_partial_rotation_stay_as_they_are(case, before, positions):
    rope = make_rope(case)
    assert rope.rotary_dim < HEAD_SIZE
    assert torch.equal(unrotate(before, positions, rope)[..., rope.rotary_dim :], before[..., rope.rotary_dim :])


@pytest.mark.parametrize(("case", "is_scaled"), [("neox", False), ("yarn", True), ("neox-bf16-table", True)])
def test_the_tables_of_these_cases_scale_queries_or_not(case, is_scaled):
    """YaRN scales by design, a rounded table by a little: the test above covers both."""
    cos, sin = make_rope(case).cos_sin_cache.to(torch.float32).chunk(2, dim=-1)
    assert bool((cos.square() + sin.square() - 1).abs().max() > 1e-3) == is_scaled


def test_position_zero_is_not_rotated(before):
    unrotated = unrotate(before, torch.zeros(NUM_TOKENS, dtype=torch.int64), make_rope("neox"))
    assert torch.equal(unrotated, before)


def test_a_bf16_query_is_unrotated_in_float32(before, positions):
    rope = make_rope("neox")
    after = rotate(rope, positions, before).to(torch.bfloat16)
    found = unrotate(after, positions, rope)
    assert found.dtype == torch.float32
    assert torch.equal(found, unrotate(after.to(torch.float32), positions, rope))


def test_statistics_see_queries_before_and_after_rope_and_the_positions_of_their_step(before, positions):
    rope = make_rope("neox")
    after = rotate(rope, positions, before)
    buffer = torch.full((2 * NUM_TOKENS,), -1)
    statistics = LayerStatistics(NUM_HEADS, 1, HEAD_SIZE, rope, buffer)
    key = torch.randn(NUM_TOKENS, 1, HEAD_SIZE, generator=torch.Generator().manual_seed(2))
    for start, end in ((0, 150), (150, 151), (151, NUM_TOKENS)):
        buffer[: end - start] = positions[start:end]
        statistics.observe(after[start:end], key[start:end])
    torch.testing.assert_close(statistics.query_before_rope.mean, before.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(statistics.query_after_rope.mean, after.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(statistics.key_after_rope.mean, key.mean(0), atol=1e-5, rtol=1e-5)
    second = torch.einsum("nhi,nhj->hij", before, before) / NUM_TOKENS
    torch.testing.assert_close(statistics.query_before_rope.second, second, atol=1e-5, rtol=1e-5)
