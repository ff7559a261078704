"""What the command ``size`` reckons is what engines report, and what sequences in them come to hold."""

import argparse
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
from typing import ClassVar

import pytest

from tests import models, states
from tests.engines import Engine, share_group_of_experts
from tests.models import random_prompt
from vllm_qfilters import commands, kv_compression
from vllm_qfilters.commands.sizing.cache import CompressedPool, Held, Layers, PlainPool, fitting
from vllm_qfilters.commands.sizing.command import show, size
from vllm_qfilters.config import KVCompressionConfig
from vllm_qfilters.policy import resolve

CACHE_BYTES = 256 << 20
BLOCK, STEP_TOKENS, MAX_MODEL_LEN = 32, 256, 2048
# Of models that people serve, by what their configurations say of attention.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "hidden_act": "silu", "rms_norm_eps": 1e-6,
}  # fmt: skip
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048,
    "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    "max_position_embeddings": 32768, "sliding_window": 512, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "query_pre_attn_scalar": 256,
}  # fmt: skip
SMOLLM = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "max_position_embeddings": 8192, "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
# With the parameters that the files on the hub have.
REAL = {
    "SmolLM2-135M": (SMOLLM, 134_515_008),
    "Qwen2.5-0.5B": (QWEN, 494_032_768),
    "gemma-3-270m": (GEMMA, 268_098_176),
}


@pytest.fixture
def folder_of(tmp_path):
    """Makes a folder that has a configuration and nothing else."""

    def make(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def run(capsys, *argv):
    assert commands.main(["size", *map(str, argv)]) == 0
    return capsys.readouterr().out


DEEPSEEK = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "max_position_embeddings": 32_768,
}  # fmt: skip


# MiMo-V2-Flash, of which the first layer, every sixth and the last one attend to everything.
MIMO = {
    "model_type": "mimo_v2_flash", "architectures": ["MiMoV2FlashForCausalLM"], "hidden_size": 4096,
    "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128,
    "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8, "swa_head_dim": 192, "swa_v_head_dim": 128,
    "hybrid_layer_pattern": [int(layer % 6 != 5 and layer not in (0, 47)) for layer in range(48)],
    "sliding_window": 128, "sliding_window_size": 128, "max_position_embeddings": 262_144, "vocab_size": 152_576,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def cells(printed, length, budget):
    """Pages that a sequence holds while it decodes, and how many fit."""
    (line,) = [line for line in printed.splitlines() if re.match(rf" *{length:,} +{budget} ", line)]
    *_, pages, fit = line.replace(",", "").split()
    return int(pages), int(fit)


def narrow(config):
    """The same attention in a model with few weights."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    width = {"hidden_size": head_dim * heads, "intermediate_size": 64, "vocab_size": 512}
    return {**config, "head_dim": head_dim, **width}


def assert_holds_what_is_reckoned(folder, method, capsys, interval=BLOCK, keeps_prefixes=True) -> str:
    """An engine has as many pages as were reckoned, and a sequence in it comes to hold as many of them.

    Returns:
        what the command says.
    """
    compression = {} if method is None else kv_compression(method, budget=1024, interval=interval)
    llm = dict(load_format="dummy", kv_cache_memory_bytes=CACHE_BYTES, enable_prefix_caching=keeps_prefixes)
    engine = Engine(folder, None, MAX_MODEL_LEN, STEP_TOKENS, compression, **llm)
    printed = run(
        capsys, folder, "--kv-cache-memory-bytes", CACHE_BYTES, "--block-size", BLOCK, "--dtype", "float32",
        "--max-model-len", MAX_MODEL_LEN, "--max-num-batched-tokens", STEP_TOKENS, "--budget", 1024, "--length", 1550,
        "--kv-compression", method or "knorm", "--kv-compression-config.interval", interval,
        *([] if keeps_prefixes else ["--no-enable-prefix-caching"]),
    )  # fmt: skip
    pages, fit = cells(printed, 1550, "plain vLLM" if method is None else "1,024")
    assert fit == (engine.pool.num_gpu_blocks - 1) // pages

    held = []

    def count():
        managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
        of_request = [blocks for manager in managers for blocks in manager.req_to_blocks.values()]
        held.append(sum(not block.is_null for blocks in of_request for block in blocks))

    engine.add(random_prompt(1500, seed=0), max_tokens=50)
    engine.run(on_step=count)
    decoding = held[-40:-1]
    assert pages - 2 <= max(decoding) <= pages, "windows seldom begin where a page does"
    return printed


METHODS = pytest.mark.parametrize("method", [None, "knorm"], ids=["plain", "knorm"])


@METHODS
@pytest.mark.parametrize("name", REAL)
def test_an_engine_has_as_many_pages_as_were_reckoned(name, method, folder_of, capsys):
    assert_holds_what_is_reckoned(folder_of(narrow(REAL[name][0])), method, capsys)


def test_values_narrower_than_keys(folder_of, capsys):
    """MiMo-V2-Flash, of 9 layers of full attention and 39 others, which are in five groups and take twice as much.
    Transformers makes its window one token longer than vLLM does."""
    argv = ("--kv-cache-memory-bytes", "40G", "--length", 32_768, "--budget", 2048)
    printed = run(capsys, folder_of(MIMO), *argv)
    heads = "4 KV heads of 192, values of 128 (8 of 192, values of 128 with a window)"
    assert f"9 layers of full attention and 39 with a sliding window of 129, {heads}; pages of 16 tokens" in printed
    of_full, of_window = 4 * (192 + 128) * 2, 8 * (192 + 128) * 2
    assert f"A token takes {show(9 * of_full + 39 * of_window)} with plain vLLM, {show(48 * of_window)} with" in printed
    windows = 5 * 9  # groups and pages
    assert cells(printed, 32_768, "plain vLLM")[0] == 32_768 // 32 + windows
    num_pages = (40 << 30) // (9 * 16 * of_window) - 1
    assert cells(printed, 32_768, "2,048") == (128 + windows, num_pages // (128 + windows))


@METHODS
def test_sliding_windows_with_other_kv_heads(method, capsys, tmp_path):
    """Gemma 4: a token takes twice as much in a layer with a window, whose pages have half as many in plain vLLM."""
    folder = models.make_tiny_gemma4(tmp_path, num_kv_heads=4)
    printed = assert_holds_what_is_reckoned(folder, method, capsys)
    assert "1 layers of full attention and 2 with a sliding window of 48, 1 KV heads of 64 (4 of 32 with a" in printed
    assert "A token takes 2.5 KiB with plain vLLM, 3 KiB with compression" in printed


@pytest.mark.parametrize(
    ("make", "method", "block_size", "keeps_prefixes"),
    [
        (models.make_tiny_lfm2, "knorm", 32, True),
        (models.make_tiny_qwen3_next, None, 96, True),
        (models.make_tiny_qwen3_next, "knorm", 96, True),
        (models.make_tiny_nemotron_h, "knorm", 64, False),  # vLLM on CPUs keeps none of its states
    ],
)
def test_states_beside_attention(make, method, block_size, keeps_prefixes, capsys, tmp_path):
    """Pages are widened until they are as large as a state."""
    share_group_of_experts()
    with states.stood_in():
        printed = assert_holds_what_is_reckoned(make(tmp_path), method, capsys, block_size, keeps_prefixes)
    assert re.search(rf": 1 layers .* and 2 that keep a state of .* pages of {block_size} tokens\n", printed)


def test_states_of_a_model_that_people_serve(folder_of, capsys):
    """Qwen3-Next-80B-A3B, of which vLLM's log says on GPUs that a page has 544 tokens."""
    config = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "torch_dtype": "bfloat16"}
    printed = run(capsys, folder_of(config), "--kv-cache-memory-bytes", "40G", "--length", 32_768, "--budget", 8192)
    assert (
        "12 layers of full attention and 36 that keep a state of 1.047 MiB, 2 KV heads of 256; pages of 544" in printed
    )
    assert cells(printed, 32_768, "plain vLLM")[0] == 61 + 3 * 2 and cells(printed, 32_768, "8,192")[0] == 16 + 3 * 2


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the files of ``folder`` as those of every repository, beside which it claims to have weights."""

    folder: pathlib.Path
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        names = [file.name for file in self.folder.iterdir()] + ["model.safetensors"]
        if path.startswith("/api/models/"):
            files = [{"type": "file", "path": name, "rfilename": name, "size": 9, "oid": "0"} for name in names]
            body = json.dumps(files if "/tree/" in path else {"id": "some/model", "siblings": files}).encode()
        elif (file := self.folder / path.rpartition("/")[2]).is_file():
            body = file.read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", 40 * "0")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


def test_of_a_repository_the_configuration_alone_is_downloaded(folder_of, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(Hub, "folder", folder_of(SMOLLM), raising=False)
    monkeypatch.setattr(Hub, "asked", [])
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = dict(
        os.environ, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path_factory.mktemp("hub")), no_proxy="127.0.0.1"
    )
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
    code = "from vllm_qfilters.commands import main; raise SystemExit(main())"
    argv = [
        sys.executable,
        "-c",
        code,
        "size",
        "some/model",
        "--memory",
        "8GiB",
        "--length",
        "8192",
        "--budget",
        "1024",
    ]
    try:
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    finally:
        hub.shutdown()
        hub.server_close()
    assert done.returncode == 0, done.stderr
    assert f"Weights take {show(2 * REAL['SmolLM2-135M'][1])}." in done.stdout
    assert cells(done.stdout, 8192, "1,024")[0] == 64
    downloaded = {path.rpartition("/")[2] for path in Hub.asked if "/resolve/" in path}
    assert "config.json" in downloaded and not any(
        name.endswith((".safetensors", ".bin", ".pt")) for name in downloaded
    )


@pytest.mark.parametrize("name", REAL)
def test_weights_are_reckoned_from_the_configuration(name, folder_of, capsys):
    config, parameters = REAL[name]
    printed = run(capsys, folder_of(config), "--memory", "8GiB", "--dtype", "bfloat16")
    assert f"Weights take {show(2 * parameters)}." in printed


def test_what_goes_beside_the_cache_comes_off_it(folder_of, capsys):
    """Llama-3.1-8B on 80 GiB."""
    config = {
        **SMOLLM, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    }  # fmt: skip
    folder = folder_of(config)
    printed = run(capsys, folder, "--memory", "80GiB", "--length", 131072, "--budget", 2048)
    assert "A token takes 128 KiB with plain vLLM, 129 KiB with compression, with 1 token stat " in printed
    assert "Weights take 14.96 GiB." in printed and "not cut yet take 8 MiB." in printed
    assert cells(printed, 131072, "plain vLLM") == (8192, 3)
    assert "16 GiB" in printed and cells(printed, 131072, "2,048")[0] == 128
    quarter = run(capsys, folder, "--memory", "80GiB", "--length", 131072, "-tp", 4, "--max-num-seqs", 256)
    assert "A token takes 32 KiB" in quarter and "Weights take 3.739 GiB." in quarter
    assert "not cut yet take 2 MiB." in quarter


def test_latents(folder_of, capsys):
    """DeepSeek-V3: a key per token and layer, whatever the number of heads and ranks, and token stats beside the
    cache."""
    printed = [
        run(capsys, folder_of({**QWEN, **DEEPSEEK}), "--memory", "80GiB", "--weights", "8GiB", "-tp", ranks)
        for ranks in (1, 8)
    ]
    assert all("61 layers of full attention, latents of 576" in each for each in printed)
    assert all("A token takes 68.62 KiB with plain vLLM and with compression" in each for each in printed)
    assert cells(printed[0], 32_768, "plain vLLM")[0] == cells(printed[1], 32_768, "plain vLLM")[0] == 2048


def test_a_plot(folder_of, capsys, tmp_path):
    path = tmp_path / "sizes.png"
    printed = run(capsys, folder_of(QWEN), "--memory", "8GiB", "-o", path)
    assert f"Plot in {path}" in printed and path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "argv", "reason"),
    [
        ({}, [], r"how much memory\? Give --memory 80GiB"),
        ({}, ["--memory", "8GiB", "--length", "40000"], "--length 40000: the model reads 32768 tokens at most"),
        ({}, ["--memory", "8GiB", "--budget", "10"], "budget=10: at least"),
        ({}, ["--memory", "8GiB", "--block-size", "48", "--kv-compression-config.interval", "64"], "not a multiple"),
        (DEEPSEEK, ["--memory", "8GiB", "--kv-compression", "knorm"], "method 'knorm' with MLA"),
        ({"quantization_config": {"quant_method": "fp8"}}, ["--memory", "8GiB"], "quantised by fp8 .* give --weights"),
        ({"v_head_dim": 128}, ["--memory", "8GiB"], r"values of another size than keys \(128 and 64\)"),
    ],
)
def test_what_cannot_be_reckoned_is_refused_saying_what_to_change(change, argv, reason, folder_of, capsys):
    assert commands.main(["size", str(folder_of({**QWEN, **change})), *argv]) == 2
    assert re.search(reason, capsys.readouterr().err)


def test_given_weights_are_not_reckoned(folder_of, capsys):
    folder = folder_of({**QWEN, "quantization_config": {"quant_method": "fp8"}})
    assert "Weights take 1 GiB." in run(capsys, folder, "--memory", "8GiB", "--weights", "1GiB")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("80GiB", 80 << 30), ("24GB", 24 * 10**9), ("1.5 gib", 3 << 29), ("1024", 1024), ("7B", 7), ("2TiB", 2 << 40)],
)
def test_sizes(text, num_bytes):
    assert size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "80G", "-1GiB", "0", "80 gigs", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size: give it as 80GiB"):
        size(text)


def test_a_pool_that_cannot_read_a_prompt_fits_none():
    layers = Layers(num_full=2, num_sliding=0, window=0, num_kv_heads=1, head_size=8, value_size=8, element_bytes=2)
    assert PlainPool(layers, 16, 512).held(100) == Held(7, 7)
    assert fitting(Held(7, 7), 8) == 1 and fitting(Held(7, 7), 7) == 0 and fitting(Held(7, 8), 8) == 0
    limits = resolve(KVCompressionConfig(method="streaming", budget=512)).request_limits(None, 5000)
    assert CompressedPool(layers, 16, 0).held(5000, limits) == Held(32, 32 + 128)
    assert CompressedPool(layers, 16, 0).page_bytes == 2 * 16 * 32


def test_groups_are_padded_like_vllms():
    """13 and 12 layers: two groups of 13; 10 and 52: one of full attention and six, the last padded, of windows."""
    shape = dict(window=1024, num_kv_heads=1, head_size=8, value_size=8, element_bytes=2)
    held = PlainPool(Layers(num_full=13, num_sliding=12, **shape), 16, 2048).held(100_000)
    assert held == Held(6250 + 65, 6250 + 193)
    held = PlainPool(Layers(num_full=10, num_sliding=52, **shape), 16, 2048).held(100_000)
    assert held == Held(6250 + 6 * 65, 6250 + 6 * 193)
