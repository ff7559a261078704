"""Measures llama.cpp, which most laptops run models with, beside plain vLLM and ours: same weights, same prompts.

    python -m venv peer
    peer/bin/pip install xllamacpp==2026.10.11549 gguf==0.19.0 transformers==5.24.0 jinja2
    python -m benchmarks llama_cpp models/SmolLM2-135M-Instruct --python peer/bin/python [--context 4000]

Its server has no scores. It refuses a prompt that is longer than its context. With context shift a sequence that
reaches its context while it generates gives up the older half of what follows its first tokens, and the rest is turned
to the positions that got free. So there are two variants: the whole context, and a context of ``--budget`` tokens with
context shift. There whoever asks has to cut the prompt: its first ``--keep`` tokens and its last ones stay here, and
what lies between is never read. Weights have the precision that vLLM's have, and the cache has 16 bits (float16,
llama.cpp's default) or 32. The model is written to build/llama_cpp/ once. Variants whose packages are not there are
left out.

The wheels of xllamacpp are compiled for AVX2: on a CPU with AVX-512 or AMX vLLM uses them and llama.cpp does not. With
PYTHONPATH=tests/cpu_without_avx512 vLLM and ours do without, as on most laptops.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

from benchmarks import peers
from benchmarks.case import ROOT, NotMeasured, Numbers

WRITTEN = ROOT / "build" / "llama_cpp"  # git ignores build/
CACHE_TYPES = {"float32": "GGML_TYPE_F32", "bfloat16": "GGML_TYPE_F16"}
CONTEXT_STEP = 256  # llama.cpp rounds contexts up to multiples of it


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", type=int, default=32, help="first tokens that context shift keeps; default 32")
    parser.add_argument("--python", help="of an environment with xllamacpp and gguf; default this one")


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    return {
        "llama.cpp": {"shift": False, "python": arguments.python},
        "llama.cpp, prompts cut, context shift": {"shift": True, "python": arguments.python},
    }


class Answer:
    """An answer that llama.cpp's server generates from now on; a thread reads it.

    Args:
        url: of the server.
        prompt: token ids.
        max_tokens: as many are generated.

    Attributes:
        token_ids: of the answer.
        prompt_tokens: tokens of the prompt that were read.
        held_tokens: tokens in the cache at the end.
    """

    def __init__(self, url: str, prompt: Sequence[int], max_tokens: int) -> None:
        self.token_ids: list[int] = []
        self.prompt_tokens = self.held_tokens = 0
        body = {
            "prompt": list(prompt),
            "n_predict": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "return_tokens": True,
        }
        headers = {"Content-Type": "application/json"}
        self._request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode(), headers)
        self._times: list[tuple[float, int]] = []  # when tokens arrived, and how many had arrived then
        self._begin = time.perf_counter()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def wait(self) -> "Answer":
        """Returns the answer at its end; raises RuntimeError if the server refused the request."""
        self._thread.join()
        if not self._times:
            raise RuntimeError("llama.cpp's server sent no answer")
        return self

    @property
    def first_token_seconds(self) -> float:
        return self._times[0][0] - self._begin

    def seconds_of_tokens(self) -> list[float]:
        """Returns the seconds of each token behind the first; those that arrived at once share theirs."""
        found = []
        for (before, count_before), (after, count) in itertools.pairwise(self._times):
            new = count - count_before
            found += [(after - before) / new] * new
        return found

    def _read(self) -> None:
        with urllib.request.urlopen(self._request) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                self.token_ids += event["tokens"]
                if event["tokens"]:
                    self._times.append((time.perf_counter(), len(self.token_ids)))
                if event["stop"]:
                    self.prompt_tokens, self.held_tokens = event["tokens_evaluated"], event["tokens_cached"]


def measure(job: dict[str, Any]) -> Numbers:
    try:
        import gguf  # noqa: F401  (benchmarks.to_gguf needs it)
        import xllamacpp
        from transformers import AutoTokenizer
    except ImportError as error:
        raise NotMeasured(f"llama.cpp is not there ({error}): see --help, then --python") from None
    cache_type = peers.named_precision(job, CACHE_TYPES)
    context = job["budget"] if job["shift"] else job["context"] + peers.most_tokens(job)
    context = -(-context // CONTEXT_STEP) * CONTEXT_STEP
    params = xllamacpp.CommonParams()
    params.model.path = str(written(job["model"], job["llm"]["dtype"]))
    params.n_parallel, params.kv_unified, params.n_ctx = job["sequences"], False, job["sequences"] * context
    params.ctx_shift, params.n_keep, params.cache_ram_mib = job["shift"], job["keep"], 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type[cache_type]
    # It asks how many cores there are, not how many this process may use.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    params.verbosity = 0
    server = xllamacpp.Server(params)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])

    def ask(prompt: Sequence[int], max_tokens: int) -> Answer:
        if job["shift"]:
            prompt = cut_prompt(prompt, job["keep"], context)
        return Answer(server.listening_address, prompt, max_tokens)

    prompts = peers.prompts(job, tokenizer)
    ask(prompts[0][: peers.WARM_UP_TOKENS], peers.ANSWER_TOKENS).wait()
    ttft = ask(prompts[0], 2).wait().first_token_seconds
    # The first sequence decodes while the last is read.
    answers = [ask(prompt, peers.most_tokens(job)) for prompt in prompts]
    last = max((answer.wait() for answer in answers), key=lambda answer: answer.first_token_seconds)
    found = peers.count_found(job, tokenizer, lambda prompt: ask(prompt, peers.ANSWER_TOKENS).wait().token_ids)
    return peers.numbers(
        job,
        ttft,
        last.first_token_seconds,
        last.seconds_of_tokens()[: job["steps"]],
        max(answer.prompt_tokens for answer in answers),
        max(answer.held_tokens for answer in answers),
        found,
    )


def cut_prompt(prompt: Sequence[int], keep: int, context: int) -> list[int]:
    """Returns the first ``keep`` tokens of a prompt and its last ones, so that an answer of ``ANSWER_TOKENS`` fits into
    a context behind them.
    """
    return [*prompt[:keep], *prompt[keep:][-(context - keep - peers.ANSWER_TOKENS) :]]


def written(model: str, dtype: str) -> pathlib.Path:
    """Returns the file of a model as llama.cpp reads it; writes it if it is not there."""
    path = WRITTEN / f"{pathlib.Path(model).name}-{dtype}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        command = [sys.executable, "-m", "benchmarks.to_gguf", model, str(unfinished), "--dtype", dtype]
        subprocess.run(command, check=True, cwd=ROOT)  # a process of its own: its memory is not measured
        unfinished.rename(path)
    return path


CASE = peers.peer_case("llama_cpp", __doc__, add_options, variants, measure)
main = CASE.main
