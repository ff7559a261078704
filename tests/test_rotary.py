"""RoPE as a linear map, against vLLM's own rotary embeddings."""

import dataclasses
import importlib
import pkgutil

import pytest
import torch
import vllm
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_qfilters.filters.bank import FilterBank, query_factors
from vllm_qfilters.filters.calibrate import MOST_SPREAD
from vllm_qfilters.filters.format import HORIZON, Filters
from vllm_qfilters.filters.rotary import RotaryTable, Rotation
from vllm_qfilters.filters.statistics import LayerStatistics, QuerySpread
from vllm_qfilters.kernels import by_sequence
from vllm_qfilters.worker.runner import _rotary_tables

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
SECTIONS = [16, 8, 8]

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
    "linear": ({**DEFAULT, "rope_type": "linear", "factor": 4.0}, True, torch.float32),
    "ntk": ({**DEFAULT, "rope_type": "ntk", "factor": 4.0}, True, torch.float32),
    "dynamic": ({**DEFAULT, "rope_type": "dynamic", "factor": 4.0}, True, torch.float32),
    "dynamic-alpha": ({**DEFAULT, "rope_type": "dynamic", "alpha": 100.0}, True, torch.float32),
    "proportional": ({**DEFAULT, "rope_type": "proportional", "partial_rotary_factor": 0.5}, True, torch.float32),
    "mrope": ({**DEFAULT, "mrope_section": SECTIONS}, True, torch.float32),
    "mrope-interleaved": ({**DEFAULT, "mrope_section": SECTIONS, "mrope_interleaved": True}, True, torch.float32),
    "mrope-yarn": ({**YARN, "mrope_section": SECTIONS}, True, torch.float32),
    "mrope-bailing": ({**DEFAULT, "rope_type": "bailing_mrope", "mrope_section": SECTIONS}, True, torch.float32),
}
FOPE = dict(use_fope=True, num_key_value_heads=3, num_inv_freq=16, fope_sep_head=True, fope_init_factor=0.1)
REFUSED = {"FourierRotaryEmbedding", "DualChunkRotaryEmbedding"}
ELSEWHERE = {
    "Phi3LongRoPEScaledRotaryEmbedding": "tests/test_architectures.py calibrates a model with it",
    "Ernie4_5_VLRotaryEmbedding": "that of M-RoPE, but for the order of what images turn by",
    "MRotaryEmbeddingInterleaved": "that of M-RoPE, but for the order of what images turn by",
    "DeepseekScalingRotaryEmbedding": "of models with MLA",
    "DeepseekV4ScalingRotaryEmbedding": "of models with MLA",
    "Llama4VisionRotaryEmbedding": "of encoders of images",
    **({"VitMropeSetup": "of encoders of images"} if vllm.__version_tuple__ >= (0, 33) else {}),
    "ApplyRotaryEmb": "no embedding",
    "RotaryEmbeddingBase": "the others derive from it",
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
    torch.testing.assert_close(Rotation(rope, HEAD_SIZE).unrotate(after, positions), before, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("case", ["neox-partial", "interleaved-partial"])
def test_elements_beyond_a_partial_rotation_stay_as_they_are(case, before, positions):
    rope = make_rope(case)
    assert rope.rotary_dim < HEAD_SIZE
    assert torch.equal(
        Rotation(rope, HEAD_SIZE).unrotate(before, positions)[..., rope.rotary_dim :], before[..., rope.rotary_dim :]
    )


@pytest.mark.parametrize(("case", "is_scaled"), [("neox", False), ("yarn", True), ("neox-bf16-table", True)])
def test_the_tables_of_these_cases_scale_queries_or_not(case, is_scaled):
    """YaRN scales by design, a rounded table by a little: the test above covers both."""
    cos, sin = make_rope(case).cos_sin_cache.to(torch.float32).chunk(2, dim=-1)
    assert bool((cos.square() + sin.square() - 1).abs().max() > 1e-3) == is_scaled


def test_position_zero_is_not_rotated(before):
    unrotated = Rotation(make_rope("neox"), HEAD_SIZE).unrotate(before, torch.zeros(NUM_TOKENS, dtype=torch.int64))
    assert torch.equal(unrotated, before)


def test_a_bf16_query_is_unrotated_in_float32(before, positions):
    rope = make_rope("neox")
    after = rotate(rope, positions, before).to(torch.bfloat16)
    found = Rotation(rope, HEAD_SIZE).unrotate(after, positions)
    assert found.dtype == torch.float32
    assert torch.equal(found, Rotation(rope, HEAD_SIZE).unrotate(after.to(torch.float32), positions))


def test_statistics_see_queries_before_and_after_rope_and_the_positions_of_their_step(before, positions):
    rope = make_rope("neox")
    after = rotate(rope, positions, before)
    buffer = torch.full((2 * NUM_TOKENS,), -1)
    statistics = LayerStatistics(NUM_HEADS, 1, HEAD_SIZE, Rotation(rope, HEAD_SIZE), buffer)
    key = torch.randn(NUM_TOKENS, 1, HEAD_SIZE, generator=torch.Generator().manual_seed(2))
    for start, end in ((0, 150), (150, 151), (151, NUM_TOKENS)):
        buffer[: end - start] = positions[start:end]
        statistics.observe(after[start:end], key[start:end])
    torch.testing.assert_close(statistics.query_before_rope.mean, before.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(statistics.query_after_rope.mean, after.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(statistics.key_after_rope.mean, key.mean(0), atol=1e-5, rtol=1e-5)
    second = torch.einsum("nhi,nhj->hij", before, before) / NUM_TOKENS
    torch.testing.assert_close(statistics.query_before_rope.second, second, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ROPES)
@pytest.mark.parametrize("position", [0, 1, 777])
def test_what_is_turned_to_a_position_are_the_moments_of_the_queries_from_there_on(case, position, before):
    """Mean and covariance over the coming positions, from queries rotated to each of them by vLLM."""
    rope, count = make_rope(case), 16
    rotation = Rotation(rope, HEAD_SIZE)
    second = torch.einsum("nhi,nhj->hij", before, before) / NUM_TOKENS
    mean, covariance = rotation.average(before.mean(0), second, count)
    after = torch.stack(
        [rotate(rope, torch.full((NUM_TOKENS,), position + step), before) for step in range(count)]
    ).flatten(0, 1)
    tolerance = 0.05 if "bf16" in case else 1e-4  # a rounded table does not quite compose
    torch.testing.assert_close(rotation.rotate(mean, position), after.mean(0), atol=tolerance, rtol=0)
    centred = after - after.mean(0)
    expected = torch.einsum("nhi,nhj->hij", centred, centred) / centred.shape[0]
    turned = rotation.rotate(rotation.rotate(covariance, position).mT, position)
    torch.testing.assert_close(turned, expected, atol=tolerance, rtol=0)


def test_without_rope_nothing_turns(before):
    rotation = Rotation(None, HEAD_SIZE)
    assert torch.equal(rotation.rotate(before, 5), before)
    assert torch.equal(rotation.unrotate(before, torch.arange(NUM_TOKENS)), before)


ALL_HEADS = [slice(0, NUM_HEADS)] * 2  # of two layers


def statistics_of(queries: torch.Tensor) -> Filters:
    """queries: shape ``[num_tokens, num_layers, num_heads, head_size]``."""
    second = torch.einsum("nlhi,nlhj->lhij", queries, queries) / queries.shape[0]
    filters = torch.zeros(queries.shape[1], 1, HEAD_SIZE)
    return Filters(filters, query_mean_before_rope=queries.mean(0), query_second_before_rope=second)


def test_a_bank_of_full_rank_has_the_covariance_of_its_heads_scaled(before):
    queries = torch.stack((before, 2 * before + 1), 1)
    rotation = Rotation(make_rope("neox"), HEAD_SIZE)
    filters = statistics_of(queries)
    bank = FilterBank(filters, [rotation, Rotation(None, HEAD_SIZE)], ALL_HEADS, 1, HEAD_SIZE, scale=0.125)
    turns = bank.turns(torch.tensor([100]))
    means, factors = by_sequence.turned(bank.means, turns, 0), by_sequence.turned(bank.factors, turns, 0)
    mean, covariance = rotation.average(filters.query_mean_before_rope[0], filters.query_second_before_rope[0], HORIZON)
    torch.testing.assert_close(means[0], 0.125 * rotation.rotate(mean, 100), atol=1e-5, rtol=1e-5)
    turned = rotation.rotate(rotation.rotate(covariance, 100).mT, 100) / 64
    torch.testing.assert_close(factors[0].mT @ factors[0], turned, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(means[1], 0.125 * filters.query_mean_before_rope[1])


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_bank_of_low_rank_has_the_directions_of_the_largest_variance(rank, before):
    filters = statistics_of(before.unsqueeze(1))
    heads = [slice(0, NUM_HEADS)]
    whole = FilterBank(filters, [Rotation(None, HEAD_SIZE)], heads, 1, HEAD_SIZE, scale=1.0)
    bank = FilterBank(filters, [Rotation(None, HEAD_SIZE)], heads, 1, rank, scale=1.0)
    assert bank.factors.shape == (1, NUM_HEADS, rank, HEAD_SIZE)
    lengths = whole.factors.norm(dim=-1)
    assert torch.equal(bank.factors, whole.factors[:, :, HEAD_SIZE - rank :])
    assert bool((lengths.diff() >= -1e-4).all())


@pytest.mark.parametrize("rank", [1, 5, HEAD_SIZE])
def test_a_bank_of_factors_is_that_of_the_moments_they_were_made_of(rank, before):
    """No eigenvector is looked for where they are stored."""
    rotations = [Rotation(make_rope("yarn"), HEAD_SIZE), Rotation(None, HEAD_SIZE)]
    of_moments = statistics_of(torch.stack((before, 2 * before + 1), 1))
    mean, second = of_moments.query_mean_before_rope, of_moments.query_second_before_rope
    factors = query_factors(mean, second, rotations, max(rank, 8))
    of_factors = dataclasses.replace(of_moments, query_factors=factors, query_second_before_rope=None)
    expected = FilterBank(of_moments, rotations, ALL_HEADS, 1, rank, scale=0.125)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", None)
        found = FilterBank(of_factors, rotations, ALL_HEADS, 1, rank, scale=0.125)
    assert torch.equal(found.means, expected.means) and torch.equal(found.factors, expected.factors)


def test_a_bank_without_statistics_is_refused_saying_what_to_do():
    with pytest.raises(ValueError, match="vllm-qfilters calibrate"):
        FilterBank(Filters(torch.zeros(1, 1, HEAD_SIZE)), [Rotation(None, HEAD_SIZE)], [slice(0, 1)], 1, 0, 1.0)


@pytest.mark.parametrize("case", ROPES)
def test_the_spread_of_equal_queries_tells_their_rotation(case):
    """Of the last of them, in chunks of any size: before, queries of models with attention sinks differ."""
    rope, none, num_tokens = make_rope(case), Rotation(None, HEAD_SIZE), 70
    query = torch.randn(1, NUM_HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(0)).repeat(num_tokens, 1, 1)
    query[: -QuerySpread.NUM_QUERIES] += torch.randn(
        1, NUM_HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(1)
    )
    buffer = torch.zeros(100, dtype=torch.int64)
    for turned in (rotate(rope, torch.arange(num_tokens), query), query):
        spread = QuerySpread((Rotation(rope, HEAD_SIZE), none), buffer)
        for start, end in ((0, 50), (50, 61), (61, num_tokens)):
            buffer[: end - start] = torch.arange(start, end)
            spread.observe(turned[start:end], turned[start:end])
        by_rope, by_none = spread.relative().tolist()
        right, wrong = (by_none, by_rope) if turned is query else (by_rope, by_none)
        assert right < MOST_SPREAD / 10 and wrong > 2 * MOST_SPREAD


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("rope", [DEFAULT, LLAMA3, YARN], ids=lambda rope: rope["rope_type"])
def test_tables_of_transformers_are_those_of_vllm(rope, is_neox_style):
    config = LlamaConfig(
        head_dim=HEAD_SIZE,
        num_attention_heads=1,
        hidden_size=HEAD_SIZE,
        max_position_embeddings=MAX_POSITION,
        rope_parameters=rope,
    )
    with set_current_vllm_config(VllmConfig()):
        expected = get_rope(HEAD_SIZE, MAX_POSITION, is_neox_style, dict(rope), torch.float32)
    found = RotaryTable.both_styles(LlamaRotaryEmbedding(config), num_positions=300)[0 if is_neox_style else 1]
    assert (found.rotary_dim, found.is_neox_style) == (expected.rotary_dim, expected.is_neox_style)
    torch.testing.assert_close(found.cos_sin_cache, expected.cos_sin_cache[:300], atol=1e-5, rtol=0)


def test_embeddings_whose_table_depends_on_the_length_have_none():
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    config = LlamaConfig(head_dim=HEAD_SIZE, num_attention_heads=1, hidden_size=HEAD_SIZE, rope_parameters=rope)
    assert RotaryTable.both_styles(LlamaRotaryEmbedding(config), num_positions=300) == []


def test_every_rotary_embedding_of_vllm_is_one_whose_rotation_is_known_or_refused():
    modules = [
        importlib.import_module(f"{rotary_embedding.__name__}.{module.name}")
        for module in pkgutil.iter_modules(rotary_embedding.__path__)
    ]
    classes = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, torch.nn.Module) and value.__module__ == module.__name__
    }
    known = {type(make_rope(case)).__name__ for case in ROPES}
    assert classes == known | REFUSED | ELSEWHERE.keys()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_rotation_that_is_no_table_of_positions_is_refused(name):
    with set_current_vllm_config(VllmConfig()):
        if name == "FourierRotaryEmbedding":
            rope = get_rope(HEAD_SIZE, MAX_POSITION, True, {**DEFAULT, **FOPE}, torch.float32)
        else:  # it is made on a GPU alone
            rope = rotary_embedding.DualChunkRotaryEmbedding.__new__(rotary_embedding.DualChunkRotaryEmbedding)
            torch.nn.Module.__init__(rope)
    assert type(rope).__name__ == name
    with pytest.raises(ValueError, match=f"for {name} of a.layer.*choose a method without filters"):
        _rotary_tables(rope, "a.layer", MAX_POSITION)
