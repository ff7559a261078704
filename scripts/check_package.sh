#!/usr/bin/env bash
# Builds the sdist and, from it, wheels with and without the C++ operators; installs each into an empty environment; checks what
# they contain and that they import.
#
#   PYTHON=python3 scripts/check_package.sh [FOLDER]
#
# PYTHON, .venv/bin/python (of `make install`) by default, has torch, and cmake and a compiler are there, for the operators. The
# new environments see its packages, but not this package. What is built stays in FOLDER, default build/package.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath --no-symlinks "$(command -v "${PYTHON:-.venv/bin/python}")")
FOLDER=$(realpath --canonicalize-missing "${1:-build/package}")
rm -rf "$FOLDER"
mkdir -p "$FOLDER/plain"

fail() {
  echo "check_package.sh: $1" >&2
  exit 1
}

# A copy of what git tracks: nothing that lies about may find its way into the packages.
git ls-files -z | xargs -0 cp -P --parents -t "$FOLDER/plain"
cd "$FOLDER"
"$PYTHON" - "$FOLDER" <<'PY' > build.log 2>&1 || { tail -20 build.log; fail "the sdist does not build"; }
import os, sys
from setuptools.build_meta import build_sdist

os.chdir(f"{sys.argv[1]}/plain")
build_sdist(sys.argv[1])
PY
SDIST=$(echo "$FOLDER"/vllm_qfilters-*.tar.gz)
rm -r plain
mkdir sdist
tar -xf "$SDIST" -C sdist --strip-components 1
for file in README.md CHANGELOG.md CMakeLists.txt setup.py csrc/binding.cpp csrc/lanes.h csrc/operators.h kernels/layout.py \
    vllm_qfilters/commands/inspection/page.html; do
  [ -f "sdist/$file" ] || fail "the sdist lacks $file"
done
[ ! -e sdist/tests ] || fail "the sdist has half of the tests: those without the modules they share"

# build_wheel NAME: a wheel from the unpacked sdist, in the folder NAME.
build_wheel() {
  local build="from setuptools.build_meta import build_wheel; build_wheel('$FOLDER/$1')"
  (cd sdist && rm -rf build && "$PYTHON" -c "$build") >> build.log 2>&1 ||
    { tail -20 build.log; fail "the wheel ($1) does not build"; }
}
VLLM_QFILTERS_REQUIRE_EXTENSION=1 build_wheel with-extension
# Without cmake there are no operators, and that is no error.
mkdir no-cmake
for tool in bash env rm sh tail; do ln -s "$(command -v $tool)" no-cmake; done
PATH=$FOLDER/no-cmake build_wheel without-extension

check() {
  local wheel listed environment=$FOLDER/environment-$1
  wheel=$(echo "$FOLDER/$1"/*.whl)
  listed=$("$PYTHON" -m zipfile --list "$wheel" | tail -n +2 | cut -d ' ' -f 1)
  for file in vllm_qfilters/frontend/plugin.py vllm_qfilters/kernels/layout.py vllm_qfilters/kernels/triton/write_and_score.py \
      vllm_qfilters/commands/inspection/page.html vllm_qfilters/worker/runner.py; do
    grep -qx "$file" <<< "$listed" || fail "$wheel lacks $file"
  done
  ! grep -E '^(tests|benchmarks|scripts|docs|kernels|csrc)/' <<< "$listed" ||
    fail "$wheel has what belongs to the repository alone"
  "$PYTHON" -m venv --without-pip "$environment"
  "$PYTHON" -m pip --python "$environment/bin/python" install --quiet --no-deps --no-index "$wheel"
  (cd / && "$environment/bin/python" -c "import vllm_qfilters") ||
    fail "$wheel needs other packages for its configuration alone"
  local packages target
  packages=$("$PYTHON" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  target=$("$environment/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  # Everything the other environment has installed, except this package, which is there as an editable one.
  for entry in "$packages"/*; do
    case ${entry##*/} in *vllm_qfilters*) ;; *) ln -s "$entry" "$target" ;; esac
  done
  (cd / && "$environment/bin/python" - "$2" "$target" <<'PY') || fail "$wheel, installed, does not work"
import importlib.metadata
import sys

import vllm_qfilters
from vllm_qfilters import commands, kernels
from vllm_qfilters.commands.inspection import page

expected, target = sys.argv[1:]
assert vllm_qfilters.__file__.startswith(target), vllm_qfilters.__file__
assert kernels.IMPLEMENTATION == expected, kernels.IMPLEMENTATION
assert importlib.metadata.version("vllm-qfilters") == vllm_qfilters.__version__
(plugin,) = (each for each in importlib.metadata.entry_points(group="vllm.general_plugins") if each.name == "qfilters")
plugin.load()
assert importlib.resources.files(page.__package__).joinpath("page.html").is_file()
PY
  "$environment/bin/vllm-qfilters" --version
  echo "$(basename "$wheel") ($1): $(wc -l <<< "$listed") files, kernels $2"
}
check with-extension C++
check without-extension PyTorch
echo "packages are in $FOLDER"
