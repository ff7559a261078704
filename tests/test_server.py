"""The real server over HTTP, with the OpenAI client, on the demo model."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import urllib.error

import openai
import pytest

from tests.engines import ANY_BUDGET
from tests.server import Server
from vllm_qfilters.budget import cdiv
from vllm_qfilters.frontend.metrics import GAUGES, HISTOGRAMS
from vllm_qfilters.stats import COUNTERS

ROOT = pathlib.Path(__file__).parents[1]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
BUDGET, BLOCK = 512, 64


def serve(*flags: str) -> Server:
    return Server(MODEL, "--block-size", str(BLOCK), "--kv-cache-memory-bytes", str(400 << 20), *flags).wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    os.environ["VLLM_CACHE_ROOT"] = str(tmp_path_factory.mktemp("cache"))
    config = json.dumps({"budget": BUDGET, "window": 0.5, "interval": 64, "chunk": 512, "endpoint": True, **ANY_BUDGET})
    # float32: in bfloat16 a batch of another size rounds otherwise, and greedy text may then turn at a near tie.
    flags = ["--dtype", "float32", "--enable-prompt-tokens-details"]
    server = serve(*flags, "--kv-compression", "qfilters", "--kv-compression-config", config)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=300)


def text(words: int) -> str:
    from pydoc_data import topics

    return " ".join(" ".join(topics.topics.values()).split()[:words])


def test_the_log_says_what_is_active_and_where_filters_came_from(server):
    (line,) = [line for line in server.log if "KV compression is on" in line]
    for part in (
        "method qfilters",
        "budget 512 tokens",
        "window 50% of the budget",
        "granularity layer",
        "prefill chunked (cut every 512 tokens, at most 512 beside the budget)",
        "filters calibrated now (2048 random token ids)",
        "at most 8 pages of 64 tokens per decoding sequence, 16 while its prompt is read",
    ):
        assert part in line, line
    assert not any("Traceback" in line for line in server.log)


def test_every_metric_shows_from_the_start(server):
    shown = {f"{name}_total" for name in COUNTERS} | set(GAUGES) | {f"{name}_count" for name in HISTOGRAMS}
    assert set(server.metrics()) >= shown


def test_a_long_completion_is_counted_and_reads_on(server, client):
    before = server.metrics()
    prompt = text(900)
    answer = client.completions.create(
        model="demo", prompt=prompt, max_tokens=300, temperature=0, logprobs=1, extra_body={"ignore_eos": True}
    )
    assert answer.usage.prompt_tokens > 2 * BUDGET and answer.usage.completion_tokens == 300
    assert len(answer.choices[0].logprobs.token_logprobs) == 300
    words = answer.choices[0].text.split()
    assert sum(word.isascii() and any(c.isalpha() for c in word) for word in words) > 0.5 * len(words)
    after = server.metrics()
    evicted = after["evicted_tokens_total"] - before["evicted_tokens_total"]
    held_at_the_end = answer.usage.prompt_tokens + 299 - evicted
    assert BUDGET - 64 <= held_at_the_end <= BUDGET
    assert after["freed_pages_total"] - before["freed_pages_total"] == evicted / BLOCK, "private copies free nothing"
    assert after["resident_tokens"] == after["saved_pages"] == 0
    assert 0 < after["compaction_seconds_total"] - before["compaction_seconds_total"] < 60
    # It held most when its prompt was first cut, at a multiple of the chunk above the budget.
    assert after["request_resident_tokens_count"] - before["request_resident_tokens_count"] == 1
    assert after["request_resident_tokens_sum"] - before["request_resident_tokens_sum"] == 2 * BUDGET


def test_chat_streams(client):
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Name three colours. " + text(700)}],
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage.prompt_tokens > BUDGET


def test_the_next_turn_reads_its_message_and_the_last_answer(server, client):
    def ask(messages):
        return client.chat.completions.create(model="demo", messages=messages, max_tokens=30, temperature=0)

    messages = [{"role": "user", "content": "What is this about? " + text(1500)}]
    first = ask(messages)
    assert first.usage.prompt_tokens > 4 * BUDGET
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append({"role": "user", "content": "Say more of it, please. " + text(40)})
    before = server.metrics()
    second = ask(messages)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached == first.usage.prompt_tokens // BLOCK * BLOCK
    after = server.metrics()
    assert after["prefix_hits_total"] - before["prefix_hits_total"] == 1
    assert after["prefix_hit_tokens_total"] - before["prefix_hit_tokens_total"] == cached
    assert second.choices[0].message.content


def test_two_budgets_at_once_give_what_each_gives_alone(client):
    def ask(kv_budget, results=None):
        answer = client.completions.create(
            model="demo",
            prompt=text(800),
            max_tokens=60,
            temperature=0,
            extra_body={"ignore_eos": True, "vllm_xargs": {"kv_budget": kv_budget}},
        )
        if results is not None:
            results[kv_budget] = answer.choices[0].text
        return answer.choices[0].text

    alone = {budget: ask(budget) for budget in (256, 0)}
    assert alone[256] != alone[0]
    together: dict[int, str] = {}
    threads = [threading.Thread(target=ask, args=(budget, together)) for budget in alone]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert together == alone


def test_the_example_of_a_client(server):
    command = [sys.executable, str(ROOT / "examples" / "openai_client.py"), "--url", f"{server.url}/v1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "server's budget: refused" not in done.stdout and "half of the prompt: refused" not in done.stdout
    assert "too small a budget: refused: kv_budget=1: at least " in done.stdout


def test_a_budget_is_refused_where_beams_would_not_have_it(client):
    beams = {"use_beam_search": True, "vllm_xargs": {"kv_budget": 256}}
    with pytest.raises(openai.BadRequestError, match="kv_budget does nothing with use_beam_search"):
        client.completions.create(model="demo", prompt="a b", max_tokens=3, n=2, extra_body=beams)
    with pytest.raises(openai.BadRequestError, match="kv_budget does nothing with use_beam_search"):
        messages = [{"role": "user", "content": "a b"}]
        client.chat.completions.create(model="demo", messages=messages, max_tokens=3, n=2, extra_body=beams)
    answer = client.completions.create(
        model="demo", prompt="a b", max_tokens=3, n=2, extra_body={"use_beam_search": True}
    )
    assert len(answer.choices) == 2


@pytest.mark.parametrize("kv_budget", [-5, 100, 1.5, "much", [1]], ids=str)
def test_a_bad_budget_is_a_400_with_a_reason_and_others_go_on(kv_budget, client):
    with pytest.raises(openai.BadRequestError, match="kv_budget"):
        xargs = {"vllm_xargs": {"kv_budget": kv_budget}}
        client.completions.create(model="demo", prompt="a b c", max_tokens=4, extra_body=xargs)
    assert client.completions.create(model="demo", prompt="a b c", max_tokens=4).choices


def test_a_clean_end(server, client):
    """A client that goes away in the middle of its stream leaves no page behind."""
    stream = client.completions.create(
        model="demo", prompt=text(700), max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    for _, chunk in zip(range(5), stream):
        assert chunk.choices is not None
    metrics = server.metrics()
    assert metrics["compressed_requests"] == 1 and BUDGET - 64 <= metrics["resident_tokens"] <= BUDGET
    assert metrics["saved_pages"] >= 2
    time.sleep(0.2)  # records are no older than 0.1 s
    (sequence,) = server.sequences()
    assert sequence["request_id"].startswith(chunk.id)
    assert sequence["position"] - sequence["resident_tokens"] >= 2 * BLOCK
    assert sequence["prompt_tokens"] < sequence["position"] and BUDGET - 64 <= sequence["resident_tokens"] <= BUDGET
    assert (sequence["engine"], sequence["budget"]) == (0, BUDGET) and sequence["evictions"] >= 1
    stream.close()
    end = time.monotonic() + 60
    while time.monotonic() < end and server.metrics()["resident_tokens"]:
        client.completions.create(model="demo", prompt="tick", max_tokens=2)
        time.sleep(0.5)
    assert server.metrics()["resident_tokens"] == 0
    assert server.sequences() == []


def test_pages_are_counted_once_by_two_api_servers_and_a_session_goes_on_from_its_end():
    flags = ["--kv-compression", "qfilters", "--kv-compression-config.granularity", "page", "--api-server-count", "2"]
    for name, value in (("budget", BUDGET), ("interval", BLOCK), ("chunk", 512), ("prefix", "resume")):
        flags += [f"--kv-compression-config.{name}", str(value)]
    pages = serve(*flags, "--enable-prompt-tokens-details")
    try:
        assert any("KV compression is on" in line and "granularity page" in line for line in pages.log)
        evicted = 0
        for turn in range(4):  # a client each, with a connection of its own, which the kernel gives to either of them
            client = openai.OpenAI(base_url=pages.url + "/v1", api_key="none", max_retries=0, timeout=300)
            answer = client.completions.create(
                model="demo",
                prompt=f"{turn}: {text(900)}",
                max_tokens=200,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            client.close()
            evicted += cdiv(answer.usage.prompt_tokens + 199 - BUDGET, BLOCK) * BLOCK
        metrics = pages.metrics()
        assert metrics["evicted_tokens_total"] == evicted == metrics["freed_pages_total"] * BLOCK
        assert metrics["request_resident_tokens_count"] == 4

        with openai.OpenAI(base_url=pages.url + "/v1", api_key="none", max_retries=0, timeout=300) as client:
            ask = functools.partial(client.completions.create, model="demo", max_tokens=60, temperature=0)
            extra = {"ignore_eos": True, "return_token_ids": True}
            (first,) = ask(prompt="Tell it again: " + text(900), extra_body=extra).choices
            history = [*first.prompt_token_ids, *first.token_ids]
            usage = ask(prompt=[*history, *first.prompt_token_ids[:20]], extra_body=extra).usage
            with pytest.raises(openai.BadRequestError, match=f"kv_budget={BUDGET + 1}: more than this server allows"):
                ask(prompt="a b c", extra_body={"vllm_xargs": {"kv_budget": BUDGET + 1}})
            # What was generated last was never computed.
            assert usage.prompt_tokens_details.cached_tokens == (len(history) - 1) // BLOCK * BLOCK
        assert pages.metrics()["resumed_requests_total"] == 1
        assert not any("Traceback" in line for line in pages.log)
    finally:
        pages.stop()


def test_a_plain_server_says_nothing_of_us():
    plain = serve()
    try:
        assert plain.metrics() == {}
        assert not any("compression" in line.lower() or "qfilters" in line.lower() for line in plain.log), plain.log
        with pytest.raises(urllib.error.HTTPError, match="404"):
            plain.sequences()
    finally:
        plain.stop()
