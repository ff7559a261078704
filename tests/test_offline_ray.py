"""``vllm-qfilters generate --ray N`` with made-up engines in real processes of Ray's, and once with real ones."""

import functools
import json
import os
import pathlib

import pytest
import ray
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from tests import fake_engines
from tests.engines import keep_alive
from vllm_qfilters import KVCompressionConfig, commands, kv_compression
from vllm_qfilters.commands import engine
from vllm_qfilters.commands.arguments import UsageError
from vllm_qfilters.commands.generate import offline
from vllm_qfilters.commands.generate import ray as offline_ray
from vllm_qfilters.commands.generate.command import batch_generator
from vllm_qfilters.commands.generate.offline import Request
from vllm_qfilters.messages import QFiltersModelRunnerOutput, QFiltersSchedulerOutput
from vllm_qfilters.plan import CompactionPlan, RequestCompaction
from vllm_qfilters.worker.cpu_worker import QFiltersCPUWorker

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path):
    """Where engines note what they are given."""
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def batches_given(folder) -> list[list[str]]:
    """By process."""
    return sorted(log.read_text().split() for log in folder.iterdir() if log.name.isdecimal())


def test_answers_come_in_order_and_what_an_engine_dies_of_once_is_generated_again(folder):
    prompts = ["slow 1", "b", "c", "die once", "refused", "f", "g"]
    requests = [Request(number, prompt=prompt) for number, prompt in enumerate(prompts, start=1)]
    with offline_ray.ray_engines(functools.partial(fake_engines.echo, folder), 2, gpus_per_engine=0) as engines:
        answers = list(engines([requests[start : start + 2] for start in range(0, len(requests), 2)]))
    texts = [[getattr(answer, "text", None) for answer in batch] for batch in answers]
    assert texts == [["SLOW 1", "B"], ["C", "DIE ONCE"], [None, "F"], ["G"]]
    given = batches_given(folder)
    assert sorted(batch for process in given for batch in process) == ["1,2", "3,4", "3,4", "5,6", "7"]
    assert len(given) == 3 and ["3,4"] in given, "the batch went to a new process"


def test_a_batch_that_ends_every_engine_ends_the_run_and_the_same_command_continues(folder, tmp_path):
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("a", "b", "die always", "d")))
    start = functools.partial(fake_engines.echo, folder)

    def run():
        with offline_ray.ray_engines(start, 1, gpus_per_engine=0) as engines:
            return offline.run(offline.read_input(path), output, lambda: engines, batch_size=1)

    with pytest.raises(UsageError, match=f"input lines 3 to 3: their engine died {offline_ray.TRIES} times"):
        run()
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == ["A", "B"]
    assert sum(process.count("3") for process in batches_given(folder)) == offline_ray.TRIES
    path.write_text(path.read_text().replace("die always", "raise once"))
    assert run() == (4, 2, 0)
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == ["A", "B", "RAISE ONCE", "D"]


def test_an_engine_that_does_not_start_says_why():
    with (
        offline_ray.ray_engines(fake_engines.no_engine, 2, gpus_per_engine=0) as engines,
        pytest.raises(UsageError, match=r"^no such model$"),
    ):
        list(engines([[Request(1, prompt="a")]]))


@pytest.mark.parametrize(
    "nodes, num_engines, gpus, cores",
    [
        ([{"CPU": 8.0}], 2, 0, 4),
        ([{"CPU": 3.0}, {"CPU": 1.0}], 2, 0, 1),
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}], 4, 2, 1),
        (
            [{"CPU": 16.0, "GPU": 3.0}, {"CPU": 16.0, "GPU": 3.0}],
            3,
            2,
            "3: with 2 GPUs and a core for each engine .* room for 2",
        ),
        ([{"CPU": 16.0}, {"CPU": 1.0, "GPU": 8.0}], 2, 1, "2: with 1 GPUs and a core for each engine .* room for 1"),
        ([{"CPU": 2.0}], 4, 0, "4: with a core for each engine the cluster has room for 2"),
    ],
)
def test_engines_share_out_the_cores_or_are_refused(nodes, num_engines, gpus, cores):
    if isinstance(cores, int):
        assert offline_ray.cores_per_engine(nodes, num_engines, gpus) == cores
    else:
        with pytest.raises(UsageError, match=f"--ray {cores}"):
            offline_ray.cores_per_engine(nodes, num_engines, gpus)


def test_two_real_engines_say_what_one_says(model_with_tokenizer, tiny_filters, tmp_path):
    path = tmp_path / "in.jsonl"
    prompts = [" ".join(f"w{3 + (7 * line + i) % 500}" for i in range(120 + 30 * line)) for line in range(6)]
    path.write_text("".join(json.dumps({"prompt": prompt, "id": prompt[:6]}) + "\n" for prompt in prompts))
    argv = [str(model_with_tokenizer), "--input", str(path), "--batch-size", "2", "--max-tokens", "40"]
    argv += ["--kv-compression-config.filters", str(tiny_filters[0]), "--kv-compression-config.budget", "128"]
    argv += ["--kv-compression-config.interval", "32", "--kv-compression-config.chunk", "64", "--enforce-eager"]
    argv += ["--dtype", "float32", "--block-size", "32", "--kv-cache-memory-bytes", "16M", "--max-model-len", "1024"]
    output, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    assert commands.main(["generate", *argv, "--output", str(output), "--ray", "2"]) == 0
    # Not by the command: it ends its engine, and with it what engines of other tests in this process need.
    engine_args = EngineArgs.from_cli_args(
        engine.parse("generate", commands.load("generate"), [*argv, "--output", str(alone)])
    )
    llm = keep_alive(LLM.from_engine_args(engine_args))
    generate_batch = batch_generator(llm, max_tokens=40, temperature=0.0)
    offline.run(offline.read_input(path), alone, lambda: functools.partial(map, generate_batch), batch_size=2)
    written = output.read_text()
    assert written == alone.read_text() and written.count("\n") == 6
    assert [json.loads(line)["id"] for line in written.splitlines()] == [prompt[:6] for prompt in prompts]


def test_configuration_plans_and_scores_survive_the_way_to_other_machines(tiny_model):
    """As vLLM's Ray executor sends them, which cannot run here."""

    def sent(message):
        return ray.cloudpickle.loads(ray.cloudpickle.dumps(message))

    args = EngineArgs(str(tiny_model), skip_tokenizer_init=True, **kv_compression("random_once", budget=512))
    config = sent(args.create_engine_config())
    assert resolve_obj_by_qualname(config.parallel_config.worker_cls) is QFiltersCPUWorker
    assert KVCompressionConfig.from_vllm_config(config) == KVCompressionConfig(method="random_once", budget=512)
    row = RequestCompaction("a", 40, 40, 2, 0, 1, block_ids=(5, 6), copied_pages=((1, 6),))
    output = QFiltersSchedulerOutput.from_output(SchedulerOutput.make_empty(), CompactionPlan((row,)))
    output.pages_to_score = (3,)
    assert sent(output) == output and sent(output).compaction.compactions == (row,)
    answer = QFiltersModelRunnerOutput.from_output(ModelRunnerOutput(["a"], {"a": 0}, [[7]]), page_scores=(0.5,))
    assert sent(answer).page_scores == (0.5,) and sent(answer).sampled_token_ids == [[7]]
