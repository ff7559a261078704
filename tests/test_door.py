"""What is accepted at the door no worker refuses later: of models that Transformers configures, vLLM makes the layers
without weights, and what a worker asks of them is asked here.
"""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm import envs
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment, parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.worker_base import get_current_attn_backends

from tests import states
from tests.engines import share_group_of_experts
from vllm_qfilters import kv_compression
from vllm_qfilters.filters.format import ModelIdentity
from vllm_qfilters.policy import Policy
from vllm_qfilters.worker.runner import CompressedModelRunner
from vllm_qfilters.worker.softmax import softmax_of

MODEL_TYPES = {
    architecture: model_type
    for model_type, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    if architecture in ModelRegistry.models and model_type in CONFIG_MAPPING
}
# Of those that count layers or heads in ways of their own, or that are refused.
ALWAYS = (
    "CohereForCausalLM",
    "DeepseekV3ForCausalLM",
    "FalconH1ForCausalLM",
    "FalconForCausalLM",
    "Gemma4ForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "GraniteSWAForCausalLM",
    "HrmTextForCausalLM",
    "JambaForCausalLM",
    "LongcatFlashForCausalLM",
    "MambaForCausalLM",
    "MiniCPM3ForCausalLM",
    "Qwen3NextForCausalLM",
    "Zamba2ForCausalLM",
)
# What vLLM reads and Transformers' defaults do not have.
MORE = {
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"] * 16, "num_local_experts": 0},
    "LongcatFlashForCausalLM": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
}


class Unloaded:
    """In the place of vLLM's runner."""

    def __init__(self, vllm_config, layers) -> None:
        self.model_config, self.cache_config = vllm_config.model_config, vllm_config.cache_config
        self.compilation_config = vllm_config.compilation_config
        self.attn_groups = []
        self._specs = {name: layer.get_kv_cache_spec(vllm_config) for name, layer in layers.items()}

    def get_kv_cache_spec(self):
        return {name: spec for name, spec in self._specs.items() if spec is not None}

    def initialize_kv_cache(self, kv_cache_config, is_profiling) -> None:
        pass


class Worker(CompressedModelRunner, Unloaded):
    """Asks what a worker does."""

    def __init__(self, vllm_config, layers) -> None:
        Unloaded.__init__(self, vllm_config, layers)
        self.compression = Policy.from_vllm_config(vllm_config)
        self.identity = ModelIdentity.from_model_config(vllm_config.model_config)

    def bind_cache(self) -> None:
        pass


def start_one_rank(folder) -> None:
    """Unless an engine of this process did."""
    if parallel_state._TP is None:
        init_distributed_environment(1, 0, f"file://{folder / 'rank'}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    share_group_of_experts()


def groups_of(vllm_config, specs):
    """As vLLM splits layers into KV cache groups."""
    try:
        from vllm.v1.core.kv_cache_config_builder import get_kv_cache_config_builder
    except ImportError:  # 0.32
        from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

        return get_kv_cache_groups(vllm_config, specs)
    return get_kv_cache_config_builder(vllm_config).get_kv_cache_groups(vllm_config, specs)


@pytest.mark.parametrize(
    "architecture",
    [*ALWAYS, *(pytest.param(each, marks=pytest.mark.sampled(8)) for each in sorted(MODEL_TYPES.keys() - {*ALWAYS}))],
)
def test_what_the_door_accepts_no_worker_refuses(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    envs.disable_envs_cache()  # an engine of this process keeps the values of its start
    # vLLM gives later engines of a process the embeddings made here, which have no data.
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    config = CONFIG_MAPPING[MODEL_TYPES[architecture]]().to_dict()
    config |= {"architectures": [architecture], **MORE.get(architecture, {})}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    engine_args = dict(
        model=str(tmp_path),
        skip_tokenizer_init=True,
        dtype="float32",
        block_size=32,
        max_model_len=4096,
        load_format="dummy",
    )
    try:
        EngineArgs(**engine_args).create_engine_config()
    except Exception as error:
        assert architecture not in ALWAYS, error
        pytest.skip(f"vLLM itself refuses these defaults: {error}")
    try:
        vllm_config = EngineArgs(**engine_args, **kv_compression("qfilters", budget=1024)).create_engine_config()
    except ValueError as error:
        assert "KV compression does not support" in str(error)
        return
    # vLLM registers operators of states with the first layer that a process makes: those of other tests too.
    with states.stood_in(), set_current_vllm_config(vllm_config):
        start_one_rank(tmp_path)
        try:
            with torch.device("meta"):
                model = initialize_model(vllm_config)
        except Exception as error:
            assert architecture not in ALWAYS, error
            pytest.skip(f"vLLM itself does not make it of these defaults, or not on CPUs: {error}")
        layers = {
            name: layer
            for name, layer in vllm_config.compilation_config.static_forward_context.items()
            if isinstance(layer, AttentionLayerBase)
        }
        current_platform.update_block_size_for_backend(vllm_config)
        worker = Worker(vllm_config, layers)
        specs = worker.get_kv_cache_spec()
        layouts = get_supported_kv_cache_layouts(get_current_attn_backends(vllm_config))
        resolve_kv_cache_layout(vllm_config, [[layout.name for layout in layouts]], specs.values())
        groups = groups_of(vllm_config, specs)
        worker.initialize_kv_cache(KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=groups))
        softmax_of(worker._attending_to(worker.layers), torch.device("meta"))
        assert worker.identity.num_heads == worker.most_query_heads
    del model
