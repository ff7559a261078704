import os
import sys
import tempfile

# Before vLLM is imported: engines of the tests run in this process, so that tests can look into them.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_CI_ENV"] = "1"  # no warm-up
os.environ["HF_HUB_OFFLINE"] = "1"
# Two ranks share what cores there are. Here and not in a test: vLLM remembers its environment once an engine has
# started.
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if sys.dont_write_bytecode:  # else every process that a test starts compiles vLLM again
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(
        tempfile.gettempdir(), f"vllm-qfilters-tests-bytecode-{os.getuid()}"
    )

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the Triton kernels' tests run on the CPU then

import pytest

from tests import models
from tests.engines import Engines
from vllm_qfilters import cpu
from vllm_qfilters.kernels import IMPLEMENTATION


def pytest_report_header():
    return (
        f"CPU: {cpu.isa()}, {torch.get_num_threads()} threads, served in {cpu.fast_dtype()}; kernels: {IMPLEMENTATION}"
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a Llama with random weights."""
    return models.make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def model_with_tokenizer(tiny_model, tmp_path_factory):
    """``tiny_model`` with a tokenizer and a chat template."""
    return models.with_tokenizer(tiny_model, tmp_path_factory.mktemp("with-tokenizer") / "model")


@pytest.fixture(scope="session")
def tiny_filters(tmp_path_factory):
    """(path, Filters) made at random for ``tiny_model``."""
    path = tmp_path_factory.mktemp("filters") / "tiny.safetensors"
    return path, models.make_tiny_filters(path)


@pytest.fixture(scope="session")
def engines(tiny_model, tiny_filters):
    """Engines by configuration, each started once."""
    return Engines(tiny_model, tiny_filters[0])


@pytest.fixture(scope="session")
def hf_model(tiny_model):
    """``tiny_model`` in Hugging Face's implementation."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def tiny_exaone(tmp_path_factory):
    """Folder of a model whose layers differ: see :func:`tests.models.make_tiny_exaone`."""
    return models.make_tiny_exaone(tmp_path_factory.mktemp("tiny-exaone"))


@pytest.fixture(scope="session")
def exaone_filters(tiny_exaone, tmp_path_factory):
    """(path, Filters) made at random for ``tiny_exaone``."""
    path = tmp_path_factory.mktemp("filters") / "exaone.safetensors"
    return path, models.make_tiny_filters(path, model=tiny_exaone)


@pytest.fixture(scope="session")
def exaone_engines(tiny_exaone, exaone_filters):
    return Engines(tiny_exaone, exaone_filters[0])
