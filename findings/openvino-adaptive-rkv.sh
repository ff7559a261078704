#!/usr/bin/env bash
# openvino-genai 2026.4.1.0, optimum-intel 2.2.0, transformers 5.5.4, torch 2.13.0 for CPUs.
#
# OpenVINO GenAI evicts by accumulated attention or by ADAPTIVE_RKV: two values of one option. The second ended with an error in a
# measurement of ours; we guessed that one length was at fault. On CPUs it takes any prompt that fits the budget, and fails at the
# first eviction of every other: it computes scores for one block more than it expects where a prompt ends with a whole block of
# 32 tokens, and none elsewhere. The option is taken without a word; the error comes when a prompt has been read, or in mid-answer.
#
# Seen, for a budget of 256: of prompts of 100 tokens both modes answer; of 512 to 575 tokens NORM_SUM answers 64 of 64, and
# ADAPTIVE_RKV none: 2 end with "Diversity score size mismatch", and 62 with "Token diversity must be registered".
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" \
    openvino-genai==2026.4.1.0 optimum-intel==2.2.0 transformers==5.5.4 torch==2.13.0+cpu
"$bin/uv" pip uninstall --quiet --python "$bin/python" torchvision 2> /dev/null || true  # one for GPUs ends transformers' import

cat > "$folder/model.py" <<'PYTHON'
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=257, max_position_embeddings=2048, bos_token_id=256, eos_token_id=256, initializer_range=0.2,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE({**letters, "<end>": 256}, []))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>").save_pretrained(sys.argv[1])
PYTHON

cat > "$folder/answers.py" <<'PYTHON'
import collections
import sys

import numpy
import openvino
import openvino_genai as genai

exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def answer(mode, length):
    scheduling = genai.SchedulerConfig()
    scheduling.num_kv_blocks, scheduling.enable_prefix_caching, scheduling.use_cache_eviction = 64, False, True
    scheduling.cache_eviction_config = genai.CacheEvictionConfig(32, 32, 256, mode)
    pipeline = genai.ContinuousBatchingPipeline(sys.argv[1], scheduling, "CPU", exact)
    generation = genai.GenerationConfig()
    generation.max_new_tokens, generation.ignore_eos, generation.do_sample = 8, True, False
    prompt = numpy.random.RandomState(length).randint(0, 256, (1, length))
    handle = pipeline.add_request(0, openvino.Tensor(prompt), generation)
    try:
        while pipeline.has_non_finished_requests():
            pipeline.step()
    except RuntimeError as error:
        return next((known for known in ("size mismatch", "must be registered") if known in str(error)), str(error))
    return f"{len(handle.read_all()[0].generated_ids)} tokens"


for mode in (genai.AggregationMode.NORM_SUM, genai.AggregationMode.ADAPTIVE_RKV):
    for lengths in (range(100, 101), range(512, 576)):
        outcomes = collections.Counter(answer(mode, length) for length in lengths)
        listed = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        print(f"OUTCOME {mode.name} {lengths[0]} to {lengths[-1]}: {listed}")
PYTHON

"$bin/python" "$folder/model.py" "$folder/model" 2> "$folder/errors"
"$bin/optimum-cli" export openvino --model "$folder/model" --task text-generation-with-past --weight-format fp32 \
    "$folder/exported" > "$folder/errors" 2>&1 || { cat "$folder/errors" >&2; exit 1; }
"$bin/python" "$folder/answers.py" "$folder/exported" > "$folder/outcomes" 2> "$folder/errors" || { cat "$folder/errors" >&2; exit 1; }
found=$(sed -n 's/^OUTCOME //p' "$folder/outcomes")
echo "openvino-genai 2026.4.1.0, prompts by mode and length, and how many ended with what:"
echo "$found"
[ "$found" = "NORM_SUM 100 to 100: 1 8 tokens
NORM_SUM 512 to 575: 64 8 tokens
ADAPTIVE_RKV 100 to 100: 1 8 tokens
ADAPTIVE_RKV 512 to 575: 62 must be registered, 2 size mismatch" ]
