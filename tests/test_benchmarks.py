"""``python -m benchmarks``: tables, ratios and plots from made-up numbers. Measuring itself is for whoever asks for
it.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks import case
from benchmarks.__main__ import CASES

STANDALONE = ("operators", "gpu_kernels")  # start no engine, measure no variants


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
    _, child = run("throughput", monkeypatch, tmp_path, str(tiny_model), *options)
    bytes_per_token = 3 * 2 * 2 * 32 * 4  # layers, keys and values, KV heads, head size, float32
    assert {job["kv_cache_memory_bytes"] for job in child.jobs.values()} == {4 * 400 * bytes_per_token // 4}


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


def test_without_a_case_they_are_listed(monkeypatch, capsys):
    main = importlib.import_module("benchmarks.__main__").main
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert main() == 2
    printed = capsys.readouterr().out
    assert all(name in printed and importlib.util.find_spec(f"benchmarks.{name}") for name in CASES)
