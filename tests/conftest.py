import collections
import gc
import os
import sys
import tempfile

# Each worker of pytest-xdist has cores of its own: an engine's threads wait for one another, and two engines that share
# cores slow each other tenfold. Before PyTorch is imported, which counts them.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    own = cores[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, own or cores)

# Before vLLM is imported: engines of the tests run in this process, so that tests can look into them.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_CI_ENV"] = "1"  # no warm-up
os.environ["HF_HUB_OFFLINE"] = "1"
# Two ranks share what cores there are. Here and not in a test: vLLM remembers its environment once an engine has
# started.
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"] = "1"  # which ranks let pass
# Engines of the tests are eager. What vLLM compiles all the same, such as counting which tokens are likelier than one,
# takes every process seconds.
os.environ["TORCH_COMPILE_DISABLE"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Threads that spin while they wait take the cores from what runs beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if sys.dont_write_bytecode:  # else every process that a test starts compiles vLLM again
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(
        tempfile.gettempdir(), f"vllm-qfilters-tests-bytecode-{os.getuid()}"
    )

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the Triton kernels' tests run on the CPU then

import pytest
from vllm import envs

from tests import models
from tests.engines import TEXT_ONLY, Engines, MLAEngines, make_empty_cache, register_qwen_vl
from vllm_qfilters import cpu
from vllm_qfilters.kernels import IMPLEMENTATION


def pytest_addoption(parser):
    parser.addoption("--all-cases", action="store_true", help="run every case of tests that are marked as sampled")


def pytest_configure(config):
    config.addinivalue_line("markers", "sampled(every): one in so many cases is run, all of them with --all-cases")


# Minutes each: first, so that no worker is left with one of them when the others have ended.
LONGEST = ("test_gpu_engine.py", "test_server.py", "test_architectures.py", "test_parallel.py", "test_offline_ray.py")


def pytest_collection_modifyitems(config, items):
    """Leaves out cases of sampled tests: many of a kind, of which each change is seen by a few."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if config.getoption("--all-cases"):
        return
    seen, kept, left_out = collections.Counter(), [], []
    for item in items:
        marker = item.get_closest_marker("sampled")
        name = item.nodeid.partition("[")[0]
        (kept if marker is None or seen[name] % marker.args[0] == 0 else left_out).append(item)
        seen[name] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # vLLM collects garbage with every engine that ends: of some 600,000 objects of modules each time


def pytest_unconfigure():
    gc.freeze()  # and with every engine that ends with the process, which would thaw all before
    gc.unfreeze = lambda: None  # not sooner: what ended engines held would have stayed in memory


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
def make_filters(tmp_path_factory):
    """Of a name and arguments of :func:`tests.models.make_tiny_filters`: (path, Filters) made at random."""

    def make(name: str, **options):
        path = tmp_path_factory.mktemp("filters") / f"{name}.safetensors"
        return path, models.make_tiny_filters(path, **options)

    return make


@pytest.fixture(scope="session")
def tiny_filters(make_filters):
    return make_filters("tiny")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Folder that takes the place of vLLM's cache, where filters that are calibrated at start are kept too."""
    folder = make_empty_cache(tmp_path / "cache")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(folder))
    envs.disable_envs_cache()  # an engine of this process keeps the values of its start
    return folder


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
def exaone_filters(tiny_exaone, make_filters):
    return make_filters("exaone", model=tiny_exaone)


@pytest.fixture(scope="session")
def exaone_engines(tiny_exaone, exaone_filters):
    return Engines(tiny_exaone, exaone_filters[0])


@pytest.fixture(scope="session")
def tiny_laguna(tmp_path_factory):
    """Folder of a model whose layers differ in their query heads: see :func:`tests.models.make_tiny_laguna`."""
    return models.make_tiny_laguna(tmp_path_factory.mktemp("tiny-laguna"))


@pytest.fixture(scope="session")
def laguna_filters(tiny_laguna, make_filters):
    return make_filters("laguna", model=tiny_laguna, num_heads=max(models.LAGUNA_HEADS))


@pytest.fixture(scope="session")
def laguna_engines(tiny_laguna, laguna_filters):
    return Engines(tiny_laguna, laguna_filters[0])


@pytest.fixture(scope="session")
def tiny_gemma3n(tmp_path_factory):
    """Folder of a model whose last layers share caches: see :func:`tests.models.make_tiny_gemma3n`."""
    return models.make_tiny_gemma3n(tmp_path_factory.mktemp("tiny-gemma3n"))


@pytest.fixture(scope="session")
def gemma3n_filters(tiny_gemma3n, make_filters):
    return make_filters("gemma3n", model=tiny_gemma3n, num_heads=2 * models.NUM_HEADS)  # of two layers


@pytest.fixture(scope="session")
def tiny_lfm2(tmp_path_factory):
    """Folder of a model with states beside its attention: see :func:`tests.models.make_tiny_lfm2`."""
    return models.make_tiny_lfm2(tmp_path_factory.mktemp("tiny-lfm2"))


@pytest.fixture(scope="session")
def lfm2_filters(tiny_lfm2, make_filters):
    return make_filters("lfm2", model=tiny_lfm2, layers=[1])


@pytest.fixture(scope="session")
def tiny_mimo(tmp_path_factory):
    """Folder of a model whose values are narrower than its keys: see :func:`tests.models.make_tiny_mimo`."""
    return models.make_tiny_mimo(tmp_path_factory.mktemp("tiny-mimo"))


@pytest.fixture(scope="session")
def mimo_filters(tiny_mimo, make_filters):
    return make_filters("mimo", model=tiny_mimo, layers=[0])


@pytest.fixture(scope="session")
def tiny_qwen_vl(tmp_path_factory):
    """Folder of a model with M-RoPE: see :func:`tests.models.make_tiny_qwen2_5_vl`."""
    return models.make_tiny_qwen2_5_vl(tmp_path_factory.mktemp("tiny-qwen-vl"))


@pytest.fixture(scope="session")
def qwen_vl_filters(tiny_qwen_vl, make_filters):
    return make_filters("qwen-vl", model=tiny_qwen_vl)


@pytest.fixture(scope="session")
def qwen_vl_engines(tiny_qwen_vl, qwen_vl_filters):
    register_qwen_vl("qwen2_5_vl", "qwen3_vl")
    return Engines(tiny_qwen_vl, qwen_vl_filters[0], **TEXT_ONLY)


@pytest.fixture(scope="session")
def tiny_deepseek(tmp_path_factory):
    """Folder of a model with MLA: see :func:`tests.models.make_tiny_deepseek`."""
    return models.make_tiny_deepseek(tmp_path_factory.mktemp("tiny-deepseek"))


@pytest.fixture(scope="session")
def deepseek_filters(tiny_deepseek, make_filters):
    return make_filters("deepseek", model=tiny_deepseek, kv_shape=(1, models.LATENT + models.ROTARY))


@pytest.fixture(scope="session")
def deepseek_engines(tiny_deepseek, deepseek_filters):
    return MLAEngines(tiny_deepseek, deepseek_filters[0])
