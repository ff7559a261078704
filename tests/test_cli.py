"""The command ``vllm-qfilters``: its arguments and errors without an engine, and one run of each command with one."""

import argparse
import contextlib
import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from tests.forks import in_forks
from tests.models import HEAD_SIZE, NUM_KV_HEADS, NUM_LAYERS, VOCAB, tiny_identity
from vllm_qfilters import commands, kv_compression
from vllm_qfilters.commands import calibrate, engine
from vllm_qfilters.commands.arguments import UsageError
from vllm_qfilters.commands.evaluation.engine import Progress, serve
from vllm_qfilters.commands.generate.command import batch_generator
from vllm_qfilters.commands.generate.offline import Refusal, Request
from vllm_qfilters.filters.format import STORED_RANK
from vllm_qfilters.filters.reader import load


class FakeLLM:
    """Stands for vLLM's LLM: answers a prompt with its own text, refuses two of them."""

    def __init__(self, max_model_len=4096, num_blocks=65, block_size=128, layer_types=("full_attention",)):
        cache = SimpleNamespace(num_gpu_blocks=num_blocks, block_size=block_size)
        self.model_config = SimpleNamespace(
            max_model_len=max_model_len,
            get_vocab_size=lambda: 100,
            get_total_num_hidden_layers=lambda: len(layer_types),
            get_sliding_window=lambda: 128,
            is_hybrid=False,
            hf_text_config=SimpleNamespace(layer_types=list(layer_types)),
        )
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(
                cache_config=cache,
                model_config=self.model_config,
                scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
                parallel_config=SimpleNamespace(pipeline_parallel_size=1),
                additional_config=kv_compression()["additional_config"],
            ),
            engine_core=SimpleNamespace(shutdown=lambda timeout: self.shutdowns.append(timeout)),
        )
        self.shutdowns, self.calls, self.params, self.queue = [], [], [], []
        self.engine_args = None
        self.finish_reason = "stop"

    def collective_rpc(self, method, args):
        self.calls.append((method, *args))
        return ["/cache/tiny.safetensors"]

    def get_tokenizer(self):
        return SimpleNamespace(encode=lambda text: [int(word) for word in text.split()])

    def enqueue(self, prompt, params, use_tqdm):
        if prompt == "too long":
            raise VLLMValidationError("prompt is\ntoo long")
        if params.extra_args == {"kv_budget": 1}:
            raise ValueError("kv_budget=1: too small")
        self.params.append(params)
        self.queue.append(prompt)

    def enqueue_chat(self, messages, params, use_tqdm):
        self.enqueue(" ".join(message["content"] for message in messages), params, use_tqdm)

    def wait_for_completion(self, output_type, use_tqdm):
        prompts, self.queue = self.queue, []
        return [
            SimpleNamespace(
                prompt_token_ids=[1] * len(prompt),
                outputs=[SimpleNamespace(text=prompt.upper(), finish_reason=self.finish_reason, token_ids=[1, 2])],
            )
            for prompt in prompts
        ]


@pytest.fixture
def started(monkeypatch):
    """What engines were started with (``args``), the one that starts (``next``), or why none does (``error``)."""
    engines = SimpleNamespace(args=[], next=FakeLLM(), error=None)

    def from_engine_args(engine_args):
        engines.args.append(engine_args)
        if engines.error is not None:
            raise engines.error
        return engines.next

    monkeypatch.setattr(vllm.LLM, "from_engine_args", from_engine_args)
    return engines


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"prompt": "a", "kv_budget": 512}\n{"messages": [{"role": "user", "content": "b"}], "temperature": 1}\n'
    )
    return path


GENERATE = ["generate", "MODEL", "--input", "in.jsonl", "--output", "out.jsonl"]


def run(argv, model):
    """The exit status of the command; MODEL stands for ``model``."""
    try:
        return commands.main([str(model) if arg == "MODEL" else arg for arg in argv])
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize("argv, status", [([], 2), (["frobnicate"], 2), (["--help"], 0), (["--version"], 0)])
def test_without_a_subcommand(argv, status):
    assert run(argv, "") == status


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "calibrate",
            [
                "--text FILE",
                "-o FILE",
                "--sequences N",
                "--tokens N",
                "--rank N",
                "vllm-qfilters calibrate Qwen/",
                "--help=all",
            ],
        ),
        (
            "eval",
            ["--methods METHOD", "-o FILE", "passkey", "the King James Bible", "qfilters:window=0.25", "--help=all"],
        ),
        ("inspect", ["--prompt-file FILE", "-o FILE", "--max-tokens N", "shaded", "-config.budget 512", "--help=all"]),
        (
            "generate",
            ["--input FILE", "--max-tokens N", "--batch-size N", "--ray N", '{"prompt": "..."}', "-config.budget 1024"],
        ),
    ],
)
def test_help_teaches(name, words, capsys):
    assert run([name, "--help"], "") == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)


def test_help_needs_neither_vllm_nor_a_command():
    heavy = ["vllm", "torch", "numpy", "vllm_qfilters.commands.evaluation", "vllm_qfilters.commands.inspection"]
    code = f"import sys, vllm_qfilters.commands; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_options_are_none_of_vllm(name, tiny_model):
    required = ["--input", "a", "--output", "b"] if name == "generate" else []
    command = commands.load(name)
    args = vars(engine.parse(name, command, [str(tiny_model), *required]))
    of_vllm = {field.name for field in dataclasses.fields(EngineArgs)}
    options = argparse.ArgumentParser(add_help=False)
    command.add_arguments(options)
    own = {"model_tag", *(action.dest for action in options._actions)}
    assert own <= set(args) and not own & of_vllm
    assert set(command.ENGINE_DEFAULTS) <= of_vllm | {"kv_compression"}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["calibrate"], "which MODEL?"),
        (["calibrate", "MODEL", "--model", "MODEL"], "name one model"),
        (["calibrate", "./nowhere"], "./nowhere: no such model folder"),
        (["calibrate", "MODEL", "--text", "missing.txt"], "missing.txt: No such file"),
        (["calibrate", "MODEL", "--text", "."], "Is a directory"),
        (["calibrate", "MODEL", "--text", "latin1.txt"], "latin1.txt is not a UTF-8 text"),
        (["calibrate", "MODEL", "-o", "."], "is a folder"),
        (["calibrate", "MODEL", "-o", "missing/f.safetensors"], "missing is no folder"),
        (["calibrate", "MODEL", "--sequences", "0"], "'0' is no integer >= 1"),
        (["calibrate", "MODEL", "--rank", "0"], "'0' is no integer >= 1"),
        (["calibrate", "MODEL", "--tokens", "many"], "'many' is no integer >= 1"),
        (["calibrate", "MODEL", "--kv-compression", "qfilters"], "calibration needs no --kv-compression"),
        (["calibrate", "MODEL", "--scheduler-cls", "my.Scheduler"], "cannot be combined with --kv-compression"),
        (["calibrate", "MODEL", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["calibrate", "MODEL", "--config", "missing.yaml"], "missing.yaml: No such file"),
        (["eval", "MODEL", "--kv-compression", "knorm"], "name what to evaluate by --methods"),
        (["eval", "MODEL", "--methods", "magic"], "'magic' is no method"),
        (["eval", "MODEL", "--tasks", "magic"], "invalid choice: 'magic'"),
        (["eval", "MODEL", "--fractions", "1.5"], "'1.5' is no fraction: 0 < F <= 1"),
        (["eval", "MODEL", "--depths", "half"], "'half' is no depth: 0 <= D <= 1"),
        (["eval", "MODEL", "--ruler", "qa"], "invalid choice: 'qa'"),
        (["eval", "MODEL", "--generation-penalty", "0"], "'0' is no repetition penalty: P > 0"),
        (["eval", "MODEL", "-o", "in.jsonl"], "in.jsonl is not JSON"),
        (["inspect", "MODEL"], "which prompt? Give one of --prompt TEXT and --prompt-file FILE"),
        (["inspect", "MODEL", "--prompt", "a", "--prompt-file", "in.jsonl"], "which prompt?"),
        (["inspect", "MODEL", "--prompt", " "], "the prompt is empty"),
        (["inspect", "MODEL", "--prompt-file", "missing.txt"], "missing.txt: No such file"),
        (["inspect", "MODEL", "--prompt-file", "latin1.txt"], "latin1.txt is not a UTF-8 text"),
        (["inspect", "MODEL", "--prompt", "a", "-o", "missing/page.html"], "missing is no folder"),
        (["inspect", "MODEL", "--prompt", "a", "--max-tokens", "1"], "'1' is no integer >= 2"),
        (["generate", "MODEL"], "the following arguments are required: --input, --output"),
        (["generate", "MODEL", "--input", "missing.jsonl", "--output", "o"], "missing.jsonl: No such file"),
        (["generate", "MODEL", "--input", "in.jsonl", "--output", "in.jsonl"], "in.jsonl is the input"),
        (["generate", "MODEL", "--input", "in.jsonl", "--output", "missing/o"], "missing is no folder"),
        (["generate", "MODEL", "--input", "in.jsonl", "--output", "latin1.txt"], "latin1.txt cannot be continued"),
        ([*GENERATE, "--temperature", "nan"], "'nan' is no number >= 0"),
        ([*GENERATE, "--batch-size", "-3"], "'-3' is no integer >= 1"),
        ([*GENERATE, "--ray", "0"], "'0' is no integer >= 1"),
        ([*GENERATE, "--ray", "2", "--distributed-executor-backend", "ray"], "drop --distributed-executor-backend ray"),
        ([*GENERATE, "--kv-compression", "magic"], "invalid choice: 'magic'"),
        ([*GENERATE, "--kv-compression-config", "{budget"], "--kv-compression-config"),
        ([*GENERATE, "--kv-compression-config.budget"], "--kv-compression-config.budget needs a value"),
        ([*GENERATE, "--kv-compression-config.budget", "5"], "budget=5: at least"),
        ([*GENERATE, "--kv-compression-config.bugdet", "5"], "unknown KV compression option bugdet"),
    ],
)
def test_bad_usage_is_one_line_and_starts_nothing(argv, message, prompts, started, tiny_model, capsys):
    prompts.with_name("latin1.txt").write_bytes(b"gr\xfc\xdfe\n")
    assert run(argv, tiny_model) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"vllm-qfilters {argv[0]}: error: ") and message in last
    assert not started.args and not prompts.with_name("out.jsonl").exists()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("it is\ntoo large"),
        OSError("no weights"),
        RuntimeError("Engine core initialization failed. See above."),
    ],
)
def test_an_engine_that_does_not_start_is_one_line(error, prompts, started, tiny_model, capsys):
    started.error = error
    assert run(GENERATE, tiny_model) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("vllm-qfilters generate: error: ")


def test_other_failures_of_the_engine_are_not_hidden(prompts, started, tiny_model):
    started.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        run(GENERATE, tiny_model)


def test_generate(prompts, started, tiny_model, capsys):
    options = ["--max-tokens", "7", "--max-model-len", "1k", "--kv-compression-config.budget", "512"]
    assert run([*GENERATE, *options], tiny_model) == 0
    first, second = map(json.loads, prompts.with_name("out.jsonl").read_text().splitlines())
    assert first == {
        "line": 1,
        "id": None,
        "text": "A",
        "finish_reason": "stop",
        "prompt_tokens": 1,
        "completion_tokens": 2,
    }
    assert second["text"] == "B"
    (engine_args,) = started.args
    assert engine_args.model == str(tiny_model) and engine_args.max_model_len == 1000
    assert engine_args.additional_config["kv_compression"]["method"] == "qfilters"
    assert engine_args.additional_config["kv_compression"]["budget"] == 512
    assert [params.extra_args for params in started.next.params] == [{"kv_budget": 512}, None]
    assert [params.temperature for params in started.next.params] == [0, 1]
    assert {params.max_tokens for params in started.next.params} == {7}
    assert len(started.next.shutdowns) == 1
    assert "has all 2 lines; 0 failed" in capsys.readouterr().err


def test_generate_again_starts_nothing(prompts, started, tiny_model, capsys):
    run(GENERATE, tiny_model)
    assert run(GENERATE, tiny_model) == 0
    assert len(started.args) == 1
    assert "2 of them before" in capsys.readouterr().err


def test_failed_lines_make_the_exit_status_1(prompts, started, tiny_model, capsys):
    prompts.write_text('{"prompt": "a"}\n{"prompt": "too long"}\n{"prompt": "b", "kv_budget": 1}\n{"prompt": "c"}\n')
    assert run(GENERATE, tiny_model) == 1
    written = [json.loads(line) for line in prompts.with_name("out.jsonl").read_text().splitlines()]
    assert [record.get("text") for record in written] == ["A", None, None, "C"]
    assert [record.get("error") for record in written] == [None, "prompt is too long", "kv_budget=1: too small", None]
    assert "has all 4 lines; 2 failed" in capsys.readouterr().err
    assert run(GENERATE, tiny_model) == 1, "the finished output still has failures"


def test_a_request_the_engine_gives_up_is_no_completion():
    llm = FakeLLM()
    llm.finish_reason = "error"
    (answer,) = batch_generator(llm, 8, 0.0)([Request(1, prompt="a")])
    assert isinstance(answer, Refusal) and "gave up" in answer.error


def test_an_interrupt_ends_the_engine(prompts, started, tiny_model, capsys):
    def wait_for_completion(output_type, use_tqdm):
        raise KeyboardInterrupt

    started.next.wait_for_completion = wait_for_completion
    assert run(GENERATE, tiny_model) == 130
    assert len(started.next.shutdowns) == 1
    assert "interrupted" in capsys.readouterr().err


def test_calibrate_where_auto_looks(started, tiny_model, capsys):
    assert run(["calibrate", "MODEL", "--sequences", "3", "--tokens", "500", "--seed", "5"], tiny_model) == 0
    ((method, sequences, description, path, rank),) = started.next.calls
    assert method == "calibrate_filters" and path == "" and rank == STORED_RANK
    assert [len(sequence) for sequence in sequences] == [500] * 3
    assert description == "3 sequences of 500 random token ids (seed 5)"
    printed = capsys.readouterr().out
    assert "/cache/tiny.safetensors" in printed and f"vllm serve {tiny_model} --kv-compression qfilters\n" in printed


def test_calibrate_into_a_file(started, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["calibrate", "--model", "MODEL", "--rank", "64", "-o", "my filters"], tiny_model) == 0
    assert started.next.calls[0][3:] == (str(tmp_path / "my filters"), 64)
    assert "--kv-compression-config.filters 'my filters'" in capsys.readouterr().out


@pytest.mark.parametrize("block_size", [None, 32, 256])
def test_calibration_fits_any_block_size(block_size, started, tiny_model):
    assert (
        run(["calibrate", "MODEL", *([] if block_size is None else ["--block-size", str(block_size)])], tiny_model) == 0
    )
    options = started.args[0].additional_config["kv_compression"]
    assert options["method"] == "random"
    assert options["interval"] == options["chunk"] == (block_size or 128)


WITH_WINDOWS = FakeLLM(num_blocks=10, layer_types=("sliding_attention", "sliding_attention", "full_attention"))


@pytest.mark.parametrize(
    "engine, num_tokens",
    [
        (FakeLLM(max_model_len=300), 299),
        (FakeLLM(num_blocks=4), 384),
        (FakeLLM(), 2048),
        (WITH_WINDOWS, 384),  # three groups share nine pages
    ],
)
def test_sequences_fit_model_and_cache(engine, num_tokens, started, tiny_model, capsys):
    started.next = engine
    assert run(["calibrate", "MODEL"], tiny_model) == 0
    assert {len(sequence) for sequence in engine.calls[0][1]} == {num_tokens}
    assert (f"Sequences are {num_tokens} tokens long" in capsys.readouterr().err) == (num_tokens < 2048)


def words(count):
    return " ".join(map(str, range(count)))


def test_calibrate_with_texts(started, tiny_model, tmp_path):
    (tmp_path / "a.txt").write_text(words(2000))
    (tmp_path / "b.txt").write_text(words(700))
    texts = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert run(["calibrate", "MODEL", "--tokens", "400", "--text", *texts], tiny_model) == 0
    _, sequences, description, *_ = started.next.calls[0]
    assert [(sequence[0], len(sequence)) for sequence in sequences] == [(0, 400), (0, 400)]
    assert description == "2 sequences, 800 tokens, of a.txt, b.txt"


def test_a_short_text_is_refused_by_name(started, tiny_model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(words(100))
    assert run(["calibrate", "MODEL", "--text", str(tmp_path / "a.txt")], tiny_model) == 2
    assert "a.txt has 100 tokens, a text needs 256 at least" in capsys.readouterr().err
    assert not started.next.calls and len(started.next.shutdowns) == 1


def test_texts_are_not_left_out_silently():
    with pytest.raises(UsageError, match="raise --sequences to 2 at least"):
        calibrate.text_sequences({"a.txt": range(1000), "b.txt": range(1000)}, num_sequences=1, num_tokens=500)


ENGINE = ["--enforce-eager", "--dtype", "float32", "--block-size", "32", "--kv-cache-memory-bytes", "64M"]
ENGINE += ["--max-model-len", "1024"]


def captured(argv):
    """The exit status of the command, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = run(argv, "")
    return subprocess.CompletedProcess(argv, status, stdout.getvalue(), stderr.getvalue())


def command(*argv):
    """Runs the command in a process of its own."""
    (done,) = in_forks(captured, ([*map(str, argv), *ENGINE],))
    return done


def test_calibrate_then_generate_then_continue(model_with_tokenizer, tmp_path):
    model, filters = model_with_tokenizer, tmp_path / "filters.safetensors"
    done = command("calibrate", model, "--sequences", 2, "--tokens", 300, "-o", filters)
    assert done.returncode == 0, done.stderr
    assert f"--kv-compression-config.filters {filters}" in done.stdout
    assert load(filters, tiny_identity()).filters.shape == (NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE)

    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"prompt": " ".join(f"w{i}" for i in range(3, 403)), "id": "long"},
        {"messages": [{"role": "user", "content": "w5 w6"}], "id": "chat"},
        {"prompt": "w7 w8", "kv_budget": 0, "max_tokens": 5},
        {"prompt": "w9", "kv_budget": 7},
        {"prompt": "w3 " * 2000},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    generate = ["generate", model, "--input", prompts, "--output", output, "--max-tokens", 80, "--batch-size", 2]
    generate += ["--kv-compression-config.filters", filters, "--kv-compression-config.budget", 128]
    generate += ["--kv-compression-config.interval", 32, "--kv-compression-config.chunk", 64]
    generate += ["--kv-compression-config.allow_kv_budget_off", "true"]
    done = command(*generate)
    assert done.returncode == 1, done.stderr
    assert f"{output} has all 6 lines; 3 failed" in done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["line"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["id"] for record in records] == ["long", "chat", None, None, None, None]
    assert [record.get("prompt_tokens") for record in records] == [400, 3, 2, None, None, None]
    assert records[2]["completion_tokens"] <= 5 and "w" in records[0]["text"]
    assert "kv_budget=7" in records[3]["error"] and "1024" in records[4]["error"] and "JSON" in records[5]["error"]

    whole = output.read_bytes()
    output.write_bytes(whole[: whole.index(b"\n", whole.index(b"\n") + 1) + 20])  # two lines and some of the third
    done = command(*generate)
    assert done.returncode == 1, done.stderr
    assert "has all 6 lines, 2 of them before; 3 failed" in done.stderr
    assert output.read_bytes() == whole


@pytest.fixture
def evaluate(model_with_tokenizer, tmp_path):
    """Arguments of an evaluation on the tiny model; the file of results is quality.json."""
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{3 + (7 * i + i * i // 50) % (VOCAB - 3)}" for i in range(2000)))
    argv = [
        "eval",
        model_with_tokenizer,
        "--text",
        text,
        "-o",
        tmp_path / "quality.json",
        "--sequences",
        2,
        "--tokens",
        500,
    ]
    argv += ["--loss-from", 200, "--chunk", 64, "--lengths", 320, "--prompts", 1, "--trials", 1, "--depths", 0, 1]
    argv += ["--generations", 1, "--generation-tokens", 150, "--budgets", 96, "--fractions", 0.5]
    return [str(argument) for argument in argv]


@pytest.fixture
def start_of_eval(evaluate):
    """The command line of a process that evaluates one method on one task."""
    start = [sys.executable, "-c", "from vllm_qfilters.commands import main; raise SystemExit(main())", *evaluate]
    return [*start, "--methods", "streaming", "--tasks", "streaming", "--no-plots", *ENGINE]


def test_eval_in_a_process_of_its_own(start_of_eval, tmp_path):
    done = subprocess.run(start_of_eval, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "streaming: full cache " in done.stdout
    values = json.loads((tmp_path / "quality.json").read_text())
    assert [(cell["method"], cell["budget"]) for cell in values["cells"]] == [("full", 0), ("streaming", 96)]


def test_a_terminated_eval_ends_its_engine(start_of_eval):
    with subprocess.Popen(start_of_eval, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        parent = psutil.Process(process.pid)
        for line in process.stdout:
            if "starting an engine" in line:
                break
        while not (children := [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]):
            time.sleep(0.05)
        process.terminate()
        printed = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in printed
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_eval_then_more_of_it(evaluate, tiny_filters, tmp_path, monkeypatch, capsys):
    starts, progress = [], []

    def run_here(engine_args, requests):
        starts.append(engine_args)
        for event in serve(engine_args, requests):
            if isinstance(event, Progress):
                progress.append((event.tokens, sum(request.most_tokens for request in requests)))
            yield event

    monkeypatch.setattr("vllm_qfilters.commands.evaluation.engine.PROGRESS_SECONDS", 0)
    monkeypatch.setattr("vllm_qfilters.commands.evaluation.command.run_engine", run_here)
    evaluate += ["--dtype", "float32", "--kv-cache-memory-bytes", "64M"]
    assert commands.main([*evaluate, "--methods", "streaming", "--no-plots"]) == 0
    printed = capsys.readouterr().out
    names = ("streaming", "prompt-320", "passkey-320", "kv-320", "generation")
    assert all(f"{name}: " in printed for name in names)
    first = json.loads((tmp_path / "quality.json").read_text())
    assert [cell["task"] for cell in first["cells"] if (cell["method"], cell["budget"]) == ("full", 0)] == list(names)
    assert len(first["cells"]) == 10
    assert len(progress) > 100 and all(0 <= tokens <= total for tokens, total in progress)
    assert max(tokens for tokens, _ in progress) > 448, "of requests that are not finished"
    streaming, prompt, rest = first["engines"]
    assert streaming["evicted_tokens"] == 2 * (448 - 96), "at 448 is the last cut"
    assert prompt["evicted_tokens"] == 160 and rest["evicted_tokens"] >= 4 * 160
    assert [engine["kv_compression"]["chunk"] for engine in first["engines"]] == [64, 320, 2048]
    assert streaming["block_size"] == streaming["kv_compression"]["interval"] == 32

    method = f"qfilters:filters={tiny_filters[0]}"
    assert commands.main([*evaluate, "--methods", "streaming", method, "--tasks", "streaming"]) == 0
    assert method in capsys.readouterr().out and tmp_path.joinpath("quality-loss.png").exists()
    more = json.loads((tmp_path / "quality.json").read_text())
    assert more["cells"][:10] == first["cells"] and len(more["cells"]) == 11 and len(more["engines"]) == 4
    cell, full = more["cells"][10], more["cells"][0]
    assert cell["method"] == method and more["engines"][3]["kv_compression"]["filters"] == str(tiny_filters[0])
    assert 0.001 < abs(cell["loss"] - full["loss"]) < 1
    assert len(starts) == 4
    assert commands.main([*evaluate, "--methods", "streaming", method, "--tasks", "streaming", "--tokens", "600"]) == 2
    assert "has streaming with other settings (tokens)" in capsys.readouterr().err and len(starts) == 4


def test_eval_of_questions_and_a_judge(evaluate, model_with_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vllm_qfilters.commands.evaluation.command.run_engine", serve)
    evaluate += ["--dtype", "float32", "--kv-cache-memory-bytes", "64M", "--methods", "streaming", "--no-plots"]
    evaluate += ["--ruler", "single", "variables", "--distances", "256", "--repeats", "2"]
    evaluate += ["--tasks", "ruler", "recall", "copy", "generation"]
    assert commands.main([*evaluate, "--judge", str(model_with_tokenizer)]) == 0
    printed, values = capsys.readouterr().out, json.loads((tmp_path / "quality.json").read_text())
    cells = {}
    for cell in values["cells"]:
        cells.setdefault(cell["task"], []).append(cell)
    assert all(f"{name}: mean score of " in printed for name in ("ruler-320", "copy-320", "recall-256"))
    generated = cells.pop("generation")
    assert {name: len(found) for name, found in cells.items()} == {"ruler-320": 2, "copy-320": 2, "recall-256": 2}
    assert all(len(cell["scores"]) in (2, 4) and 0 <= cell["mean"] <= 1 for found in cells.values() for cell in found)
    assert [cell["judge"] for cell in generated] == [str(model_with_tokenizer)] * 2
    assert all(0 < bits < 20 for cell in generated for bits in cell["bits_per_byte"])
    questions, recall = values["engines"]
    assert recall["kv_compression"]["prefill_interval"] == 64 and recall["evicted_tokens"] >= 2 * (768 - 96)
    assert questions["evicted_tokens"] > 0
    assert commands.main([*evaluate, "--held-back"]) == 2, "other seeds, another file"
    assert "with other settings (seed)" in capsys.readouterr().err


def test_inspect(model_with_tokenizer, tiny_filters, tmp_path, capsys):
    page, prompt = tmp_path / "page.html", tmp_path / "prompt.txt"
    prompt.write_text(" ".join(f"w{3 + i % 500}" for i in range(300)))
    argv = ["inspect", str(model_with_tokenizer), "--prompt-file", str(prompt), "-o", str(page), "--dtype", "float32"]
    argv += ["--block-size", "32", "--kv-cache-memory-bytes", "64M", "--max-model-len", "1024"]
    argv += ["--kv-compression-config.filters", str(tiny_filters[0]), "--kv-compression-config.interval", "32"]
    argv += ["--kv-compression-config.budget", "128", "--kv-compression-config.chunk", "64"]
    assert commands.main(argv) == 0
    # Cut to 128 at 256, then 45 tokens more: one page more goes when decoding begins.
    assert (
        f"{page} shows 301 tokens, of which every layer and head holds {301 - 256 + 128 - 64}"
        in capsys.readouterr().out
    )
    written = page.read_text()
    assert ">w3</span>" in written and "> w302</span>" in written and written.count("data-kept=") == 301
