"""What is counted reaches the front end once, and the time of compactions with the output after them."""

import dataclasses
import inspect
import json
import pathlib
import re

import pytest
import torch
from vllm.v1.metrics import loggers
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_qfilters.frontend.metrics import GAUGES, HISTOGRAMS, PREFIX
from vllm_qfilters.messages import QFiltersModelRunnerOutput
from vllm_qfilters.stats import COUNTERS, KVCompressionStats, attach_stats, detach_stats
from vllm_qfilters.worker.timer import CompactionTimer

ROOT = pathlib.Path(__file__).parents[1]


def test_messages_add_up_to_the_totals_whoever_gets_them():
    totals, sent, received = KVCompressionStats(), KVCompressionStats(), []
    for compactions, resident in ((2, 700), (3, 400), (3, 0)):
        totals.compactions, totals.compaction_seconds, totals.resident_tokens = compactions, compactions / 8, resident
        totals.request_resident_tokens.append(resident)
        travelling = SchedulerStats()
        attach_stats(travelling, totals.take_news(sent))
        received.append(detach_stats(travelling))
        assert travelling.kv_connector_stats is None, "vLLM's loggers must not see it"
    assert [news.compactions for news in received] == [2, 1, 0]
    assert sum(news.compaction_seconds for news in received) == 3 / 8
    assert [news.resident_tokens for news in received] == [700, 400, 0]
    assert [news.request_resident_tokens for news in received] == [[700], [400], [0]]
    assert totals.compactions == 3, "the scheduler's totals stay"


def test_records_of_sequences_are_sent_once():
    totals, sent = KVCompressionStats(), KVCompressionStats()
    assert totals.take_news(sent).sequences is None, "those of before are recent enough"
    totals.sequences = []
    assert totals.take_news(sent).sequences == [] and totals.take_news(sent).sequences is None


def test_every_number_that_is_sent_is_a_metric():
    names = {field.name for field in dataclasses.fields(KVCompressionStats)}
    assert names - {"sequences"} == {*COUNTERS, *GAUGES, *HISTOGRAMS}


NOW = ModelRunnerOutput(req_ids=["request"], req_id_to_index={"request": 0})


class Later(AsyncModelRunnerOutput):
    def get_output(self):
        return NOW

    def get_kv_connector_output(self):
        return "of the connector"


@pytest.mark.parametrize("output", [NOW, Later()], ids=["sync", "async"])
def test_time_travels_with_the_next_output(output, monkeypatch):
    clock = iter((1.0, 1.5, 7.0, 7.25))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = CompactionTimer(torch.device("cpu"))
    assert timer.attach(output) is output and timer.attach(None) is None
    for _ in range(2):
        with timer.measure():
            pass
    timed = timer.attach(output)
    if isinstance(timed, AsyncModelRunnerOutput):
        assert timed.get_kv_connector_output() == "of the connector"
        timed = timed.get_output()
    assert isinstance(timed, QFiltersModelRunnerOutput) and timed.compaction_seconds == 0.75
    assert timer.attach(output) is output, "sent once"


@pytest.mark.parametrize("output", [None, EMPTY_MODEL_RUNNER_OUTPUT], ids=["V1", "V2"])
def test_pipeline_stages_before_the_last_send_no_time(output):
    """On GPUs there is none yet: nothing has waited for the device."""
    timer = CompactionTimer(torch.device("cpu"))
    with timer.measure():
        pass
    assert timer.attach(output) is output
    assert timer.attach(NOW) is NOW, "nor with a later output"


def test_the_dashboard_shows_metrics_that_exist():
    """Every one of ours, and of vLLM's only what its loggers define."""
    dashboard = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    named = {name for expression in expressions for name in re.findall(r"vllm:\w+", expression)}
    ours = {f"{PREFIX}{name}_total" for name in COUNTERS} | {PREFIX + name for name in GAUGES}
    ours |= {f"{PREFIX}{name}_bucket" for name in HISTOGRAMS}
    assert {name for name in named if name.startswith(PREFIX)} == ours
    defined = set(re.findall(r'name="(vllm:\w+)"', inspect.getsource(loggers)))
    others = {name.removesuffix("_total") for name in named if not name.startswith(PREFIX)}
    assert others <= defined and {"vllm:kv_cache_usage_perc", "vllm:num_preemptions"} <= others
