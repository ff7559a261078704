"""Memory beside the cache: what vLLM's profile does not see is set aside."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec
from vllm.v1.worker.gpu_worker import Worker

from vllm_qfilters.config import KVCompressionConfig
from vllm_qfilters.core.spec import QFiltersSpec
from vllm_qfilters.policy import resolve
from vllm_qfilters.worker.gpu_worker import QFiltersGPUWorker
from vllm_qfilters.worker.runner_v2 import QFiltersGPUModelRunner

GIB = 1 << 30
NUM_PAGES = 20_000


SHAPES = {"8B": (32, 32), "14B": (40, 40), "32B": (64, 64)}  # layers, query heads: Llama-3.1-8B, Qwen3-14B, Qwen3-32B


def make_runner(model: str = "8B", **options) -> QFiltersGPUModelRunner:
    """A runner of a model of this size that has not allocated anything."""
    num_layers, num_heads = SHAPES[model]
    spec = dict(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, max_resident_tokens=4096)
    layer = SimpleNamespace(num_heads=num_heads, num_kv_heads=8, head_size=128)
    runner = object.__new__(QFiltersGPUModelRunner)
    runner.compression = resolve(KVCompressionConfig(**options))
    runner.compilation_config = SimpleNamespace(
        static_forward_context=dict.fromkeys(map(str, range(num_layers)), layer)
    )
    runner.scheduler_config = SimpleNamespace(max_num_seqs=256)
    runner.model_config = SimpleNamespace(max_model_len=32_768, dtype=torch.bfloat16)
    runner.device = torch.device("meta")
    runner.get_kv_cache_spec = lambda: dict.fromkeys(map(str, range(num_layers)), QFiltersSpec(**spec))
    return runner


def cache_bytes(runner: QFiltersGPUModelRunner) -> int:
    return NUM_PAGES * sum(spec.page_size_bytes for spec in runner.get_kv_cache_spec().values())


@pytest.mark.parametrize("model, took", [("8B", 8 * GIB), ("14B", 12.5 * GIB), ("32B", 32 * GIB)])
def test_observed_queries_take_nothing_of_the_device(model, took):
    """They did take as much for 1,024 sequences: what compaction takes is less than a thirty-second of it."""
    runner, without = make_runner(model), make_runner(model, observed=0)
    runner.scheduler_config.max_num_seqs = without.scheduler_config.max_num_seqs = 1024
    size = cache_bytes(runner)
    assert runner.compaction_bytes(size) == without.compaction_bytes(size) < min(128 << 20, took / 32)


def test_observed_queries_are_given_up_at_the_first_cut(engines):
    engine = engines.get(budget=128, window=32, sinks=4, interval=32, chunk=128, num_blocks=64)
    engine.generate([[7] * 100], max_tokens=200)
    assert not engine.runner.recorder._sequences


@pytest.mark.parametrize(
    "options, mebibytes",
    [
        # As many layers as fit into 96 MiB, and the numbers of pages: 2 bytes per token of the cache.
        ({}, 96.6),
        (dict(observed=0), 96.6),
        (dict(filter="static"), 96.6),
        (dict(granularity="page"), 0),
    ],
    ids=str,
)
def test_what_compaction_takes_of_an_8b_model(options, mebibytes):
    runner = make_runner(**options)
    assert runner.compaction_bytes(cache_bytes(runner)) / 2**20 == pytest.approx(mebibytes, abs=0.05)


@pytest.mark.parametrize("max_budget", [None, "unlimited"])
def test_a_longer_sequence_takes_no_more(max_budget):
    runner = make_runner(max_budget=max_budget)
    usual = runner.compaction_bytes(cache_bytes(runner))
    runner.model_config.max_model_len = 1 << 20  # more than the cache holds
    assert runner.compaction_bytes(cache_bytes(runner)) == usual


def test_heads_of_layers_that_share_a_cache_are_reckoned_together():
    shared, wide = make_runner(), make_runner()
    sharing = dict(num_heads=32, num_kv_heads=8, head_size=128, kv_sharing_target_layer_name="31")
    shared.compilation_config.static_forward_context["32"] = SimpleNamespace(**sharing)
    wide.compilation_config.static_forward_context["31"] = SimpleNamespace(num_heads=64, num_kv_heads=8, head_size=128)
    size = cache_bytes(shared) // 1000  # of which all layers are cut at once
    assert shared.compaction_bytes(size) == wide.compaction_bytes(size) > make_runner().compaction_bytes(size)


def test_states_and_windows_beside_what_is_compressed_take_nothing_of_it():
    runner, usual = make_runner(), make_runner().get_kv_cache_spec()
    state = MambaSpec(
        block_size=16, shapes=((2, 64),), dtypes=(torch.float32,), mamba_type=MambaAttentionBackendEnum.SHORT_CONV
    )
    window = SlidingWindowSpec(block_size=16, num_kv_heads=16, head_size=256, dtype=torch.bfloat16, sliding_window=512)
    runner.get_kv_cache_spec = lambda: {"state": state, **usual, "window": window}
    size = cache_bytes(make_runner()) // 100
    assert runner.compaction_bytes(size) == make_runner().compaction_bytes(size)


@pytest.mark.parametrize("is_fixed", [False, True], ids=["profiled", "kv_cache_memory_bytes"])
def test_the_worker_sets_it_aside_where_vllm_profiles(is_fixed, monkeypatch):
    calls = []

    def profile(worker):
        calls.append("profile")
        worker.peak_activation_memory, worker.available_kv_cache_memory_bytes = GIB, 9 * GIB
        return 9 * GIB

    monkeypatch.setattr(Worker, "determine_available_memory", profile)
    worker = object.__new__(QFiltersGPUWorker)
    worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=9 * GIB if is_fixed else None)
    worker.model_runner = SimpleNamespace(compaction_bytes=lambda available: available // 9)
    assert worker.determine_available_memory() == (9 if is_fixed else 8) * GIB
    assert calls == ["profile"]
    assert worker.peak_activation_memory + worker.available_kv_cache_memory_bytes == 10 * GIB
