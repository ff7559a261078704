"""What the GPU path relies on in vLLM: where its caches lie, and its attention backends."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    SlidingWindowSpec,
    compute_layout_strides,
    create_kv_cache_views,
)

from tests.forks import in_forks
from vllm_qfilters.attention.scoring import ScoringAttention
from vllm_qfilters.config import KVCompressionConfig
from vllm_qfilters.core.spec import QFiltersSpec
from vllm_qfilters.kernels.layout import StridedCache
from vllm_qfilters.policy import resolve
from vllm_qfilters.worker.runner import CompressedModelRunner

NUM_LAYERS, NUM_BLOCKS = 3, 5


def allocate(
    layout: KVCacheLayout, block_size: int, dtype: torch.dtype, num_planes: int = 1
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    full = FullAttentionSpec(block_size=block_size, num_kv_heads=3, head_size=40, dtype=dtype)
    spec = QFiltersSpec.from_attention(full, block_size, max_resident_tokens=1 << 20, num_planes=num_planes)
    layer_stride, block_stride, *_ = compute_layout_strides(spec, NUM_BLOCKS, NUM_LAYERS, layout)
    buffer = torch.zeros(NUM_LAYERS * NUM_BLOCKS * spec.page_size_bytes, dtype=torch.int8)
    tensor = KVCacheTensor(len(buffer), [f"layer{i}" for i in range(NUM_LAYERS)], layer_stride, block_stride)
    return buffer, create_kv_cache_views(buffer, spec, NUM_BLOCKS, layout, tensor, kernel_block_size=block_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("block_size", [16, 64], ids="bs{}".format)
@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "BLNHC", "BLHNC"])
def test_scores_have_a_place_behind_every_page(layout, block_size, dtype):
    num_planes = block_size // 16
    buffer, views = allocate(KVCacheLayout[layout], block_size, dtype, num_planes)
    cache = StridedCache(views, num_planes)
    cache.key_values.view(torch.int8).fill_(1)
    assert int((buffer == 0).sum()) == 4 * cache.planes.numel()
    cache.planes.view(torch.int32).fill_(0x02020202)
    assert all(bool((view.view(torch.int8) == 1).all()) for view in views)
    assert bool((buffer != 0).all())


@pytest.mark.parametrize(
    "layout", sorted({layout.name for layout in KVCacheLayout} - {"LBNHC", "LBHNC", "BLNHC", "BLHNC"})
)
def test_vllm_pads_no_pages_in_layouts_that_split_them(layout):
    with pytest.raises(AssertionError, match="Page padding"):
        allocate(KVCacheLayout[layout], 16, torch.bfloat16)


class Recorder:
    kv_cache_dtype = "auto"

    def do_kv_cache_update(self, *arguments):
        self.written_by_vllm = arguments


class Scoring(ScoringAttention, Recorder):
    pass


def test_vllm_writes_until_there_is_something_to_score():
    impl, arguments = Scoring(), tuple(torch.zeros(1) for _ in range(5))
    impl.do_kv_cache_update(*arguments)
    assert impl.written_by_vllm == arguments


@pytest.mark.parametrize(
    ("name", "dtype"), [("auto", torch.uint8), ("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)]
)
def test_the_fused_write_sees_the_cache_in_its_dtype(name, dtype):
    impl, calls = Scoring(), []
    impl.kv_cache_dtype = name
    impl.write_stats = lambda **arguments: calls.append(arguments)
    layer = torch.nn.Module()
    layer._k_scale, layer._v_scale = torch.ones(1), torch.full((1,), 2.0)
    key, value, cache, slots = torch.zeros(1), torch.ones(1), torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(1)
    impl.do_kv_cache_update(layer, key, value, cache, slots)
    (arguments,) = calls
    written = arguments.pop("cache")
    assert written.dtype == dtype and written.data_ptr() == cache.data_ptr()
    scales = {"key_scale": layer._k_scale, "value_scale": layer._v_scale}
    assert arguments == {"key": key, "value": value, "slot_mapping": slots, **scales}


class Runner:
    def get_kv_cache_spec(self):
        return self.specs


class CompressedRunner(CompressedModelRunner, Runner):
    def __init__(
        self,
        block_size: int,
        kernel_block_sizes: list,
        backend: str = "SOME_ATTN",
        windows: tuple = (None,),
        **compression,
    ):
        usual = dict(num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
        attn_backend = SimpleNamespace(
            get_name=lambda: backend, get_supported_kernel_block_sizes=lambda spec: kernel_block_sizes
        )
        self.specs, layers = {}, {}
        for index, window in enumerate(windows):
            layers[f"layer{index}"] = SimpleNamespace(
                get_attn_backend=lambda: attn_backend, sliding_window=window, num_heads=4
            )
            self.specs[f"layer{index}"] = (
                FullAttentionSpec(block_size=block_size, **usual)
                if window is None
                else SlidingWindowSpec(block_size=16, sliding_window=window, **usual)
            )
        self.compilation_config = SimpleNamespace(static_forward_context=layers)
        self.cache_config, self.model_config = (
            SimpleNamespace(block_size=block_size),
            SimpleNamespace(max_model_len=1 << 20),
        )
        self.compression = dataclasses.replace(resolve(KVCompressionConfig(**compression)), sliding_window=512)


def test_pages_a_backend_would_split_are_refused():
    assert CompressedRunner(64, [16, 32, 64]).get_kv_cache_spec()["layer0"].max_resident_tokens == 2048 + 2048
    with pytest.raises(
        ValueError, match="SOME_ATTN reads pages of 64 tokens at most: use --block-size 64 instead of 128"
    ):
        CompressedRunner(128, [16, 32, 64]).get_kv_cache_spec()
    with pytest.raises(ValueError, match="interval=128 is not a multiple of the block size 256"):
        CompressedRunner(256, [256], interval=128).get_kv_cache_spec()
    assert CompressedRunner(256, [256]).get_kv_cache_spec()["layer0"].max_resident_tokens == 2048 + 2048


def test_options_that_fitted_the_block_size_at_the_door_are_refused_on_larger_pages():
    """vLLM 0.33 chooses pages of 128 tokens on CPUs once the model is loaded; until then its configuration says 16."""
    runner = CompressedRunner(128, [MultipleOf(32)], interval=64)
    runner.compression.check_block_size(16)
    with pytest.raises(ValueError, match="interval=64 is not a multiple of the block size 128: set interval to 128"):
        runner.get_kv_cache_spec()


def test_layers_with_and_without_a_sliding_window_share_a_cache():
    full, sliding = CompressedRunner(64, [16, 32, 64], windows=(None, 512)).get_kv_cache_spec().values()
    assert full == sliding and full.block_size == 64
    # Pages below the window of such a spec are left out of tables by vLLM 0.33, which counts positions.
    assert not isinstance(sliding, SlidingWindowSpec)
    with pytest.raises(
        ValueError, match="FLASHINFER plans one window: use --attention-backend FLASH_ATTN or TRITON_ATTN"
    ):
        CompressedRunner(64, [16, 32, 64], "FLASHINFER", (None, 512)).get_kv_cache_spec()
    (spec,) = CompressedRunner(64, [16, 32, 64], "FLASHINFER", (512,)).get_kv_cache_spec().values()
    assert spec == full


MOCK_FLASHINFER = """
import importlib.machinery, sys
from unittest.mock import MagicMock

for name in ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils"):  # not there without a GPU
    sys.modules[name] = MagicMock(__name__=name, __path__=[], __spec__=importlib.machinery.ModuleSpec(name, None))
"""
CHECK_BACKENDS = (
    MOCK_FLASHINFER
    + """
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm_qfilters.attention.resident import ResidentMetadata
from vllm_qfilters.attention.scoring import BACKENDS, ScoringAttention
from vllm_qfilters.attention.watched import WatchedAttention

for backend, path in BACKENDS.items():
    original, ours = resolve_obj_by_qualname(backend.value), resolve_obj_by_qualname(path)
    assert issubclass(ours, original) and ours.get_name() == backend.name == original.get_name()
    assert not ours.forward_includes_kv_cache_update and not ours.supports_kv_cache_update_bypass
    builder = ours.get_builder_cls()
    assert builder.__mro__[1:3] == (ResidentMetadata, original.get_builder_cls())
    assert any("build" in vars(base) for base in builder.__mro__[2:4])
    mro = ours.get_impl_cls().__mro__
    assert mro[1:4] == (ScoringAttention, WatchedAttention, original.get_impl_cls()), mro
    assert "do_kv_cache_update" in vars(mro[3]) and "forward" in vars(mro[3])
"""
)


def run_checks(code: str) -> None:
    in_forks(exec, (code, {}))


def test_every_backend_writes_keys_where_we_score_them():
    run_checks(CHECK_BACKENDS)


# A step of a decode and a prompt's last 5 tokens, which hold 100 and 37 tokens in pages of 16; positions are far
# beyond.
CHECK_FLASHINFER_PLAN = (
    MOCK_FLASHINFER
    + """
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flashinfer

flashinfer._copy_page_indices_kernel = MagicMock()
flashinfer.get_seq_lens = lambda indptr, last, page: (indptr[1:] - indptr[:-1] - 1) * page + last
plans = []
flashinfer.fast_plan_decode = lambda wrapper, **plan: plans.append(plan)
flashinfer.PIN_MEMORY, flashinfer.BatchPrefillWithPagedKVCacheWrapper = False, MagicMock
Builder = flashinfer.FlashInferMetadataBuilder
builder = MagicMock(
    spec=Builder, reorder_batch_threshold=1, use_xqa=False, use_trtllm_gen_varlen_decode=False, page_size=16,
    use_dcp=False, use_trtllm_decode_attention=False, has_sinks=False, _num_speculative_tokens=0,
    enable_cuda_graph=True, num_qo_heads=4, _decode_cudagraph_max_bs=8, dcp_world_size=1, num_kv_heads=2,
    nvfp4_trtllm=False, cache_dtype="auto", attention_config=MagicMock(use_trtllm_attention=False),
    global_hyperparameters=MagicMock(), model_config=MagicMock(), head_dim=64, sm_scale=0.1, window_left=-1,
    logits_soft_cap=0.0, kv_cache_dtype=torch.bfloat16, q_data_type_decode=None, q_data_type_prefill=None,
    decode_fixed_split_size=-1, prefill_fixed_split_size=-1, disable_split_kv=False, use_fa2_native_decode=False,
    paged_kv_indptr=flashinfer.CpuGpuBuffer(9, dtype=torch.int32, device="cpu", pin_memory=False),
    paged_kv_last_page_len=flashinfer.CpuGpuBuffer(8, dtype=torch.int32, device="cpu", pin_memory=False),
    paged_kv_indices=torch.zeros(64, dtype=torch.int32),
)
builder._compute_flashinfer_kv_metadata = lambda *args: Builder._compute_flashinfer_kv_metadata(builder, *args)
start = torch.tensor([0, 1, 6], dtype=torch.int32)
lengths = torch.tensor([100, 37], dtype=torch.int32)
Builder.build(builder, 0, CommonAttentionMetadata(
    query_start_loc=start, query_start_loc_cpu=start, seq_lens=lengths, seq_lens_cpu_upper_bound=lengths, num_reqs=2,
    num_actual_tokens=6, max_query_len=5, max_seq_len=100, block_table_tensor=torch.zeros(2, 625, dtype=torch.int32),
    slot_mapping=torch.zeros(6, dtype=torch.int64), positions=torch.tensor([9999, *range(5000, 5005)]),
))
assert builder.paged_kv_indptr.np[:3].tolist() == [0, 7, 10]
(decode,) = plans
prefill = builder._get_prefill_wrapper.return_value.plan.call_args.kwargs
assert decode["indptr_cpu"].tolist() == [0, 7] and decode["last_page_len_cpu"].tolist() == [4]
assert decode["seq_lens_cpu"].tolist() == [100]
assert prefill["paged_kv_indptr"].tolist() == [7, 10] and prefill["paged_kv_last_page_len"].tolist() == [5]
assert prefill["seq_lens"].tolist() == [37] and prefill["qo_indptr"].tolist() == [0, 5]
"""
)


def test_flashinfer_plans_with_the_lengths_we_give_it():
    """Those on the host, which are resident lengths: tests/interpreted_engine.py checks them at every step."""
    run_checks(CHECK_FLASHINFER_PLAN)
