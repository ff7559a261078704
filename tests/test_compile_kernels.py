"""Every Triton kernel compiles for GPUs this machine does not have, and keeps what it computes with in registers."""

import json
import os
import pathlib
import re

import pytest

from tests.processes import output_of
from vllm_qfilters import kernels

MOST_REGISTERS = 232  # per thread: a block of 8 warps fits on a multiprocessor
MOST_SHARED = 80 << 10  # bytes per block: two blocks fit on a multiprocessor, which has 164 KiB or more


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    output = output_of("tests.compile_kernels", "80", "90", environment=environment)
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("capability", ["80", "90"], ids="sm_{}".format)
def test_no_kernel_spills(report, capability):
    folder = pathlib.Path(kernels.__file__).parent / "triton"
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    names = set(re.findall(r"^def (_\w+_kernel)\(", text, re.MULTILINE))
    assert len(names) > 5 and set(report[capability]) == names, "a kernel is not compiled"
    for name, used in report[capability].items():
        assert used["spilled"] == 0, (name, used)
        assert used["registers"] <= MOST_REGISTERS and used["shared"] <= MOST_SHARED, (name, used)
