"""The last queries of prompts, whatever steps their tokens come in."""

import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.attention.attention import set_default_quant_scales

from vllm_qfilters.attention.queries import QueryRecorder
from vllm_qfilters.attention.watched import WatchedAttention, dequantised
from vllm_qfilters.filters.statistics import JoinedLayers

NUM_LAYERS, NUM_QUERIES, HEADS, SIZE = 2, 5, 3, 4


CPU = torch.device("cpu")


def make_recorder(follows_decoding: bool = False) -> QueryRecorder:
    return QueryRecorder(NUM_LAYERS, NUM_QUERIES, HEADS, SIZE, torch.float32, CPU, follows_decoding)


def query_of(req_id: str, position: int, layer: int) -> torch.Tensor:
    return torch.full((HEADS, SIZE), float(1000 * int(req_id) + 10 * position + layer))


def run_step(recorder: QueryRecorder, tokens: dict[str, int], computed: dict[str, int], prompt: dict[str, int]) -> None:
    """The next ``tokens`` of some requests, and two of padding, through all layers."""
    recorder.start_step(list(tokens), list(tokens.values()), [computed[r] for r in tokens], [prompt[r] for r in tokens])
    for layer in range(NUM_LAYERS):
        rows = [query_of(r, computed[r] + i, layer) for r, count in tokens.items() for i in range(count)]
        recorder.record(layer, torch.stack([*rows, *2 * [torch.full((HEADS, SIZE), torch.nan)]]))
    for req_id, count in tokens.items():
        computed[req_id] += count


def assert_last_queries(recorder: QueryRecorder, req_id: str, end: int, num_prompt: int) -> None:
    found = recorder.get(req_id)
    assert (found.end, found.num_prompt_tokens) == (end, num_prompt)
    positions = range(max(0, end - NUM_QUERIES), end)
    expected = [
        torch.stack([query_of(req_id, position, layer) for position in positions]) for layer in range(NUM_LAYERS)
    ]
    assert found.queries.shape == (NUM_LAYERS, HEADS, len(positions), SIZE)
    assert torch.equal(found.queries.to(CPU), torch.stack(expected).transpose(1, 2))


def test_the_last_queries_of_prompts_are_kept_in_whatever_steps_they_come():
    rng, recorder = random.Random(0), make_recorder()
    prompt = {str(r): rng.randint(1, 40) for r in range(12)}
    computed = dict.fromkeys(prompt, 0)
    for _ in range(60):
        tokens = {r: rng.choice([1, 2, 3, 7, 12]) for r in rng.sample(sorted(prompt), 4)}
        tokens = {
            r: min(count, prompt[r] - computed[r]) if computed[r] < prompt[r] else 1 for r, count in tokens.items()
        }
        run_step(recorder, tokens, computed, prompt)
        for req_id in tokens:
            assert_last_queries(recorder, req_id, min(computed[req_id], prompt[req_id]), prompt[req_id])
    assert all(computed[r] >= prompt[r] for r in prompt)


def test_what_was_kept_before_a_step_that_was_not_seen_is_dropped():
    """A replayed CUDA graph shows no queries: those before and after it do not lie side by side."""
    recorder, computed, prompt = make_recorder(), {"1": 0}, {"1": 20}
    run_step(recorder, {"1": 4}, computed, prompt)
    recorder.skip_step()
    computed["1"] += 1
    run_step(recorder, {"1": 3}, computed, prompt)
    found = recorder.get("1")
    assert found.end == 8 and found.queries.shape == (NUM_LAYERS, HEADS, 3, SIZE)


def test_queries_of_layers_that_share_a_cache_are_kept_as_of_one_layer():
    """Those of each KV head side by side; a layer that shares nothing is filled up with zeros."""
    recorder = QueryRecorder(2, NUM_QUERIES, 8, SIZE, torch.float32, CPU, num_kv_heads=2, num_attending=[1, 2])
    recorder.start_step(["1"], [1], [0], [9])
    for layer, first in ((0, 0), (1, 10), (1, 20)):
        heads = torch.arange(first, first + 4, dtype=torch.float32)
        recorder.record(layer, heads[None, :, None].expand(1, 4, SIZE))
    kept = recorder.get("1").queries.to(CPU)[:, :, 0, 0]
    assert kept.tolist() == [[0, 1, 0, 0, 2, 3, 0, 0], [10, 11, 20, 21, 12, 13, 22, 23]]


def test_queries_are_joined_before_a_compiled_model_writes_to_their_memory_again():
    seen = []
    joined = JoinedLayers(SimpleNamespace(observe=lambda query, key: seen.append((query, key))), 2, num_kv_heads=2)
    query, key = torch.arange(4.0).view(1, 4, 1), torch.ones(1, 2, 1)
    joined.observe(query, key)
    assert not seen
    query += 10
    key += 10
    joined.observe(query, None)
    ((found, keys),) = seen
    assert found.flatten().tolist() == [0, 1, 10, 11, 2, 3, 12, 13] and keys.flatten().tolist() == [1, 1]


def test_a_layer_that_has_written_its_keys_past_its_backend_is_refused():
    class Backend(WatchedAttention, SimpleNamespace):
        pass

    layer = SimpleNamespace(layer_name="model.layers.0.attn", kv_sharing_target_layer_name=None)
    with pytest.raises(ValueError, match="write keys past their attention backend, as model.layers.0.attn does"):
        Backend().forward(layer, torch.ones(1, 4, 1), None, None, torch.empty(0), None)


@pytest.mark.parametrize("scales", [(0.5,), (0.5, 4.0)], ids=["per tensor", "per KV head"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_queries_that_vllm_has_quantised_are_kept_as_the_model_made_them(dtype, scales):
    recorder = QueryRecorder(1, NUM_QUERIES, 4, SIZE, torch.bfloat16, CPU)
    recorder.start_step(["1"], [3], [0], [9])
    values = torch.arange(3 * 4 * SIZE).remainder(7).view(3, 4, SIZE)  # fp8 holds them exactly
    layer = torch.nn.Module()
    set_default_quant_scales(layer, register_buffer=True)
    layer._q_scale = torch.tensor(scales)  # a buffer of that name
    recorder.record(0, values.to(dtype), partial(dequantised, layer))
    assert "_q_scale" in dict(layer.named_buffers())
    expected = values * torch.tensor(scales).repeat_interleave(4 // len(scales)).unsqueeze(-1)
    assert torch.equal(recorder.get("1").queries.to(CPU)[0].transpose(0, 1), expected.to(torch.bfloat16))
    as_made = values.to(torch.bfloat16)
    assert dequantised(layer, as_made) is as_made


def test_nothing_is_kept_of_requests_that_end_start_again_or_will_not_evict():
    recorder, prompt = make_recorder(), {"1": 9, "2": 9, "3": 9}
    recorder.ignore("2")
    run_step(recorder, {"1": 7, "2": 7, "3": 7}, dict.fromkeys(prompt, 0), prompt)
    recorder.forget(["3"])
    assert recorder.get("2") is None and recorder.get("3") is None
    run_step(recorder, {"3": 2}, {"3": 0}, prompt)
    assert_last_queries(recorder, "1", 7, 9)
    assert_last_queries(recorder, "3", 2, 9)
    recorder.forget(["1", "2", "3"])
    run_step(recorder, {"2": 3}, {"2": 0}, prompt)  # another one of that name
    assert_last_queries(recorder, "2", 3, 9)
    recorder.forget(["2"])
    assert not recorder._sequences and not recorder._ignored


def test_a_skipped_step_leaves_what_was_kept():
    recorder, prompt, computed = make_recorder(), {"1": 9}, {"1": 0}
    run_step(recorder, {"1": 7}, computed, prompt)
    recorder.skip_step()
    for layer in range(NUM_LAYERS):
        recorder.record(layer, torch.full((4, HEADS, SIZE), torch.nan))
    assert_last_queries(recorder, "1", 7, 9)


def test_those_from_a_position_on():
    recorder, prompt, computed = make_recorder(), {"1": 40}, {"1": 0}
    for count in (3, 2, 2):
        run_step(recorder, {"1": count}, computed, prompt)
    found = recorder.get("1", first_position=4)
    assert found.queries.shape[2] == 3
    assert torch.equal(found.queries.to(CPU), recorder.get("1").queries.to(CPU)[:, :, -3:])


def test_generated_tokens_are_followed_in_one_block_per_step():
    recorder, prompt, computed = make_recorder(follows_decoding=True), {"1": 9, "2": 2, "3": 1}, dict.fromkeys("123", 0)
    run_step(recorder, prompt, computed, prompt)
    for _ in range(2 * NUM_QUERIES):
        run_step(recorder, dict.fromkeys("123", 1), computed, prompt)
        assert len(recorder._blocks) == 1
        for req_id in "123":
            assert_last_queries(recorder, req_id, computed[req_id], prompt[req_id])


def test_what_the_queries_of_a_sequence_take():
    recorder = QueryRecorder(36, 32, 32, 128, torch.bfloat16, CPU)
    assert recorder.sequence_bytes == 16 << 20, "9 MiB come as 16"
