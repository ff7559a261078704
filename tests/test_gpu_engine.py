"""The GPU path from the scheduler to the kernels, on a CPU: model runner V2 and TRITON_ATTN under Triton's interpreter.

Pipeline stages are processes that send to one another with gloo in place of NCCL.
"""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import states
from tests.engines import Engines, tokens_and_logprobs
from tests.interpreted_runs import (
    BATCHES,
    CALIBRATION,
    CROWD,
    EVICTING,
    EVICTING_LATENTS,
    LIKE_HUGGING_FACE,
    METHODS,
    NARROW,
    ONE,
    ONE_WITHOUT_TIES,
    PAGES,
    SESSION,
    SHARED_PREFIX,
    SHARING,
    STATIC,
    TURNS,
    InterpretedRuns,
    prompt_after,
)
from tests.models import HEAD_SIZE, NUM_KV_HEADS, NUM_LAYERS, SLIDING_WINDOW, tiny_identity
from tests.oracle import teacher_forced_logprobs
from tests.test_oracle import make_rule
from tests.test_size import cells, run
from vllm_qfilters.filters.format import Filters
from vllm_qfilters.filters.reader import load

NOT_COUNTED = ("lagkv", "cur", "keydiff")


@pytest.fixture(scope="module")
def interpreted_runs(request, tmp_path_factory):
    filters = {"model": "tiny_filters"}
    filters |= {name: f"{name}_filters" for name in ("exaone", "gemma3n", "lfm2", "mimo", "qwen_vl", "deepseek")}
    models = {
        name: (request.getfixturevalue(f"tiny_{name}"), request.getfixturevalue(of_name)[0])
        for name, of_name in filters.items()
    }
    return InterpretedRuns(tmp_path_factory.mktemp("calibrated"), models)


@pytest.fixture(scope="module")
def runs(interpreted_runs):
    results = interpreted_runs.results()
    stages = {name: len(result["v2_stages"]) for name, result in results.items()}
    assert stages == {**dict.fromkeys(results, 1), "two stages": 2}
    assert all(all(result["v2_stages"]) for result in results.values())
    return results


@pytest.fixture(scope="module")
def calibrated(interpreted_runs):
    return interpreted_runs.calibrated


def test_budget_above_length_is_bit_identical_to_plain_vllm(runs):
    plain, compressed = runs["plain"], runs["budget above length"]
    assert compressed["outputs"] == plain["outputs"]
    assert compressed["compactions"] == 0


def test_serving_launches_nothing_that_was_not_warmed_up(runs):
    """Of engines whose workers are in the process that looks, not of pipelines."""
    seen = {name: run for name, run in runs.items() if "compactions" in run and len(run["v2_stages"]) == 1}
    assert {name: run["not_warmed_up"] for name, run in seen.items()} == {name: [] for name in seen}
    assert all(run["launches"] >= 1 for run in seen.values())


def test_no_compaction_takes_more_memory_than_is_set_aside(runs):
    """Of a cache of the engine's size, whatever is in it: layers that share caches, states, latents. What some methods
    for comparison take is not counted (:func:`vllm_qfilters.worker.compactor.layer_bytes`)."""
    seen = {name: run for name, run in runs.items() if run.get("compactions_took") and name not in NOT_COUNTED}
    assert {"evicting", "gemma3n", "lfm2", "mimo", "evicting, mla", "snapkv", "tova"} <= seen.keys()
    took = {name: (max(run["compactions_took"]), run["compaction_bytes"]) for name, run in seen.items()}
    assert all(0 < most <= set_aside for most, set_aside in took.values()), took


def test_capturing_leaves_nothing_behind(runs):
    """What vLLM runs to capture CUDA graphs, with lengths of its own; the runs compare caches."""
    captures = {name: result["captures"] for name, result in runs.items() if "captures" in result}
    assert {"evicting", "pages", "gemma3n", "lfm2", "mimo", "evicting, mla"} <= captures.keys()
    assert set(captures.values()) == {2}


# What decoding launches of ours: slots and resident lengths take the one launch that slots take anyway. vLLM itself
# writes keys and values, one launch per layer.
STEP = {"_slots_and_lengths_kernel": 1}
# What a cut launches for all layers together: scores are the attention expected of each token, mixed with what was
# observed of those that a query has looked at, times the norm of its value; by their mean over a layer's heads tokens
# stay, and some move.
CUT = {
    "_score_resident_kernel": 1,
    "_softmax_terms_kernel": 1,
    "_mean_softmax_kernel": 1,
    "_forget_kernel": 1,
    "_gather_scores_kernel": 1,
    "_value_norms_kernel": 1,
    "_head_moments_kernel": 1,
    "_mean_standardised_kernel": 1,
    "_select_kept_kernel": 1,
    "_find_sources_kernel": 1,
    "_move_kernel": 1,
}
# The first one after a prompt observes its last queries, of up to OBSERVATIONS_AT_ONCE prompts at once, and writes to
# copies of pages that the prefix cache holds.
FIRST_CUT = {
    "_observed_terms_kernel": 1,
    "_observed_attention_kernel": 1,
    "_pool_kernel": 1,
    "_copy_pages_kernel": 1,
}


def decoding(result: dict, cut: int) -> list[dict]:
    """Steps in which every sequence has one token, and ``cut`` of them were cut before."""
    return [step for step in result["steps"] if set(step["tokens"]) == {1} and step["cut"] == cut]


def launches_of_ours(step: dict) -> dict[str, int]:
    """By name of the kernel."""
    counts = step["launches"].items()
    return {name.rpartition(".")[2]: count for name, count in counts if name.startswith("vllm_qfilters.")}


def test_a_step_without_a_cut_launches_as_often_as_in_plain_vllm(runs):
    plain, compressed = decoding(runs["plain"], cut=0), decoding(runs["budget above length"], cut=0)
    assert [step["tokens"] for step in plain] == [step["tokens"] for step in compressed] == [[1, 1]] * 2 + [[1]] * 2
    launches = [sum(step["launches"].values()) for step in (*plain, *compressed)]
    assert len(set(launches)) == 1, launches
    assert all(launches_of_ours(step) == STEP for step in compressed) and sum(STEP.values()) == 1


def test_a_cut_launches_as_often_for_three_sequences_as_for_one(runs):
    result = runs["cut twice"]
    for cut in (3, 1):
        first, later = decoding(result, cut)
        assert launches_of_ours(first) == STEP | CUT | FIRST_CUT and sum((CUT | FIRST_CUT).values()) == 15
        assert launches_of_ours(later) == STEP | CUT and sum(CUT.values()) == 11
    others = decoding(result, cut=0)
    assert len(others) == 2 * 11 and all(launches_of_ours(step) == STEP for step in others)


def assert_like_v1(engine, batches, result):
    assert engine.llm.reset_prefix_cache()
    if "kept" in result:
        engine.llm.collective_rpc("record_kept_tokens")
    expected, said = [], []
    for batch in batches:
        expected += generate(engine, batch, said)
        said = [*expected[-1].prompt_token_ids, *expected[-1].outputs[0].token_ids]
    if "kept" in result:
        (rank,) = engine.llm.collective_rpc("take_kept_tokens")
        assert sorted(result["kept"]) == sorted([end, mask.hex()] for end, mask in rank["requests"].values())
    assert len(result["outputs"]) == len(expected)
    for found, output in zip(result["outputs"], expected, strict=True):
        ids, logprobs = tokens_and_logprobs(output)
        assert found["token_ids"] == ids
        torch.testing.assert_close(torch.tensor(found["logprobs"]), torch.tensor(logprobs), atol=1e-3, rtol=0)
        assert found["cached_tokens"] == output.num_cached_tokens


def generate(engine, batch, said):
    (max_tokens,) = {request["max_tokens"] for request in batch}
    return engine.generate([prompt_after(said, request) for request in batch], max_tokens=max_tokens)


def test_evicts_what_the_cpu_path_evicts(runs, engines):
    """Under async scheduling, two sequences at once, and one that begins with pages from the prefix cache."""
    result = runs["evicting"]
    assert result["async_scheduling"]
    assert result["compactions"] >= 5 and result["evicted_tokens"] >= 5 * 32 and result["freed_pages"] >= 5
    assert [output["cached_tokens"] > 0 for output in result["outputs"]] == [False, False, True]
    assert_like_v1(engines.get(num_blocks=32, max_model_len=512, max_batched=128, **EVICTING), BATCHES, result)


def test_a_preempted_sequence_starts_again_with_nothing_evicted(runs, engines):
    """With the filters of the paper, scored as keys are written; heads select for themselves."""
    result = runs["crowd"]
    assert result["preemptions"] > 0 and result["evicted_tokens"] >= 3 * 32
    assert_like_v1(engines.get(num_blocks=12, max_model_len=512, max_batched=128, **STATIC), [CROWD], result)


def test_frees_the_pages_the_cpu_path_frees(runs, engines):
    result = runs["pages"]
    assert result["evicted_tokens"] >= 3 * 32
    assert_like_v1(engines.get(num_blocks=32, max_model_len=512, max_batched=128, **PAGES), BATCHES, result)


def test_two_sequences_that_take_out_the_same_page_at_once(runs, engines):
    """What each one's queries observe there moves with its own survivors: later evictions go by it."""
    result = runs["shared prefix"]
    assert result["compactions"] >= 4 and [output["cached_tokens"] for output in result["outputs"]] == [0, 64, 64]
    assert_like_v1(engines.get(num_blocks=32, max_model_len=512, max_batched=128, **SHARING), SHARED_PREFIX, result)


def test_a_turn_starts_behind_a_compressed_prefix(runs, engines):
    result = runs["turns"]
    assert result["async_scheduling"] and [output["cached_tokens"] for output in result["outputs"]] == [0, 192]
    assert_like_v1(engines.get(num_blocks=32, max_model_len=512, max_batched=128, **EVICTING), TURNS, result)


def test_a_session_goes_on_from_what_it_held(runs, engines):
    result, options = runs["session"], dict(EVICTING, prefix="resume")
    computed = len(SESSION[0][0]["prompt"]) + 27  # the last token of an answer never is
    assert [output["cached_tokens"] for output in result["outputs"]] == [0, computed // 32 * 32]
    assert_like_v1(engines.get(num_blocks=32, max_model_len=512, max_batched=128, **options), SESSION, result)


def test_sliding_windows_and_a_layer_without_rope(runs, exaone_engines):
    result = runs["exaone"]
    assert result["compactions"] >= 5
    assert_like_v1(exaone_engines.get(num_blocks=32, max_model_len=512, max_batched=128, **EVICTING), BATCHES, result)


def test_layers_that_share_a_cache(runs, tiny_gemma3n, gemma3n_filters):
    """Gemma 3n."""
    result, engines = runs["gemma3n"], Engines(tiny_gemma3n, gemma3n_filters[0])
    assert result["compactions"] >= 2
    assert_like_v1(engines.get(num_blocks=32, max_model_len=512, max_batched=128, **EVICTING), ONE_WITHOUT_TIES, result)


def test_states_beside_attention(runs, tiny_lfm2, lfm2_filters):
    """LFM2."""
    result, engines = runs["lfm2"], Engines(tiny_lfm2, lfm2_filters[0], enable_prefix_caching=False)
    assert result["compactions"] >= 3
    with states.stood_in():
        engine = engines.get(num_blocks=32, max_model_len=512, max_batched=128, **EVICTING)
        assert_like_v1(engine, BATCHES[:1], result)


def test_values_narrower_than_keys(runs, tiny_mimo, mimo_filters):
    """MiMo-V2, like Hugging Face's: on CPUs vLLM has no attention for it. What Hugging Face's configuration makes of
    the published number is a window of one token more than vLLM's."""
    window = dict(sliding_window=SLIDING_WINDOW)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_mimo, dtype=torch.float32, attn_implementation="eager", **window
    ).eval()
    assert runs["mimo"]["compactions"] >= 2
    ((request,),) = ONE
    (output,) = runs["mimo"]["outputs"]
    expected, _ = teacher_forced_logprobs(
        model, request["prompt"], output["token_ids"], mimo_filters[1], make_rule(LIKE_HUGGING_FACE)
    )
    torch.testing.assert_close(torch.tensor(output["logprobs"]), torch.tensor(expected), atol=1e-3, rtol=0)


def test_pages_of_narrow_values_are_as_many_as_are_reckoned(runs, tiny_mimo, capsys):
    argv = ["--kv-cache-memory-bytes", NARROW["kv_cache_memory_bytes"], "--block-size", NARROW["block_size"]]
    argv += ["--max-model-len", NARROW["max_model_len"], "--max-num-batched-tokens", NARROW["max_num_batched_tokens"]]
    options = [f"--kv-compression-config.{name}={value}" for name, value in LIKE_HUGGING_FACE.items()]
    lengths = ["--budget", LIKE_HUGGING_FACE["budget"], "--length", NARROW["max_model_len"]]
    printed = run(capsys, tiny_mimo, *argv, "--dtype", "float32", *lengths, *options)
    pages, _ = cells(printed, 512, 96)
    assert pages == 3 + 2 * 3, "of two layers with a window of up to three pages"
    assert re.search(r" 512 +96 +216 KiB ", printed)
    assert runs["mimo"]["pages"] == NARROW["kv_cache_memory_bytes"] // ((216 << 10) // pages)


def test_mrope_with_prompts_of_text(runs, qwen_vl_engines):
    result = runs["qwen_vl"]
    assert result["compactions"] >= 5
    assert_like_v1(qwen_vl_engines.get(num_blocks=32, max_model_len=512, max_batched=128, **EVICTING), BATCHES, result)


def test_mla_with_a_budget_above_the_length_is_bit_identical_to_plain_vllm(runs):
    """TRITON_MLA."""
    plain, compressed = runs["plain, mla"], runs["budget above length, mla"]
    assert compressed["outputs"] == plain["outputs"] and compressed["compactions"] == 0


def test_mla_evicts_what_the_cpu_path_evicts(runs, deepseek_engines):
    result = runs["evicting, mla"]
    assert result["async_scheduling"] and result["compactions"] >= 8
    assert [output["cached_tokens"] > 0 for output in result["outputs"]] == [False, False, True, False, True]
    engine = deepseek_engines.get(num_blocks=64, max_model_len=512, max_batched=128, **EVICTING_LATENTS)
    assert_like_v1(engine, [*BATCHES, *TURNS], result)


def test_two_pipeline_stages_answer_as_one(runs):
    """One has one of the three layers, the other two. Three batches are in flight, as asynchronous scheduling wants
    it.
    """
    one, two = runs["evicting"], runs["two stages"]
    assert two["async_scheduling"]
    assert (two["compactions"], two["evicted_tokens"]) == (one["compactions"], one["evicted_tokens"])
    assert sorted(two["kept"]) == sorted(one["kept"])
    for found, expected in zip(two["outputs"], one["outputs"], strict=True):
        assert found["token_ids"] == expected["token_ids"]
        torch.testing.assert_close(
            torch.tensor(found["logprobs"]), torch.tensor(expected["logprobs"]), atol=1e-3, rtol=0
        )
        assert found["cached_tokens"] == expected["cached_tokens"]


def assert_same_filters(found: Filters, expected: Filters):
    assert found.filters.shape == (NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE)
    torch.testing.assert_close(found.filters, expected.filters, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.query_mean_before_rope, expected.query_mean_before_rope, atol=1e-3, rtol=1e-3)


def test_calibrates_what_the_cpu_path_calibrates(runs, calibrated, engines):
    engine = engines.get(num_blocks=32, max_model_len=512, max_batched=128, **EVICTING)
    assert engine.llm.reset_prefix_cache()
    expected = engine.runner.calibrate_filters(CALIBRATION, "test")
    assert_same_filters(load(calibrated[1], tiny_identity()), expected)


def test_two_pipeline_stages_calibrate_as_one(runs, calibrated):
    one, two = (load(path, tiny_identity()) for path in calibrated.values())
    assert_same_filters(two, one)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_evicts_what_it_evicts_on_cpus(method, runs, engines):
    result = runs[method]
    assert result["compactions"] >= 2
    options = dict(EVICTING, method=method)
    assert_like_v1(engines.get(num_blocks=32, max_model_len=512, max_batched=128, **options), ONE, result)
