"""Every Triton kernel compiles for GPUs this machine does not have, and keeps what it computes with in registers."""

import json
import pathlib
import re

import pytest

from vllm_qfilters import kernels

MOST_REGISTERS = 232  # per thread: a block of 8 warps fits on a multiprocessor
MOST_SHARED = 80 << 10  # bytes per block: two blocks fit on a multiprocessor, which has 164 KiB or more


@pytest.fixture(scope="module")
def report(kernel_compilation):
    return json.loads(kernel_compilation.output().splitlines()[-1])


@pytest.mark.parametrize("capability", ["80", "90"], ids="sm_{}".format)
def test_no_kernel_spills(report, capability):
    folder = pathlib.Path(kernels.__file__).parent / "triton"
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    names = set(re.findall(r"^def (_\w+_kernel)\(", text, re.MULTILINE))
    assert len(names) > 5 and set(report[capability]) == names, "a kernel is not compiled"
    for name, used in report[capability].items():
        assert used["spilled"] == 0, (name, used)
        assert used["registers"] <= MOST_REGISTERS and used["shared"] <= MOST_SHARED, (name, used)
