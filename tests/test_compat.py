"""What we patch and subclass in vLLM, and that installing this package changes nothing by itself."""

import argparse
import importlib.util
import json
import pathlib
import zipfile
from types import SimpleNamespace

import pytest
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests import seams
from vllm_qfilters.config import KVCompressionConfig
from vllm_qfilters.core.scheduler import QFiltersScheduler
from vllm_qfilters.frontend.versions import VLLM_VERSIONS, check_version
from vllm_qfilters.methods.catalog import METHODS
from vllm_qfilters.policy import resolve

ROOT = pathlib.Path(__file__).parents[1]


def _load_check_vllm():
    spec = importlib.util.spec_from_file_location("check_vllm", ROOT / "scripts" / "check_vllm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_vllm = _load_check_vllm()


@pytest.fixture(scope="module")
def sources():
    """Of the vLLM that is installed."""
    return check_vllm.Sources(pathlib.Path(importlib.util.find_spec("vllm").origin).parent)


def test_vllm_still_has_every_seam(sources):
    found = dict(check_vllm.problems(sources))
    assert len(found) > 150 and {target: problem for target, problem in found.items() if problem} == {}


def test_the_table_has_every_method_of_vllm_that_is_overridden(sources):
    assert check_vllm.overrides(sources) == {*seams.OVERRIDDEN, *seams.differences(sources.version).overridden}


def test_supported_versions_are_named_alike_everywhere():
    assert tuple(seams.DIFFERENCES) == VLLM_VERSIONS
    (_, oldest), (_, newest) = VLLM_VERSIONS[0], VLLM_VERSIONS[-1]
    for file in ("pyproject.toml", "requirements/cuda.in", "docs/upgrading.md"):
        assert f">=0.{oldest},<0.{newest + 1}" in (ROOT / file).read_text(), file


@pytest.mark.parametrize("version", [(0, 32, 0), (0, 33, 1), (0, 33, 2, "dev5", "g4ba787e"), (0, 0, "dev")])
def test_a_supported_vllm_passes(version):
    check_version(version)


@pytest.mark.parametrize("version", [(0, 31, 4), (0, 34, 0), (0, 34, 0, "dev12"), (1, 32, 0)])
def test_another_vllm_is_refused(version):
    with pytest.raises(ValueError, match=r"with vLLM 0\.32 to 0\.33, .* pip install 'vllm>=0\.32,<0\.34'"):
        check_version(version)


@pytest.mark.parametrize("limit", [(), (None,), (64,)], ids=str)
def test_a_limit_of_the_hit_is_handed_on_where_vllm_has_one(limit, monkeypatch):
    """As a vLLM before 0.33 calls it, and as one from 0.33 on does."""
    blocks = SimpleNamespace(blocks=([SimpleNamespace(ref_cnt=1)],))
    handed_on = []

    def hit(self, *arguments):
        handed_on.extend(arguments)
        return blocks, 32, 0, False

    monkeypatch.setattr(AsyncScheduler, "_get_local_prefix_cache_hit", hit)
    scheduler = object.__new__(QFiltersScheduler)
    scheduler.block_manager = SimpleNamespace(limits={})
    scheduler.kv_cache_manager = SimpleNamespace(prefix_cache_lookup_enabled=lambda request: False)
    request = SimpleNamespace(request_id="one", num_prompt_tokens=64, max_tokens=8)
    assert scheduler._get_local_prefix_cache_hit(request, *limit) == (blocks, 32, 0, False)
    assert handed_on == [request, *limit]


@pytest.mark.parametrize("version", seams.DIFFERENCES)
def test_the_script_expects_of_a_version_what_that_version_has(version, tmp_path):
    moved = seams.differences(version).imported[0]
    module, _, name = moved.partition(":")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm" / "_version.py").write_text(f"__version_tuple__ = version_tuple = {(*version, 0)}\n")
    path = (tmp_path / module.replace(".", "/")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    path.write_text(f"def {name}(): ...")
    found = dict(check_vllm.problems(check_vllm.Sources(tmp_path)))
    others = {each for other in seams.DIFFERENCES if other != version for each in seams.differences(other).imported}
    assert found[moved] is None and not others & set(found)


def test_the_script_sees_what_is_gone_moved_and_changed(tmp_path):
    other = {
        "__init__": "LAZY = {'LLM': '.llm'}\ndef __getattr__(name): ...",
        "plugins/__init__": "from .loading import *\nDEFAULT_PLUGINS_GROUP = 'vllm.plugins'",
        "plugins/loading": "def load_endpoint_plugins(tasks): ...\ndef load_general_plugins(): ...",
        "v1/metrics/stats": "class Base:\n    def __init__(self):\n        self.kv_connector_stats = None\n"
        "class SchedulerStats(Base): ...",
        "v1/elsewhere": "class AsyncScheduler: ...",
        "v1/outputs": "class Base:\n    @abstractmethod\n    def get_output(self): ...\n"
        "class AsyncModelRunnerOutput(Base):\n    @abstractmethod\n    def get_kv_connector_output(self): ...\n"
        "    @abstractmethod\n    def get_it_anew(self): ...",
    }
    with zipfile.ZipFile(tmp_path / "vllm-1.whl", "w") as wheel:
        for name, text in other.items():
            wheel.writestr(f"vllm/{name}.py", text)
    found = dict(check_vllm.problems(check_vllm.Sources(tmp_path / "vllm-1.whl")))
    assert found["vllm.plugins:load_general_plugins"] is found["vllm:LLM"] is None
    assert found["vllm.v1.metrics.stats:SchedulerStats.kv_connector_stats"] is None
    assert found["vllm.plugins:load_endpoint_plugins"] == "takes (tasks), not (supported_tasks)"
    assert found["vllm.plugins:DEFAULT_PLUGINS_GROUP"] == "is 'vllm.plugins', not 'vllm.general_plugins'"
    assert found["vllm.v1.core.sched.async_scheduler:AsyncScheduler"] == "moved to vllm.v1.elsewhere"
    assert found["vllm.v1.request:Request"] == "is gone"
    abstract = {target: problem for target, problem in found.items() if problem and problem.startswith("is abstract")}
    assert set(abstract) == {"vllm.v1.outputs:AsyncModelRunnerOutput.get_it_anew"}
    assert abstract.popitem()[1] == "is abstract, and _LateTimedOutput does not define it"
    with pytest.raises(ValueError, match=r"has no vllm/__init__\.py"):
        check_vllm.Sources(tmp_path)


def test_registering_twice_patches_once():
    from vllm.engine.arg_utils import EngineArgs

    from vllm_qfilters.frontend.plugin import register

    register()
    patched = EngineArgs.add_cli_args
    register()
    assert EngineArgs.add_cli_args is patched


def test_options_change_what_memory_is_planned_for_and_not_what_was_compiled(tiny_model):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.startup_plan import compute_plan_fingerprint

    from vllm_qfilters.frontend.engine_args import kv_compression

    def hashes(**engine_args):
        config = EngineArgs(str(tiny_model), skip_tokenizer_init=True, **engine_args).create_engine_config()
        return (
            VllmConfig.compute_hash.__wrapped__(config),
            config.compute_hash(),
            compute_plan_fingerprint(config, 0, 1),
        )

    plain, one, other = hashes(), hashes(**kv_compression(budget=512)), hashes(**kv_compression(budget=1024))
    assert plain[0] == plain[1] != one[1] == other[1]
    assert len({plain[2], one[2], other[2]}) == 3
    assert one[0] != other[0], "vLLM no longer compiles anew for other options: the patch can go"
    users = kv_compression(budget=512)
    users["additional_config"]["of the user"] = 1
    assert hashes(**users)[1] != one[1]


def test_engine_arguments_without_the_flag_are_untouched(tiny_model):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(tiny_model)]))
    assert (arguments.scheduler_cls, arguments.worker_cls, arguments.additional_config) == (None, "auto", {})


def test_each_of_several_api_servers_has_compression(tiny_model):
    """Such a process makes its engine arguments of the parent's, with vLLM's own method: it loads plugins only while it
    does so."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--model", str(tiny_model), "--kv-compression", "streaming", "--additional-config", '{"mine": 1}']
    args = parser.parse_args(flags)
    of_parent = AsyncEngineArgs.from_cli_args(args)
    unpatched = EngineArgs.__dict__["from_cli_args"].__func__.__wrapped__
    of_child = unpatched(AsyncEngineArgs, args)
    assert of_child == of_parent == AsyncEngineArgs.from_cli_args(args)
    assert of_child.additional_config["mine"] == 1
    assert KVCompressionConfig.from_dict(of_child.additional_config["kv_compression"]).method == "streaming"


def test_the_flag_and_dotted_keys_reach_the_engine_arguments(tiny_model):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--model", str(tiny_model), "--kv-compression", "qfilters", "--kv-compression-config.budget", "1024"]
    flags += ["--kv-compression-config.window", "0.25", "--additional-config", '{"mine": 1}']
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args(flags))
    compression = arguments.additional_config["kv_compression"]
    assert (compression["method"], compression["budget"], compression["window"]) == ("qfilters", 1024, 0.25)
    assert arguments.additional_config["mine"] == 1
    assert arguments.scheduler_cls.endswith("QFiltersScheduler") and arguments.worker_cls.endswith("QFiltersCPUWorker")


def test_json_and_dotted_keys_are_merged(tiny_model):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--model", str(tiny_model), "--kv-compression", "qfilters"]
    flags += ["--kv-compression-config", '{"budget": 512, "window": 32}', "--kv-compression-config.sinks", "8"]
    flags += ["--kv-compression-config", '{"window": 64}']
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args(flags))
    compression = arguments.additional_config["kv_compression"]
    assert (compression["budget"], compression["sinks"]) == (512, 8) and compression["window"] in (32, 64)


def test_the_help_lists_the_catalogue():
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    said = "".join(argparse.ArgumentParser.format_help(parser).split())  # vLLM's own says less, and both wrap
    for name, entry in METHODS.items():
        assert "".join(f"{name}: {entry.summary}".split()) in said
    defaults = resolve(KVCompressionConfig()).to_dict()
    assert "".join(json.dumps({name: defaults[name] for name in defaults if name != "method"}).split()) in said


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--kv-compression-config.budget", "1024"], "does nothing without --kv-compression"),
        (["--kv-compression", "qfilters", "--kv-compression-config.budgt", "1"], "unknown KV compression option budgt"),
        (
            ["--kv-compression", "streaming", "--kv-compression-config.rank", "4"],
            "rank=4 does nothing with method 'streaming': drop it, or choose method 'qfilters'",
        ),
        (
            ["--kv-compression", "qfilters", "--kv-compression-config.method", "knorm"],
            "the method is named by --kv-compression",
        ),
        (["--kv-compression", "qfilters", "--kv-compression-config.budget", "0"], "budget=0"),
        (
            ["--kv-compression", "qfilters", "--kv-compression-config.endpoint", "true", "--disable-log-stats"],
            "endpoint=True lists what vLLM's statistics carry: drop --disable-log-stats",
        ),
        (
            ["--kv-compression", "qfilters", "--worker-cls", "other.Worker"],
            "--worker-cls other.Worker cannot be combined",
        ),
    ],
)
def test_bad_flags_are_refused(flags, reason, tiny_model):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(ValueError, match=reason):
        AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(tiny_model), *flags]))
