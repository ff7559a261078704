"""``python -m benchmarks``: tables, ratios and plots from made-up numbers. Measuring itself is for whoever asks for
it.
"""

import argparse
import http.server
import importlib.util
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import threading
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from benchmarks import case, gpu_all, llama_cpp, peers, readme, to_gguf
from benchmarks.__main__ import CASES
from tests.models import make_tiny_tokenizer
from vllm_qfilters.commands.evaluation import command as evaluation

STANDALONE = ("operators", "gpu_kernels", "gpu_all", "readme")  # measure no variants


class FakeChild:
    """Stands for the process a variant is measured in: every number is the place of the variant in the round, from 1
    on.
    """

    def __init__(self, columns, absent=()):
        self.columns, self.absent = columns, absent
        self.jobs = {}

    def __call__(self, variant, job):
        self.jobs.setdefault(variant, job)
        if variant in self.absent:
            raise case.NotMeasured("no such package")
        number = float(1 + list(self.jobs).index(variant))
        of_context = dict.fromkeys(("step_ms", "mean_step_ms", "ttft_s", "prefill_s", "pages_per_sequence"), number)
        extra = {"running": [(0.0, 1), (1.0, 2)], "preemptions": 3, "percent_of_decode": {"a": number}}
        extra["token_ids"] = [[number]]
        extra["contexts"] = {str(context): of_context for context in job.get("contexts", (1000, 2000))}
        return {**dict.fromkeys(self.columns, number), **extra}


def run(name, monkeypatch, tmp_path, *options, absent=()):
    module = importlib.import_module(f"benchmarks.{name}")
    child = FakeChild(module.CASE.columns, absent)
    monkeypatch.setattr(case, "_run_child", child)
    monkeypatch.setattr(sys, "argv", [f"python -m benchmarks {name}", *options, "--output", str(tmp_path / "out.json")])
    return module.main(), child


@pytest.mark.parametrize("name", [name for name in CASES if name not in STANDALONE])
def test_a_case_prints_writes_and_draws(name, tiny_model, monkeypatch, tmp_path, capsys):
    status, child = run(name, monkeypatch, tmp_path, str(tiny_model), "--rounds", "2")
    assert status == (1 if name == "identity" else 0), "identity's made-up numbers differ"
    result = json.loads((tmp_path / "out.json").read_text())
    assert [list(of_round) for of_round in result["rounds"]] == 2 * [list(child.jobs)]
    assert result["case"] == name and result["run"]["command"].startswith(f"python -m benchmarks {name} ")
    assert len(result["ratios"]) == 2 and result["ratios"][0]
    printed = capsys.readouterr().out
    assert all(variant in printed for variant in child.jobs) and all(ratio in printed for ratio in result["ratios"][0])
    has_plot = importlib.import_module(f"benchmarks.{name}").CASE.draw is not None
    assert (tmp_path / "out.png").exists() == has_plot


def test_ratios_are_over_plain(tiny_model, monkeypatch, tmp_path):
    run("throughput", monkeypatch, tmp_path, str(tiny_model), "--rounds", "1", "--methods", "knorm", "qfilters")
    ratios = json.loads((tmp_path / "out.json").read_text())["ratios"][0]
    assert (
        ratios["knorm: requests per second over plain"] == 2 and ratios["qfilters: requests per second over plain"] == 3
    )
    assert ratios["qfilters: time to the first token, plain's over its"] == 0.33


def test_the_cache_of_throughput_is_a_share_of_what_the_load_needs(tiny_model, monkeypatch, tmp_path):
    options = ["--requests", "4", "--prompt", "300", "--output-tokens", "100", "--cache", "0.25"]
    options += ["--llm", '{"dtype": "float32"}']
    _, child = run("throughput", monkeypatch, tmp_path, str(tiny_model), *options)
    bytes_per_token = 3 * 2 * 2 * 32 * 4  # layers, keys and values, KV heads, head size, float32
    assert {job["kv_cache_memory_bytes"] for job in child.jobs.values()} == {4 * 400 * bytes_per_token // 4}


def test_agents_share_a_cache_of_what_their_histories_take(tiny_model, monkeypatch, tmp_path):
    options = ["--kinds", "2", "--agents", "4", "--turns", "2", "--shared", "300", "--said", "20", "--cache", "0.5"]
    options += ["--output-tokens", "30", "--variants", "plain", "layer, resume", "--llm", '{"dtype": "float32"}']
    _, child = run("agents", monkeypatch, tmp_path, str(tiny_model), *options)
    bytes_per_token = 3 * 2 * 2 * 32 * 4
    assert [job["kv_cache_memory_bytes"] for job in child.jobs.values()] == [1000 * bytes_per_token // 2] * 2
    assert list(child.jobs) == ["plain", "layer, resume"] and child.jobs["layer, resume"]["prefix"] == "resume"
    ratios = json.loads((tmp_path / "out.json").read_text())["ratios"][0]
    assert ratios == {"layer, resume: over plain, both with the prefix cache": 2}


def test_elastic_names_answers_that_differ_and_preemptions():
    elastic = importlib.import_module("benchmarks.elastic")

    def of_round(**of_pressure):
        numbers = {"requests_per_s": 2.0, "evicted_tokens": 0, "preemptions": 0, "answers_sha256": "a"}
        return {
            "plain, cache 0.5": numbers,
            "always, cache 0.5": {**numbers, "requests_per_s": 8.0},
            "pressure, cache 0.5": {**numbers, "requests_per_s": 4.0, **of_pressure},
        }

    assert elastic.problems(of_round()) == elastic.problems(of_round(evicted_tokens=1, answers_sha256="b")) == []
    (differs,) = elastic.problems(of_round(answers_sha256="b"))
    assert differs.startswith("cache 0.5: nothing was evicted")
    assert elastic.problems(of_round(preemptions=2)) == ["cache 0.5: 2 preemptions where evict always has none"]
    assert list(elastic.ratios(of_round()).values()) == [2.0, 0.5]


def test_decode_runs_methods_beside_each_other_and_leaves_the_limits_out_if_told(tiny_model, monkeypatch, tmp_path):
    options = ["--budget", "2048", "--methods", "qfilters", "streaming", "--rounds", "1"]
    _, child = run("decode", monkeypatch, tmp_path, str(tiny_model), *options, "--no-limit")
    assert list(child.jobs) == ["plain", "qfilters 2048", "streaming 2048"]
    ratios = json.loads((tmp_path / "out.json").read_text())["ratios"][0]
    assert ratios["streaming 2048: decode speedup over plain"] == 0.33
    assert not any("limit" in name for name in ratios)
    _, child = run("decode", monkeypatch, tmp_path, str(tiny_model), *options)
    assert child.jobs["limit 2048"] == {**child.jobs["plain"], "contexts": [2048 - 80]}


def test_a_follow_up_is_sent_with_the_answer_and_counts_what_was_read_again(monkeypatch):
    engines = []

    def start(*arguments, **options):
        engines.append(FakeConversations(options))
        return engines[-1]

    follow_up = importlib.import_module("benchmarks.follow_up")
    monkeypatch.setattr(follow_up, "Engine", start)
    job = {"method": "qfilters", "compression": {}, "history": 60, "message": 20, "output_tokens": 5}
    numbers = follow_up.measure({**job, "conversations": 2})
    (engine,) = engines
    assert engine.options == {"max_model_len": 85, "enable_prefix_caching": True}
    assert list(engine.prompts_by_name) == ["0-first", "0-second", "1-first", "1-second"]
    first, second = engine.prompts_by_name["1-first"], engine.prompts_by_name["1-second"]
    assert len(first) == 55 and second[:60] == [*first, *FakeConversations.ANSWER] and len(second) == 80
    assert (numbers["read_tokens"], numbers["read_again_tokens"]) == (80 - 32, 60 - 32)


class FakeConversations:
    """Stands for an engine that answers every prompt in two steps, and finds 32 tokens of it in the prefix cache."""

    ANSWER = (7, 7, 7, 7, 7)
    evicted_tokens = 0

    def __init__(self, options):
        self.options, self.prompts_by_name, self.steps, self.engine = options, {}, 0, self

    def prompts(self, count, num_tokens):
        return [[100 * index + token for token in range(num_tokens)] for index in range(count)]

    def add(self, name, prompt, max_tokens):
        assert not self.has_unfinished_requests() and max_tokens == len(self.ANSWER)
        self.prompts_by_name[name], self.steps = prompt, 4

    def has_unfinished_requests(self):
        return self.steps > 0

    def step(self):
        self.steps -= 1
        answer = types.SimpleNamespace(token_ids=self.ANSWER[: 5 - self.steps])
        outputs = [types.SimpleNamespace(outputs=[answer], num_cached_tokens=32)]
        return [] if self.steps == 3 else outputs  # the prompt is read in two steps


@pytest.mark.parametrize("name, job", [("openvino", {"aggregation": None}), ("llama_cpp", {"shift": False})])
def test_a_peer_is_left_out_where_it_is_not_installed(name, job, tiny_model):
    peer = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(case.NotMeasured, match="--python"):
        peer.measure({"model": str(tiny_model), **job})


@pytest.mark.parametrize("architecture", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_written_as_gguf_is_read_back_bit_by_bit(architecture, dtype, tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture(**shape, **heads), dtype=getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    make_tiny_tokenizer(tmp_path)
    to_gguf.write_gguf(tmp_path, tmp_path / "model.gguf", dtype)
    (tmp_path / "model.safetensors").unlink()
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=getattr(torch, dtype))
    wanted = model.state_dict()
    assert read.state_dict().keys() == wanted.keys()
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_a_model_that_would_be_written_wrong_as_gguf_is_refused(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    for config in (LlamaConfig(rope_parameters=rope), Gemma2Config()):
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="with RoPE of type"):
            to_gguf.write_gguf(tmp_path, tmp_path / "model.gguf", "float32")


def test_tokens_of_an_answer_that_arrive_at_once_share_their_seconds():
    answers = [{"tokens": [5]}, {"tokens": [6]}, {"tokens": []}, {"tokens": [7, 8]}]
    events = [{**answer, "stop": False} for answer in answers]
    events.append({"tokens": [], "stop": True, "tokens_evaluated": 9, "tokens_cached": 12})
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            for event in events:
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("localhost", 0), Server) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        answer = llama_cpp.Answer(f"http://localhost:{server.server_port}", [1, 2, 3], 4).wait()
        thread.join()
    assert asked[0]["prompt"] == [1, 2, 3] and asked[0]["n_predict"] == 4 and not asked[0]["cache_prompt"]
    assert answer.token_ids == [5, 6, 7, 8] and (answer.prompt_tokens, answer.held_tokens) == (9, 12)
    first, second, third = answer.seconds_of_tokens()
    assert second == third and first > 0 and answer.first_token_seconds > 0


def test_a_prompt_is_cut_in_the_middle_for_a_context_that_shifts():
    prompt = list(range(1000))
    cut = llama_cpp.cut_prompt(prompt, keep=32, context=256)
    assert len(cut) == 256 - peers.ANSWER_TOKENS and cut[:32] == prompt[:32] and cut[32:] == prompt[-len(cut[32:]) :]
    assert llama_cpp.cut_prompt(prompt[:200], keep=32, context=256) == prompt[:200]


def test_variants_whose_packages_are_missing_are_left_out(tiny_model, monkeypatch, tmp_path):
    absent = ("kvpress, expected attention", "kvpress, StreamingLLM")
    status, _ = run("kvpress", monkeypatch, tmp_path, str(tiny_model), "--rounds", "1", absent=absent)
    result = json.loads((tmp_path / "out.json").read_text())
    assert status == 0 and set(result["rounds"][0]) == {"vLLM", "ours", "ours, StreamingLLM", "transformers"}


def test_a_child_is_given_the_command_and_its_job(monkeypatch):
    def start(command, **kwargs):
        assert command == [
            "other-python",
            "-m",
            "benchmarks",
            "decode",
            "MODEL",
            "--measure",
            '{"python": "other-python"}',
        ]
        return subprocess.CompletedProcess(
            command, 0, stdout='INFO log\nmeasured: {"step_ms": 2}\nINFO bye\n', stderr=""
        )

    monkeypatch.setattr(case.subprocess, "run", start)
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks decode", "MODEL"])
    assert case._run_child("ours", {"python": "other-python"}) == {"step_ms": 2}


def test_a_variant_that_a_signal_ended_is_named_with_it(monkeypatch):
    monkeypatch.setattr(case.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -8, "", ""))
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks openvino", "MODEL"])
    with pytest.raises(SystemExit, match="OpenVINO failed, ended by SIGFPE:"):
        case._run_child("OpenVINO", {})


def test_without_a_case_they_are_listed(monkeypatch, capsys):
    main = importlib.import_module("benchmarks.__main__").main
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert main() == 2
    printed = capsys.readouterr().out
    assert all(name in printed and importlib.util.find_spec(f"benchmarks.{name}") for name in CASES)


CLEAN = {"date": "1", "cpu": "Xeon, 2 cores", "isa": "AMX", "commit": "abc", "command": "one"}


class FakeParts:
    """Stands for the processes that ``readme`` starts: writes their files with made-up numbers.

    Attributes:
        started: names of what was run: cases, and tasks with their length.
        fails: of these, the ones that end with status 3, before they write.
        change: called while a part runs.
    """

    def __init__(self):
        self.started, self.fails, self.change = [], (), lambda: None

    def __call__(self, command, cwd, env):
        assert cwd == readme.ROOT and env["PYTHONPATH"].startswith(str(readme.ROOT))
        options = dict(itertools.pairwise(command))
        name = command[3] if "benchmarks" in command else options["--tasks"] + options.get("--lengths", "")
        self.started.append(name)
        self.change()
        path = pathlib.Path(options["--output"])
        if name in self.fails:
            return subprocess.CompletedProcess(command, 3)
        if name == "decode":
            path.write_text(json.dumps(made_up_decode()))
        elif path.name == readme.QUALITY:
            path.write_text(json.dumps(made_up_quality()))
        else:
            path.write_text("{}")
        return subprocess.CompletedProcess(command, 0)


def made_up_decode():
    def numbers(slope, number):
        return {"contexts": {str(c): {"mean_step_ms": 40 + slope * c + number} for c in (2048, 4096, 7000)}}

    slopes = {"plain": 0.01, "qfilters 2048": 0.001, "streaming 2048": 0.0}
    rounds = [{name: numbers(slope, number) for name, slope in slopes.items()} for number in range(3)]
    return {"options": {"sequences": 8}, "rounds": rounds}


def made_up_quality():
    def cell(method, budget, loss):
        blocks = [[loss - 0.1, loss, loss + 0.1 + 0.01 * bool(budget)]]
        named = {"task": "streaming", "method": method, "budget": budget}
        return {**named, "loss": loss, "texts": ["prose"], "block_losses": blocks}

    cells = [cell("full", 0, 2.0)]
    for method, more in (("qfilters", 100), ("streaming", 130)):
        cells += [cell(method, budget, 2 + more / budget) for budget in (512, 1024, 2048, 4096)]
    tasks = {"streaming": {"tokens": 7168, "loss_from": 3072}}
    return {"version": 1, "model": "M", "runs": [], "tasks": tasks, "engines": [], "cells": cells}


@pytest.fixture
def parts(monkeypatch, tmp_path):
    started = FakeParts()
    monkeypatch.setattr(readme.subprocess, "run", started)
    monkeypatch.setattr(readme, "STAGED", tmp_path / "build" / "readme")
    monkeypatch.setattr(readme, "describe_run", lambda: dict(CLEAN))
    return started


def run_readme(monkeypatch, tmp_path, *options):
    argv = ["python -m benchmarks readme", "M", "--output", str(tmp_path / "results"), *options]
    monkeypatch.setattr(sys, "argv", argv)
    return readme.main()


ALL_PARTS = ["decode", "throughput", "follow_up", "streaming", "passkey8000", "ruler8000", "generation"]
FILES = {f"readme-{name}.json" for name in ("decode", "throughput", "follow-up", "quality")}
PLOTS = {"readme-loss.png", "readme-decode.png"}


def test_readme_measures_all_parts_and_draws(parts, monkeypatch, tmp_path, capsys):
    assert run_readme(monkeypatch, tmp_path) == 0
    assert parts.started == ALL_PARTS
    assert {path.name for path in (tmp_path / "results").iterdir()} == FILES | PLOTS
    progress = capsys.readouterr().err
    assert "part 1 of 7, decode, after 0 minutes: " in progress and "part 7 of 7, generation" in progress


def test_readme_goes_on_after_the_parts_that_are_finished(parts, monkeypatch, tmp_path):
    parts.fails = ("passkey8000",)
    assert run_readme(monkeypatch, tmp_path) == 3
    assert not (tmp_path / "results").exists(), "a part is missing"
    parts.fails, parts.started = (), []
    monkeypatch.setattr(readme, "describe_run", lambda: {**CLEAN, "date": "2", "command": "two"})
    assert run_readme(monkeypatch, tmp_path) == 0
    assert parts.started == ["passkey8000", "ruler8000", "generation"]


@pytest.mark.parametrize("key, value", [("commit", "def"), ("cpu", "EPYC, 2 cores"), ("isa", "AVX2")])
def test_readme_measures_again_what_is_of_another_commit_or_machine(key, value, parts, monkeypatch, tmp_path):
    run_readme(monkeypatch, tmp_path)
    parts.started = []
    monkeypatch.setattr(readme, "describe_run", lambda: {**CLEAN, key: value})
    assert run_readme(monkeypatch, tmp_path) == 0
    assert parts.started == ALL_PARTS


def test_readme_measures_again_in_more_rounds(parts, monkeypatch, tmp_path):
    run_readme(monkeypatch, tmp_path, "--rounds", "3")
    parts.started = []
    run_readme(monkeypatch, tmp_path, "--rounds", "5")
    assert parts.started == ALL_PARTS


@pytest.mark.parametrize("commit", ["abc+changes", None])
def test_readme_refuses_a_tree_with_changes(commit, parts, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(readme, "describe_run", lambda: {**CLEAN, "commit": commit})
    with pytest.raises(SystemExit) as stopped:
        run_readme(monkeypatch, tmp_path)
    assert stopped.value.code == 2 and not parts.started
    assert str(commit) in capsys.readouterr().err
    for _ in range(2):
        parts.started = []
        assert run_readme(monkeypatch, tmp_path, "--allow-dirty") == 0
        assert parts.started == ALL_PARTS, "what is finished of a tree with changes does not count"


def test_readme_discards_what_was_measured_while_the_tree_changed(parts, monkeypatch, tmp_path):
    def change():
        if parts.started[-1] == "passkey8000":
            monkeypatch.setattr(readme, "describe_run", lambda: {**CLEAN, "commit": "abc+changes"})

    parts.change = change
    assert run_readme(monkeypatch, tmp_path) == 1
    monkeypatch.setattr(readme, "describe_run", lambda: dict(CLEAN))
    parts.change, parts.started = lambda: None, []
    assert run_readme(monkeypatch, tmp_path) == 0
    assert parts.started == ["streaming", "passkey8000", "ruler8000", "generation"], "they share a file"


def test_readme_copies_files_once_no_part_is_missing(parts, monkeypatch, tmp_path, capsys):
    """A file among the results is a change of the tree, which would keep other parts from being measured."""
    assert run_readme(monkeypatch, tmp_path, "--only", "loss", "decode") == 0
    assert parts.started == ["decode", "streaming"] and not (tmp_path / "results").exists()
    assert "once these are: throughput, follow_up, needles, ruler, generation" in capsys.readouterr().out
    assert run_readme(monkeypatch, tmp_path) == 0
    assert {path.name for path in (tmp_path / "results").iterdir()} == FILES | PLOTS


def test_the_plots_of_readme_are_drawn_alike_each_time(parts, monkeypatch, tmp_path):
    run_readme(monkeypatch, tmp_path)
    before = {name: (tmp_path / "results" / name).read_bytes() for name in PLOTS}
    parts.started = []
    assert run_readme(monkeypatch, tmp_path, "--plots") == 0
    assert not parts.started
    assert before == {name: (tmp_path / "results" / name).read_bytes() for name in PLOTS}


def test_a_dry_run_of_readme_leaves_results_alone(parts, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks readme", "M", "--dry-run"])
    with pytest.raises(SystemExit):
        readme.main()
    assert "give it an --output" in capsys.readouterr().err
    run_readme(monkeypatch, tmp_path)
    parts.started = []
    assert run_readme(monkeypatch, tmp_path, "--dry-run", "--only", "throughput") == 0
    assert run_readme(monkeypatch, tmp_path) == 0
    assert parts.started == ["throughput"], "what is finished of the real run still counts"


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", readme.CASES)
def test_the_cases_know_the_options_that_readme_gives_them(name, dry_run, tiny_model, monkeypatch, tmp_path):
    sizes = (readme.DRY_RUN_SIZES if dry_run else readme.SIZES)[name]
    status, child = run(name, monkeypatch, tmp_path, str(tiny_model), *sizes.split(), "--rounds", "3")
    result = json.loads((tmp_path / "out.json").read_text())
    assert status == 0 and len(result["rounds"]) == 3 and "isa" in result["run"]
    assert any("streaming" in variant for variant in child.jobs)
    if name == "decode":
        readme.draw_decode(FakePanel(), tmp_path / "out.json")


class FakePanel:
    """Stands for matplotlib's Axes: takes everything."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("sizes", [readme.SIZES, readme.DRY_RUN_SIZES], ids=["readme", "dry-run"])
def test_eval_knows_the_options_that_readme_gives_it(sizes):
    parser = argparse.ArgumentParser()
    evaluation.add_arguments(parser)
    engine_options = ["--kv-cache-memory-bytes"]
    parser.add_argument(*engine_options, type=int)
    for name in sizes.keys() - set(readme.CASES):
        args = parser.parse_args([*sizes[name].split(), *readme.EVAL_OPTIONS.split()])
        assert args.methods == ["qfilters", "streaming"]
        if sizes is readme.SIZES and args.tasks in (["passkey"], ["ruler"]):
            (length,), (fraction,) = args.lengths, args.fractions
            assert math.ceil(fraction * length) == readme.BUDGET
        elif sizes is readme.SIZES:
            assert readme.BUDGET in args.budgets


def test_the_check_for_gpus_writes_what_it_found_after_each_part(tmp_path):
    """A dry run of the part that needs no engine."""
    command = ["scripts/gpu_all.sh", "--dry-run", "--only", "timings", "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["dry_run"] and result["run"]["torch"]
    part = result["parts"]["timings"]
    assert part["status"] == "passed" and part["results"]["dry_run"] and part["memory_mib"]["most"] is None


def test_a_part_that_takes_too_long_is_stopped_and_the_file_says_so(monkeypatch, tmp_path):
    program = "print('begun', flush=True); import time; time.sleep(600)"
    sleeps = gpu_all.Part("sleeps", [sys.executable, "-c", program], 5)
    monkeypatch.setattr(gpu_all, "dry_parts", lambda llm: [sleeps])
    monkeypatch.setattr(gpu_all, "BUILD", tmp_path)
    monkeypatch.setattr(gpu_all, "LEAST_SECONDS", 1)
    monkeypatch.setattr(sys, "argv", ["gpu_all", "--dry-run"])
    assert gpu_all.main() == 1
    found = json.loads((tmp_path / "gpu_all.json").read_text())["parts"]["sleeps"]
    assert found["status"] == "stopped after 5 s" and found["last_lines"] == ["begun"]
    assert gpu_all.run(sleeps, 0.5)["status"] == "not started, no time left"


def test_a_start_is_of_the_server_that_was_asked_for():
    start = importlib.import_module("benchmarks.start")
    job = {"model": "M", "kv_cache_memory_bytes": 7, "compiled": False, "llm": {"dtype": "float32", "seed": 3}}
    plain = start.command({**job, "method": None, "budget": 5, "options": {"sinks": 2}}, 8000)
    assert pathlib.Path(plain[0]).name == "vllm"
    expected = "serve M --port 8000 --kv-cache-memory-bytes 7 --enforce-eager --dtype float32 --seed 3"
    assert plain[1:] == expected.split()
    ours = start.command({**job, "method": "knorm", "budget": 5, "options": {"sinks": 2}, "compiled": True}, 8000)
    assert "--enforce-eager" not in ours and ours[-3:-1] == ["knorm", "--kv-compression-config"]
    assert json.loads(ours[-1]) == {"budget": 5, "sinks": 2}
