#!/usr/bin/env bash
# torch 2.13.0, on x86-64 CPUs with AVX-512.
#
# torch.compile caches what it made of a function. The key of that cache does not name the instruction set: a process
# that is told to use AVX2 (ATEN_CPU_CAPABILITY=avx2), or that runs on a CPU without AVX-512 and shares the cache folder,
# finds the C++ that was made for 16 lanes and compiles it for AVX2. The loop then steps by 16 elements and writes 8 of
# them: every second run of 8 elements of the result is memory that nobody wrote. Nothing warns.
#
# Seen: with AVX-512 right; with AVX2 and the same cache wrong from element 8 on; with AVX2 and an empty cache right.
set -euo pipefail

if ! grep -qw avx512f /proc/cpuinfo; then
    echo "this CPU has no AVX-512: nothing to see here"
    exit 77
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5

cat > "$folder/masked.py" <<'PYTHON'
import torch


@torch.compile(dynamic=True)
def shifted(ids, start, end):
    inside = (ids >= start) & (ids < end)
    return inside * (ids - start), ~inside


ids = torch.full((256,), 44, dtype=torch.int32)
found, _ = shifted(ids, 0, 192)
is_right = (found == 44).view(-1, 8).all(1)  # by runs of 8 elements
print("right" if is_right.all() else "wrong in runs " + " ".join(map(str, (~is_right).nonzero().flatten()[:4].tolist())))
PYTHON

run() { # the cache folder, then settings
    env TORCHINDUCTOR_CACHE_DIR="$folder/$1" "${@:2}" "$folder/venv/bin/python" "$folder/masked.py" 2> "$folder/errors" ||
        { cat "$folder/errors" >&2; exit 1; }
}
wide=$(run shared ATEN_CPU_CAPABILITY=avx512)
narrow=$(run shared ATEN_CPU_CAPABILITY=avx2)
alone=$(run own ATEN_CPU_CAPABILITY=avx2)
echo "torch 2.13.0: AVX-512 $wide; AVX2 with the same cache $narrow; AVX2 with a cache of its own $alone"
[ "$wide" = right ] && [ "$alone" = right ] && [ "$narrow" = "wrong in runs 1 3 5 7" ]
