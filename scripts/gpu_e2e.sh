#!/usr/bin/env bash
# Plain vLLM and ours side by side on this machine's GPU, with vLLM's defaults: CUDA graphs, asynchronous scheduling, runner V2.
#
#   PYTHON=.venv/bin/python scripts/gpu_e2e.sh [--dry-run]
#
# First whether a budget nobody reaches leaves the output as it is, then the time of decode steps at 8k, 32k and 128k tokens of
# context with a budget of 2,048: Llama-3.1-8B's shape with dummy weights, since speed needs no others. Needs 80 GB; MODEL names
# another model for the first part (default: the demo model). Results go to benchmarks/results/gpu_decode_*.json.
# --dry-run: the same with a small model, on whatever vLLM runs on here, some two minutes; its numbers mean nothing, and go to
# build/gpu_e2e/decode.json.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v "${PYTHON:-.venv/bin/python}")
BUILD=build/gpu_e2e
mkdir -p $BUILD

# The configuration of a Llama: layers, heads, KV heads, head size, hidden and intermediate size, vocabulary, longest context.
write_config() {
  mkdir -p "$1"
  "$PYTHON" - "$@" > "$1/config.json" << 'PY'
import json
import sys

layers, heads, kv_heads, head_size, hidden, intermediate, vocabulary, positions = map(int, sys.argv[2:])
print(json.dumps({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
    "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_size,
    "hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": vocabulary, "max_position_embeddings": positions,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}))
PY
}

if [ "${1:-}" = --dry-run ]; then
  export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_CI_ENV=1  # one process per engine, and no warm-up
  write_config $BUILD/model 2 4 2 32 128 256 512 4096
  DUMMY='{"load_format": "dummy", "skip_tokenizer_init": true, "enforce_eager": true, "block_size": 32}'
  "$PYTHON" -m benchmarks identity $BUILD/model --llm "${DUMMY%\}}, \"kv_cache_memory_bytes\": 67108864}" \
      --dry-run --output $BUILD/identity.json
  "$PYTHON" -m benchmarks decode $BUILD/model --contexts 600 --budget 256 --sequences 2 --steps 20 --rounds 1 --dry-run \
      --kv-cache-memory-bytes 67108864 --options '{"interval": 32, "chunk": 256}' --llm "$DUMMY" --output $BUILD/decode.json
  exit
fi

if ! "$PYTHON" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
  echo "PyTorch sees no GPU: use --dry-run"
  exit 1
fi
"$PYTHON" -m benchmarks identity "${MODEL:-models/SmolLM2-135M-Instruct}"
write_config $BUILD/model 32 32 8 128 4096 14336 128256 131072
for load in "8k 8192 16" "32k 32768 8" "128k 130000 2"; do
  read -r name context sequences <<< "$load"
  "$PYTHON" -m benchmarks decode $BUILD/model --contexts "$context" --budget 2048 --sequences "$sequences" --steps 256 \
      --rounds 1 --kv-cache-memory-bytes 0 --llm '{"load_format": "dummy", "skip_tokenizer_init": true}' \
      --output "benchmarks/results/gpu_decode_$name.json"
done
