#!/usr/bin/env bash
# safetensors 0.8.0 and 0.7.0, numpy 2.4.6.
#
# Filters, statistics of keys and other small tensors of this field are handed around as safetensors files. Of a transposed
# tensor `safetensors.torch` refuses to make a file and says that it is not contiguous; we guessed that `safetensors.numpy`
# refuses too, or copies it, as it did up to 0.7.0. From 0.8.0 on it writes the bytes that lie in memory where the array
# begins, in whatever order, under the shape of the view: a file that loads without an error and holds other numbers.
# The docstring asks for contiguous arrays. `.T`, a column out of two, `order="F"`, and much of what numpy's linear algebra
# returns are not.
#
# Seen, what a file gives back is what was saved: 0.7.0: yes for all; 0.8.0: yes for the array as it was made, no for its
# transpose, for every second column of it, and for its copy in Fortran's order.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/strides.py" <<'PYTHON'
import pathlib
import sys

import numpy
from safetensors.numpy import load_file, save_file

array = numpy.arange(24, dtype=numpy.float32).reshape(4, 6)
arrays = {"plain": array, "transposed": array.T, "columns": array[:, ::2], "fortran": numpy.asfortranarray(array)}
path = pathlib.Path(sys.argv[1]) / "arrays.safetensors"
save_file(arrays, path)
loaded = load_file(path)
print(*(f"{name}:{'same' if numpy.array_equal(loaded[name], saved) else 'other'}" for name, saved in arrays.items()))
PYTHON

python3 -m venv "$folder/venv"
bin="$folder/venv/bin"
"$bin/pip" install --quiet safetensors==0.7.0 numpy==2.4.6
before=$("$bin/python" "$folder/strides.py" "$folder")
"$bin/pip" install --quiet safetensors==0.8.0
found=$("$bin/python" "$folder/strides.py" "$folder")
echo "safetensors.numpy, saved and loaded again:"
echo "0.7.0 $before"
echo "0.8.0 $found"
[ "$before" = "plain:same transposed:same columns:same fortran:same" ] &&
    [ "$found" = "plain:same transposed:other columns:other fortran:other" ]
