#!/usr/bin/env bash
# Measures a running server with vLLM's own client and with guidellm: requests of 1,500 tokens, 64 tokens answered.
#
#     make serve
#     pip install guidellm==0.8.1
#     examples/bench.sh models/SmolLM2-135M-Instruct [http://localhost:8000] [requests]
#
# The first argument is where the tokenizer is. Run it against `vllm serve` without --kv-compression, too: a number alone
# says nothing.
set -euo pipefail
TOKENIZER=${1:?where is the tokenizer?} URL=${2:-http://localhost:8000} REQUESTS=${3:-32}
PROMPT=1500 ANSWER=64 CONCURRENT=8
MODEL=$(curl --silent --fail "$URL/v1/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')

vllm bench serve --backend openai --base-url "$URL" --model "$MODEL" --tokenizer "$TOKENIZER" \
    --dataset-name random --random-input-len $PROMPT --random-output-len $ANSWER --num-prompts "$REQUESTS" \
    --max-concurrency $CONCURRENT --ignore-eos --disable-tqdm

guidellm run --backend "kind=openai_http,target=$URL,model=$MODEL" --tokenizer "kind=hf_auto,model=$TOKENIZER" \
    --data "kind=synthetic_text,prompt_tokens=$PROMPT,output_tokens=$ANSWER" \
    --profile "kind=concurrent,streams=$CONCURRENT" --constraint "kind=max_requests,count=$REQUESTS" \
    --output kind=console --disable-progress

# What compression did meanwhile:
curl --silent "$URL/metrics" | grep '^vllm:kv_compression_' | grep -v -e _bucket -e _created ||
    echo "no KV compression on this server"
