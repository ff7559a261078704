"""Writes a model of Hugging Face's as a GGUF file in a given precision, for ``python -m benchmarks llama_cpp``.

    python -m benchmarks.to_gguf models/SmolLM2-135M-Instruct model.gguf --dtype bfloat16

It knows Llama and Qwen2 without scaled RoPE, and the layout that llama.cpp reads them in. Weights are rounded where the
checkpoint has more bits than are asked for. How text is split into words is not written: prompts are to be given as
token ids. Runs where the packages gguf, safetensors and tokenizers are, without torch.
"""

import argparse
import json
import pathlib
from collections.abc import Iterator
from typing import Any

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2"}  # `model_type` of transformers: `MODEL_ARCH` of gguf
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
STORED = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}  # safetensors' name of a dtype: numpy's


def write_gguf(model: pathlib.Path, output: pathlib.Path, dtype: str) -> None:
    """Writes the checkpoint in the folder ``model`` to the file ``output``.

    Raises:
        ValueError: the model is of another architecture, or scales its RoPE.
    """
    import gguf

    config = json.loads((model / "config.json").read_text())
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    if config["model_type"] not in ARCHITECTURES or rope["rope_type"] != "default":
        raise ValueError(
            f"{model} is of type {config['model_type']} with RoPE of type {rope['rope_type']}; this writes "
            f"{', '.join(ARCHITECTURES)} with RoPE of type default"
        )
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config["model_type"]]]
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(model.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32", "BF16": "MOSTLY_BF16"}[DTYPES[dtype]]])
    _add_vocabulary(writer, model, config["vocab_size"])
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, values in _tensors(model):
        turned = {"q_proj": heads, "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
        if architecture is gguf.MODEL_ARCH.LLAMA and turned:
            values = neighbours_turn(values, turned)
        # llama.cpp adds and scales by vectors in float32 alone.
        kind = gguf.GGMLQuantizationType[DTYPES[dtype] if values.ndim > 1 else "F32"]
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(new_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def neighbours_turn(weights: Any, heads: int) -> Any:
    """Orders the rows of a projection as llama.cpp's RoPE for Llama wants them: it turns each dimension with the next
    one, where transformers turns it with the one half a head further.

    Args:
        weights: shape: [heads * head_size, hidden_size], or a bias without the second.
        heads: of the projection.
    """
    halves = weights.reshape(heads, 2, -1, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def _tensors(model: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields names and values in float32."""
    import numpy
    import safetensors

    for path in sorted(model.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            values = numpy.frombuffer(tensor["data"], STORED[tensor["dtype"]])
            if tensor["dtype"] == "BF16":  # the upper half of a float32
                values = (values.astype(numpy.uint32) << 16).view(numpy.float32)
            yield name, values.astype(numpy.float32, copy=False).reshape(tensor["shape"])


def _add_vocabulary(writer: Any, model: pathlib.Path, size: int) -> None:
    import gguf
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    tokens, types = [f"[unused {token}]" for token in range(size)], [gguf.TokenType.UNUSED] * size
    for token, number in tokenizer.get_vocab().items():
        is_special = number in added and added[number].special
        tokens[number], types[number] = token, gguf.TokenType.CONTROL if is_special else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    vocabulary = gguf.SpecialVocab(model, load_merges=True, n_vocab=size)
    vocabulary.chat_template = None  # llama.cpp renders no messages here
    vocabulary.add_to_gguf(writer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="folder with config.json and *.safetensors")
    parser.add_argument("output", type=pathlib.Path, help="file to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    arguments = parser.parse_args()
    write_gguf(arguments.model, arguments.output, arguments.dtype)


if __name__ == "__main__":
    main()
