#!/usr/bin/env bash
# Runs tests/test_csrc.py on operators built with the address and undefined-behaviour sanitizers.
#
#   PYTHON=.venv/bin/python scripts/sanitize.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
BUILD=$PWD/build/sanitize

for tool in cmake g++; do
  if ! command -v $tool > /dev/null; then
    echo "skipped: $tool is not installed"
    exit 0
  fi
done
LIBASAN=$(g++ -print-file-name=libasan.so)
if [ "$LIBASAN" = libasan.so ]; then
  echo "skipped: g++ has no address sanitizer"
  exit 0
fi

# The package is copied, so that the sanitized library takes the place of the built one there alone.
rm -rf "$BUILD"
mkdir -p "$BUILD"
cp -rL vllm_qfilters tests "$BUILD"  # kernels is a link
cmake -S . -B "$BUILD/cmake" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER=g++ -DPython_EXECUTABLE="$PYTHON" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$BUILD/vllm_qfilters" \
  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
cmake --build "$BUILD/cmake" --parallel

# The interpreter and PyTorch keep memory to their end, which are no leaks of the operators. -s: pytest would keep the
# report of a sanitizer, which ends the process, to itself.
cd "$BUILD"
LD_PRELOAD="$LIBASAN $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
  "$PYTHON" -m pytest -q -s -p no:cacheprovider tests/test_csrc.py -k "not without_the_library" "$@"
