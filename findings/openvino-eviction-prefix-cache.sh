#!/usr/bin/env bash
# openvino-genai 2026.4.1.0, optimum-intel 2.2.0, transformers 5.5.4, torch 2.13.0 for CPUs.
#
# Cache eviction and prefix caching are two options of the same scheduler (`use_cache_eviction`, `enable_prefix_caching`).
# Each alone answers a repeated prompt as it did before, greedily and in float32. Both together are accepted without a
# word, and then pages from which tokens were evicted are taken for the prompt's own: the same prompt gets another
# answer. The allocator counts more free blocks than it has: it prints so to the standard error stream, and goes on.
#
# Seen: eviction alone: same answers; prefix cache alone: same answers; both: other answers, and 267 of 256 blocks free.
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
import sys

import numpy
import openvino
import openvino_genai as genai

folder, evicts, shares = sys.argv[1], sys.argv[2] == "evict", sys.argv[3] == "share"
scheduling = genai.SchedulerConfig()
scheduling.num_kv_blocks, scheduling.enable_prefix_caching = 256, shares
if evicts:
    scheduling.use_cache_eviction = True
    scheduling.cache_eviction_config = genai.CacheEvictionConfig(32, 32, 128, genai.AggregationMode.NORM_SUM)
exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
pipeline = genai.ContinuousBatchingPipeline(folder, scheduling, "CPU", exact)
prompt = numpy.random.RandomState(0).randint(0, 256, (1, 600))
answers = []
for number in range(4):
    generation = genai.GenerationConfig()
    generation.max_new_tokens, generation.ignore_eos, generation.do_sample = 64, True, False
    handle = pipeline.add_request(number, openvino.Tensor(prompt), generation)
    while pipeline.has_non_finished_requests():
        pipeline.step()
    answers.append(list(handle.read_all()[0].generated_ids))
print("ANSWERS", "same" if all(answer == answers[0] for answer in answers) else "other")
PYTHON

"$bin/python" "$folder/model.py" "$folder/model" 2> "$folder/errors"
"$bin/optimum-cli" export openvino --model "$folder/model" --task text-generation-with-past --weight-format fp32 \
    "$folder/exported" > "$folder/errors" 2>&1 || { cat "$folder/errors" >&2; exit 1; }

run() {
    "$bin/python" "$folder/answers.py" "$folder/exported" "$1" "$2" 2> "$folder/errors.$1.$2" | sed -n 's/^ANSWERS //p'
}
evicting=$(run evict alone)
sharing=$(run keep share)
both=$(run evict share)
count=$(sed -n 's/.*Expected num free blocks: \([0-9]*\), actual: \([0-9]*\).*/\2 of \1/p' "$folder"/errors.evict.share | tail -1)
echo "openvino-genai 2026.4.1.0, a prompt sent four times: $evicting answers with eviction, $sharing answers with the prefix cache,"
echo "$both answers with both, and then ${count:-no wrong number of} blocks free"
[ "$evicting" = same ] && [ "$sharing" = same ] && [ "$both" = other ] && [ -n "$count" ]
