"""Small models, filters, tokenizers and adapters for the tests, made on the spot."""

import dataclasses
import json
import pathlib
import shutil
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Exaone4Config,
    Exaone4ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LagunaConfig,
    LagunaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiMoV2FlashConfig,
    MiMoV2FlashForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from vllm_qfilters.filters.format import FORMAT, Filters, ModelIdentity

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, VOCAB = 3, 4, 2, 32, 512
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
SLIDING_WINDOW = 48  # tokens, of the models that have one


def make_tiny_llama(
    folder: pathlib.Path,
    seed: int = 0,
    num_heads: int = NUM_HEADS,
    num_kv_heads: int = NUM_KV_HEADS,
    vocab: int = VOCAB,
) -> pathlib.Path:
    """A Llama with random weights, large enough that attention differs from token to token; float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(**_shape(num_heads, num_kv_heads, vocab))
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def make_tiny_quantized(folder: pathlib.Path, method: str) -> pathlib.Path:
    """A Llama whose linear layers are quantized: ``awq`` has random weights of 4 bits, ``compressed-tensors`` those of
    the tiny Llama in 8 bits."""
    make_tiny_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    numbers = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight, stem = tensors.pop(name), name.removesuffix("weight")
        rows, columns = weight.shape
        if method == "awq":
            words = {"qweight": (columns, rows // 8), "qzeros": (columns // AWQ_GROUP, rows // 8)}
            for part, shape in words.items():
                bits = torch.randint(-(2**31), 2**31, shape, generator=numbers, dtype=torch.int64)
                tensors[stem + part] = bits.to(torch.int32)
            tensors[stem + "scales"] = torch.full((columns // AWQ_GROUP, rows), 0.02, dtype=torch.float16)
        else:
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[stem + "weight_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION[method]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


AWQ_GROUP = 32
QUANTIZATION = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": AWQ_GROUP, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "strategy": "token",
                    "symmetric": True,
                    "dynamic": True,
                },
            }
        },
    },
}


def make_tiny_mistral(folder: pathlib.Path) -> pathlib.Path:
    """Every layer has a sliding window."""
    torch.manual_seed(0)
    config = MistralConfig(**_shape(), sliding_window=SLIDING_WINDOW)
    MistralForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def make_tiny_exaone(folder: pathlib.Path) -> pathlib.Path:
    """The layer in the middle attends to everything and has no RoPE, the others have a sliding window; queries and keys
    are normalised."""
    torch.manual_seed(0)
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Exaone4Config(
        **_shape(), sliding_window=SLIDING_WINDOW, sliding_window_pattern="LG", layer_types=layer_types
    )
    model = Exaone4ForCausalLM(config).to(torch.float32)
    for layer in model.model.layers:  # so that attention differs from token to token
        layer.self_attn.q_norm.weight.data *= 3
    model.save_pretrained(folder)
    return folder


GEMMA_ROPE = {"sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 1e6}}


def make_tiny_gemma(folder: pathlib.Path) -> pathlib.Path:
    """The last layer attends to everything, the others have a sliding window, and rotary embeddings of another
    frequency.
    """
    torch.manual_seed(0)
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"]
    shape = {**_shape(), "rope_parameters": GEMMA_ROPE, "pad_token_id": 0, "tie_word_embeddings": True}
    config = Gemma3TextConfig(**shape, sliding_window=SLIDING_WINDOW, layer_types=layer_types, query_pre_attn_scalar=12)
    Gemma3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


# The last two layers may share caches.
SHARING_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def make_tiny_gemma3n(folder: pathlib.Path) -> pathlib.Path:
    """The third layer attends to everything, the two before have a sliding window; the last two layers attend to the
    keys and values of the last one of their kind."""
    torch.manual_seed(0)
    shape = {**_shape(), "num_hidden_layers": len(SHARING_TYPES), "tie_word_embeddings": True}
    config = Gemma3nTextConfig(
        **{**shape, "rope_parameters": GEMMA_ROPE},
        pad_token_id=0,
        sliding_window=SLIDING_WINDOW,
        layer_types=SHARING_TYPES,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=16,
        laurel_rank=16,
    )
    model = Gemma3nForCausalLM(config).to(torch.float32)
    for layer in model.model.layers:  # logits are not scaled
        layer.self_attn.q_norm.weight.data *= 0.2
    model.save_pretrained(folder)
    return folder


def make_tiny_gemma4(folder: pathlib.Path, num_sharing: int = 0, num_kv_heads: int = NUM_KV_HEADS) -> pathlib.Path:
    """The third layer attends to everything, with one KV head twice as large as those of the others, which have a
    sliding window; values are keys before their norm.

    Args:
        num_kv_heads: of layers with a sliding window.
        num_sharing: layers behind these, up to two, which attend to the keys and values of the last one of their kind.
    """
    torch.manual_seed(0)
    rope = {**GEMMA_ROPE["full_attention"], "rope_type": "proportional", "partial_rotary_factor": 0.25}
    shape = _shape(num_kv_heads=num_kv_heads)
    shape |= {"num_hidden_layers": NUM_LAYERS + num_sharing, "tie_word_embeddings": True}
    config = Gemma4TextConfig(
        **{**shape, "rope_parameters": {**GEMMA_ROPE, "full_attention": rope}},
        pad_token_id=0,
        sliding_window=SLIDING_WINDOW,
        layer_types=SHARING_TYPES[: NUM_LAYERS + num_sharing],
        num_kv_shared_layers=num_sharing,
        global_head_dim=2 * HEAD_SIZE,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=16 if num_sharing else 0,
    )
    model = Gemma4ForCausalLM(config).to(torch.float32)
    for layer in model.model.layers:  # logits are not scaled
        layer.self_attn.q_norm.weight.data *= 0.2
    model.save_pretrained(folder)
    return folder


def make_tiny_gemma2(folder: pathlib.Path) -> pathlib.Path:
    """Logits are capped, at a value that many of them come near to; the layer in the middle attends to everything."""
    torch.manual_seed(0)
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = {**_shape(), "pad_token_id": 0, "tie_word_embeddings": True}
    config = Gemma2Config(
        **shape,
        sliding_window=SLIDING_WINDOW,
        layer_types=layer_types,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=3.0,
    )
    Gemma2ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def make_tiny_gpt_oss(folder: pathlib.Path) -> pathlib.Path:
    """A mixture of experts with attention sinks; every other layer has a sliding window."""
    torch.manual_seed(0)
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = {name: value for name, value in _shape().items() if name != "rope_parameters"}
    config = GptOssConfig(
        **shape, num_local_experts=4, num_experts_per_tok=2, layer_types=layer_types, sliding_window=SLIDING_WINDOW
    )
    GptOssForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


LAGUNA_HEADS = (6, 4, 6)  # query heads by layer
LAGUNA_ROPE = {"sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 5e5, "partial_rotary_factor": 0.5}}


def make_tiny_laguna(folder: pathlib.Path) -> pathlib.Path:
    """The layer in the middle attends to everything, with fewer query heads than the others, which have a sliding
    window, and turns half of each query; queries and keys are normalised."""
    torch.manual_seed(0)
    config = LagunaConfig(
        **{**_shape(), "rope_parameters": LAGUNA_ROPE},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        mlp_layer_types=["dense"] * NUM_LAYERS,
        num_attention_heads_per_layer=list(LAGUNA_HEADS),
        sliding_window=SLIDING_WINDOW,
    )
    model = LagunaForCausalLM(config).to(torch.float32)
    for layer in model.model.layers:  # so that attention differs from token to token
        layer.self_attn.q_norm.weight.data *= 3
    model.save_pretrained(folder)
    return folder


MIMO_ROPE = {**ROPE, "partial_rotary_factor": 0.5}


def make_tiny_mimo(folder: pathlib.Path) -> pathlib.Path:
    """Values are half as wide as keys. The first layer attends to everything, with half as many KV heads as the others,
    which have a sliding window and attention sinks. The configuration is that of Transformers, and beside it what vLLM
    reads, as the published ones have it."""
    torch.manual_seed(0)
    config = MiMoV2FlashConfig(
        **{**_shape(), "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), MIMO_ROPE)},
        v_head_dim=HEAD_SIZE // 2,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        mlp_layer_types=["dense"] * NUM_LAYERS,
        sliding_window=SLIDING_WINDOW,
        pad_token_id=0,
        layernorm_epsilon=1e-5,
        partial_rotary_factor=MIMO_ROPE["partial_rotary_factor"],
        rope_theta=MIMO_ROPE["rope_theta"],
        hybrid_layer_pattern=[0, 1, 1],
        add_swa_attention_sink_bias=True,
        swa_num_attention_heads=NUM_HEADS,
        swa_num_key_value_heads=2 * NUM_KV_HEADS,
        swa_head_dim=HEAD_SIZE,
        swa_v_head_dim=HEAD_SIZE // 2,
    )
    config.sliding_window_size = SLIDING_WINDOW
    model = MiMoV2FlashForCausalLM(config).to(torch.float32)
    for layer in model.model.layers[1:]:
        torch.nn.init.normal_(layer.self_attn.sinks)
    model.save_pretrained(folder)
    return folder


def make_tiny_phi3(folder: pathlib.Path) -> pathlib.Path:
    """Two RoPE tables (longrope): one for contexts of up to 1,024 tokens, one for longer ones."""
    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * (HEAD_SIZE // 2), "long_factor": [1 + i / 4 for i in range(HEAD_SIZE // 2)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 1024, **factors}
    config = Phi3Config(**{**_shape(), "rope_parameters": rope}, original_max_position_embeddings=1024, pad_token_id=0)
    Phi3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


YARN = dict(
    ROPE, rope_type="yarn", factor=16.0, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0,
    mscale_all_dim=1.0,
)  # fmt: skip
LATENT, ROTARY = 512, 64  # elements of a key: others vLLM's attention on CPUs does not know


def make_tiny_deepseek(folder: pathlib.Path) -> pathlib.Path:
    """MLA: all heads share one key per token. All layers are dense, and RoPE is scaled, as in all that people serve:
    where it is not, vLLM 0.32 on CPUs takes the heads of a query for tokens, and turns them by positions of others."""
    torch.manual_seed(0)
    shape = {name: value for name, value in _shape().items() if name != "head_dim"}
    config = DeepseekV3Config(
        **{**shape, "num_key_value_heads": NUM_HEADS, "rope_parameters": YARN},
        kv_lora_rank=LATENT,
        q_lora_rank=48,
        qk_rope_head_dim=ROTARY,
        qk_nope_head_dim=HEAD_SIZE,
        v_head_dim=HEAD_SIZE,
        first_k_dense_replace=NUM_LAYERS,
        num_nextn_predict_layers=0,
    )
    DeepseekV3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


MROPE = {**ROPE, "mrope_section": [6, 5, 5]}  # of HEAD_SIZE / 2 frequencies: time, height, width
VISION = dict(depth=1, num_heads=2, intermediate_size=32, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
TOKEN_IDS = dict(image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6)  # none in prompts


def make_tiny_qwen2_5_vl(folder: pathlib.Path) -> pathlib.Path:
    """M-RoPE in sections."""
    torch.manual_seed(0)
    text = {**_shape(), "rope_parameters": MROPE}
    vision = dict(VISION, hidden_size=32, out_hidden_size=text["hidden_size"], fullatt_block_indexes=[0])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **TOKEN_IDS)
    Qwen2_5_VLForConditionalGeneration(config).to(torch.float32).save_pretrained(folder)
    return folder


def make_tiny_qwen3_vl(folder: pathlib.Path) -> pathlib.Path:
    """M-RoPE whose sections are interleaved; queries and keys are normalised."""
    torch.manual_seed(0)
    text = {**_shape(), "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    vision = dict(VISION, hidden_size=32, out_hidden_size=text["hidden_size"], deepstack_visual_indexes=[])
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **TOKEN_IDS)
    model = Qwen3VLForConditionalGeneration(config).to(torch.float32)
    for layer in model.model.language_model.layers:  # so that attention differs from token to token
        layer.self_attn.q_norm.weight.data *= 3
    model.save_pretrained(folder)
    return folder


def make_tiny_lfm2(folder: pathlib.Path) -> pathlib.Path:
    """The layer in the middle is attention, the others are short convolutions, which keep a state."""
    torch.manual_seed(0)
    shape = {**_shape(), "pad_token_id": 0, "tie_word_embeddings": True}  # as vLLM has it in any case
    del shape["head_dim"]
    width = shape["hidden_size"]
    read_by_vllm = dict(conv_dim=width, block_dim=width, block_ffn_dim_multiplier=1.0, block_multiple_of=32)
    config = Lfm2Config(
        **shape, **read_by_vllm, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False
    )
    model = Lfm2ForCausalLM(config).to(torch.float32)
    model.model.layers[1].self_attn.q_layernorm.weight.data *= 3  # so that attention differs from token to token
    model.save_pretrained(folder)
    return folder


GATED_DELTA_NET = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=64,  # vLLM's operators for CPUs know no smaller ones
    linear_value_head_dim=64,
)


def make_tiny_qwen3_next(folder: pathlib.Path) -> pathlib.Path:
    """The layer in the middle is attention, the others are gated delta nets; a quarter of each query turns. The last
    layer has experts, as vLLM wants one to have."""
    torch.manual_seed(0)
    shape = {**_shape(), "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}, "pad_token_id": 0}
    experts = dict(num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts_per_tok=2)
    config = Qwen3NextConfig(**shape, **GATED_DELTA_NET, **experts, mlp_only_layers=[0, 1])
    model = Qwen3NextForCausalLM(config).to(torch.float32)
    model.model.layers[1].self_attn.q_norm.weight.data += 2  # to which it adds 1
    model.save_pretrained(folder)
    return folder


def make_tiny_qwen3_5(folder: pathlib.Path) -> pathlib.Path:
    """As Qwen3-Next, with M-RoPE."""
    torch.manual_seed(0)
    rope = {**ROPE, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**_shape(), "rope_parameters": rope, **GATED_DELTA_NET}
    vision = dict(VISION, hidden_size=32, out_hidden_size=text["hidden_size"])
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=False, **TOKEN_IDS)
    model = Qwen3_5ForConditionalGeneration(config).to(torch.float32)
    model.model.language_model.layers[1].self_attn.q_norm.weight.data += 2  # to which it adds 1
    model.save_pretrained(folder)
    return folder


def make_tiny_nemotron_h(folder: pathlib.Path) -> pathlib.Path:
    """Mamba 2, attention without RoPE, MLP: a layer each. Where it reads, Hugging Face's model clamps time steps at
    ``time_step_min``, and vLLM does not: nothing is below this one."""
    torch.manual_seed(0)
    shape = _shape()
    for name in ("num_hidden_layers", "rope_parameters"):
        del shape[name]
    config = NemotronHConfig(
        **shape,
        layers_block_type=["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"],
        mamba_num_heads=NUM_HEADS,
        mamba_head_dim=HEAD_SIZE,
        ssm_state_size=HEAD_SIZE,
        n_groups=2,
        chunk_size=64,
        time_step_min=1e-9,
        time_step_floor=1e-3,  # of what is drawn
        pad_token_id=0,
    )
    model = NemotronHForCausalLM(config).to(torch.float32)
    model.model.layers[2].mixer.q_proj.weight.data *= 2  # so that attention differs from token to token
    model.save_pretrained(folder)
    return folder


def make_tiny_falcon_h1(folder: pathlib.Path) -> pathlib.Path:
    """Mamba 2 and attention in every layer, side by side."""
    torch.manual_seed(0)
    config = FalconH1Config(
        **_shape(),
        mamba_d_ssm=NUM_HEADS * HEAD_SIZE,
        mamba_n_heads=NUM_HEADS,
        mamba_d_head=HEAD_SIZE,
        mamba_d_state=HEAD_SIZE,
        mamba_chunk_size=64,
        pad_token_id=0,
    )
    FalconH1ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def make_tiny_zamba2(folder: pathlib.Path) -> pathlib.Path:
    """Mamba 2 in every layer; before it, in the first and in the last one, attention with RoPE in heads of their own
    size, each with weights of its own."""
    torch.manual_seed(0)
    shape = _shape(num_kv_heads=NUM_HEADS)
    del shape["head_dim"]
    config = Zamba2Config(
        **{**shape, "tie_word_embeddings": True},
        layers_block_type=["hybrid", "linear_attention", "hybrid"],
        num_mem_blocks=2,
        use_mem_rope=True,
        mamba_d_state=HEAD_SIZE,
        n_mamba_heads=2 * NUM_HEADS,
        chunk_size=64,
        adapter_rank=16,
        time_step_min=1e-9,  # as of Nemotron-H
        time_step_floor=1e-3,
        pad_token_id=0,
    )
    Zamba2ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def make_tiny_minicpm3(folder: pathlib.Path) -> pathlib.Path:
    """Keys and values of heads are made of latents before they are cached; the last half of each query turns."""
    torch.manual_seed(0)
    shape = {name: value for name, value in _shape(num_kv_heads=NUM_HEADS).items() if name != "head_dim"}
    config = MiniCPM3Config(
        **shape,
        kv_lora_rank=HEAD_SIZE,
        q_lora_rank=48,
        qk_nope_head_dim=HEAD_SIZE,
        qk_rope_head_dim=HEAD_SIZE,
        scale_emb=1,
        pad_token_id=0,
    )
    MiniCPM3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


class NemotronNasConfig(PreTrainedConfig):
    """As the published models have it in a file of their own: each layer's attention and MLP in a block of its own."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            SimpleNamespace(**{part: SimpleNamespace(**values) for part, values in block.items()})
            for block in block_configs
        ]

    def to_dict(self) -> dict:
        blocks = [{part: vars(values) for part, values in vars(block).items()} for block in self.block_configs]
        return {**super().to_dict(), "block_configs": blocks}


def make_tiny_nemotron_nas(folder: pathlib.Path) -> pathlib.Path:
    """A Llama whose layer in the middle has no attention. In the folder ``whole`` it has one that adds nothing, for
    Hugging Face, which knows no such model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_shape())).to(torch.float32)
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.save_pretrained(folder / "whole")
    tensors = load_file(folder / "whole" / "model.safetensors")
    absent = ("model.layers.1.self_attn.", "model.layers.1.input_layernorm.")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(absent)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "whole" / "config.json").read_text())
    mlp = {"no_op": False, "intermediate_size": config["intermediate_size"]}
    group = {"n_heads_in_group": NUM_HEADS // NUM_KV_HEADS}
    attention = [{"no_op": layer == 1, **group} for layer in range(NUM_LAYERS)]
    config |= {"model_type": NemotronNasConfig.model_type, "architectures": ["DeciLMForCausalLM"]}
    config["block_configs"] = [{"attention": of_layer, "ffn": mlp} for of_layer in attention]
    (folder / "config.json").write_text(json.dumps(config))
    AutoConfig.register(NemotronNasConfig.model_type, NemotronNasConfig, exist_ok=True)
    return folder


def make_tiny_smollm3(folder: pathlib.Path) -> pathlib.Path:
    """The last layer has no RoPE. vLLM serves it through Transformers, where one rotary embedding stands beside all
    layers.
    """
    torch.manual_seed(0)
    config = SmolLM3Config(**_shape(), no_rope_layers=[1, 1, 0], pad_token_id=0)
    SmolLM3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def _shape(num_heads: int = NUM_HEADS, num_kv_heads: int = NUM_KV_HEADS, vocab: int = VOCAB) -> dict:
    return dict(
        hidden_size=num_heads * HEAD_SIZE,
        intermediate_size=2 * num_heads * HEAD_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_SIZE,
        vocab_size=vocab,
        max_position_embeddings=65536,
        initializer_range=0.12,
        rope_parameters=ROPE,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def make_tiny_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """Single bytes, and names for the rest of the vocabulary."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"name{i}" for i in range(VOCAB - len(tokens))]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def make_tiny_adapter(folder: pathlib.Path, model: pathlib.Path, merged: pathlib.Path, seed: int = 5) -> pathlib.Path:
    """A LoRA adapter with random weights for ``model``, and in ``merged`` the model with it merged in."""
    generator = torch.Generator().manual_seed(seed)
    llama, rank, scale = LlamaForCausalLM.from_pretrained(model), 4, 2.0
    tensors = {}
    for layer in range(NUM_LAYERS):
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = f"model.layers.{layer}.self_attn.{projection}"
            weight = llama.get_submodule(name).weight.data
            a = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
            b = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
            weight += scale * b @ a
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    llama.save_pretrained(merged)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = dict(
        peft_type="LORA", task_type="CAUSAL_LM", r=rank, lora_alpha=scale * rank, bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tiny_identity(
    name: str = "tiny", architecture: str = "LlamaForCausalLM", rope: dict = ROPE, num_heads: int = NUM_HEADS
) -> ModelIdentity:
    return ModelIdentity(name, architecture, NUM_LAYERS, num_heads, NUM_KV_HEADS, HEAD_SIZE, rope)


def layer_names(num_layers: int = NUM_LAYERS) -> tuple[str, ...]:
    """As vLLM has them."""
    return tuple(f"model.layers.{layer}.self_attn.attn" for layer in range(num_layers))


def save_version_2(path: pathlib.Path, model: ModelIdentity, filters: torch.Tensor, **statistics: torch.Tensor) -> None:
    """A filters file as the package wrote them before version 3: layers stacked, and second moments."""
    identity = {name: value for name, value in dataclasses.asdict(model).items() if name != "has_long_rope"}
    metadata = {"format": FORMAT, "version": "2", "model": json.dumps(identity), "calibration": "long ago"}
    save_file({"q_filters": -filters, **statistics}, path, metadata)


def make_tiny_filters(
    path: pathlib.Path,
    seed: int = 0,
    model: pathlib.Path | None = None,
    num_heads: int = NUM_HEADS,
    layers: list[int] | None = None,
    kv_shape: tuple[int, int] = (NUM_KV_HEADS, HEAD_SIZE),
) -> Filters:
    """Random filters with statistics of random queries, saved at ``path`` in version 2, whose moments are exact; higher
    projection = keep. model: a Llama if None. layers: that are compressed and saved, where others have no
    attention or other heads; all if None. kv_shape: number and size of KV heads.
    """
    num_kv_heads, head_size = kv_shape
    generator = torch.Generator().manual_seed(seed)
    filters = torch.randn(NUM_LAYERS, num_kv_heads, head_size, generator=generator)
    mean = torch.randn(NUM_LAYERS, num_heads, head_size, generator=generator)
    spread = torch.randn(NUM_LAYERS, num_heads, head_size, head_size, generator=generator) * 0.3
    second = spread @ spread.mT + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    # Made up as well, so that a page's score depends on them.
    shape = (NUM_LAYERS, num_kv_heads)
    score_mean, score_std = (
        5 * torch.randn(shape, generator=generator),
        0.3 + 3 * torch.rand(shape, generator=generator),
    )
    statistics = dict(
        query_mean_before_rope=mean, query_second_before_rope=second, score_mean=score_mean, score_std=score_std
    )
    identity = tiny_identity()
    if model is not None:
        config = AutoConfig.from_pretrained(model)
        rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
        identity = tiny_identity(architecture=config.architectures[0], rope=rope, num_heads=num_heads)
    rows = slice(None) if layers is None else layers
    identity = dataclasses.replace(
        identity, num_layers=len(filters[rows]), num_kv_heads=num_kv_heads, head_size=head_size
    )
    save_version_2(path, identity, filters[rows], **{name: tensor[rows] for name, tensor in statistics.items()})
    return Filters(filters, **statistics)


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def with_tokenizer(model: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy of ``model`` with a tokenizer of as many words as it has token ids, and a chat template."""
    shutil.copytree(model, folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    fast.save_pretrained(folder)
    return folder
