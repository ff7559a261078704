#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 for CPUs.
#
# Mamba 2 reads a prompt in chunks and goes on token by token; both are the same recurrence. Transformers' Nemotron-H
# clamps the time step in the first alone, at `time_step_min` (0.001 unless the configuration says otherwise): a token that
# a head is to pass over leaves its trace if it was read, and none if it was generated. An answer that is read again, as
# when its log-probabilities are measured, is not quite the one that was given. `time_step_limit`, which the configuration
# has for this, does nothing; in the model of Mamba 2 it does, but again in the first alone. vLLM clamps in neither.
#
# Seen, log-probabilities of 64 tokens read at once against token by token: within 0.0001 nats for Mamba 2, and for
# Nemotron-H with a time_step_min of 1e-9; 0.001 apart for Nemotron-H as it is, and 1 for Mamba 2 with a limit of 0.01 to 0.1.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" transformers==5.24.0 torch==2.13.0+cpu

cat > "$folder/steps.py" <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, Mamba2Config, NemotronHConfig

shape = dict(hidden_size=128, vocab_size=512, initializer_range=0.12, chunk_size=64, n_groups=1)
of_mamba_2 = dict(**shape, num_hidden_layers=3, state_size=32, num_heads=8, head_dim=32)
of_nemotron = dict(
    **shape, ssm_state_size=32, mamba_num_heads=8, mamba_head_dim=32, intermediate_size=256, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"],
)
configs = [
    Mamba2Config(**of_mamba_2),
    NemotronHConfig(**of_nemotron, time_step_min=1e-9, time_step_floor=1e-3),
    Mamba2Config(**of_mamba_2, time_step_limit=(0.01, 0.1)),
    NemotronHConfig(**of_nemotron),
]
for config in configs:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 512, (1, 65))
    with torch.inference_mode():
        read = model(ids[:, :-1]).logits[0]
        cache, steps = None, []
        for token in ids[:, :-1].split(1, dim=1):
            output = model(token, cache=cache, use_cache=True)
            cache = output.cache
            steps.append(output.logits[0, -1])
    first, second = (logits.log_softmax(-1).gather(-1, ids[0, 1:, None]) for logits in (read, torch.stack(steps)))
    print(f"{config.model_type} {(first - second).abs().max():.5f}")
PYTHON

found=$("$bin/python" "$folder/steps.py" 2> "$folder/errors") || { cat "$folder/errors" >&2; exit 1; }
echo "transformers 5.24.0, nats between 64 tokens read at once and token by token: Mamba 2, Nemotron-H with a"
echo "time_step_min of 1e-9, Mamba 2 with a limit, Nemotron-H:"
echo "$found"
awk '{ if (NR <= 2 ? $2 > 0.0001 : $2 < 0.0005) wrong = 1 } END { exit wrong || NR != 4 }' <<< "$found"
