"""N-gram speculative decoding: drafts come and go, evictions stay where they are. See also test_request_features.py."""

import pytest

from tests.models import random_prompt
from tests.test_pages import JOBS
from tests.test_random_load import Watch

NUM_DRAFTS = 5
OPTIONS = dict(budget=192, window=48, sinks=4, interval=32, chunk=128, num_blocks=128, max_model_len=1024)
FEW = [10, 11, 12]  # allowed tokens: drafts are right now and then


def run_jobs(engine, order) -> tuple[dict, list]:
    """Token ids of each job, and each eviction as (prompt length, computed tokens, evicted tokens)."""
    evictions, compact = [], engine.scheduler.block_manager.plan_eviction

    def record(request, evicted_tokens):
        evictions.append((request.num_prompt_tokens, request.num_computed_tokens, evicted_tokens))
        return compact(request, evicted_tokens)

    engine.scheduler.block_manager.plan_eviction = record
    try:
        names = {engine.add(JOBS[i][0], max_tokens=JOBS[i][1], allowed_token_ids=FEW): i for i in order}
        finished = engine.run()
    finally:
        engine.scheduler.block_manager.plan_eviction = compact
    return {names[name]: list(output.outputs[0].token_ids) for name, output in finished.items()}, sorted(evictions)


class Drafts:
    """Counts drafts, and checks that no step holds more than the budget with them."""

    def __init__(self, engine, monkeypatch) -> None:
        self.engine, self.accepted, self.rejected, self.trimmed = engine, 0, 0, 0
        scheduler = engine.scheduler
        self._schedule, self._update = scheduler.schedule, scheduler.update_from_output
        monkeypatch.setattr(scheduler, "schedule", self.schedule)
        monkeypatch.setattr(scheduler, "update_from_output", self.update)

    def schedule(self, *args):
        proposed = {request.request_id: len(request.spec_token_ids) for request in self.engine.scheduler.running}
        output = self._schedule(*args)
        pages = self.engine.scheduler.block_manager
        for name, drafts in output.scheduled_spec_decode_tokens.items():
            request = self.engine.scheduler.requests[name]
            assert pages.resident_tokens(request) <= pages.limits[name].budget
            self.trimmed += len(drafts) < proposed.get(name, 0)
        return output

    def update(self, scheduler_output, output):
        for name, drafts in scheduler_output.scheduled_spec_decode_tokens.items():
            accepted = len(output.sampled_token_ids[output.req_id_to_index[name]]) - 1
            self.accepted += accepted
            self.rejected += len(drafts) - accepted
        return self._update(scheduler_output, output)


@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_speculation_changes_neither_tokens_nor_evictions(granularity, engines, monkeypatch):
    expected = run_jobs(engines.get(**OPTIONS, granularity=granularity), range(5))
    engine = engines.get(**OPTIONS, granularity=granularity, num_drafts=NUM_DRAFTS)
    drafts = Drafts(engine, monkeypatch)
    assert run_jobs(engine, (3, 0, 4, 2, 1)) == expected
    assert drafts.accepted > 50 and drafts.rejected > 50 and drafts.trimmed > 5
    assert not engine.scheduler.unverified_drafts
    engine.assert_idle()


@pytest.mark.parametrize("granularity", ["layer", "page"])
def test_preemption_and_aborts_lose_no_page(granularity, engines):
    engine = engines.get(**dict(OPTIONS, num_blocks=26), granularity=granularity, num_drafts=NUM_DRAFTS)
    watch = Watch(engine)
    max_tokens, finished = {}, {}
    for length in (400, 1, 300, 53, 250, 200, 128, 1):
        name = engine.add(random_prompt(length, seed=length), max_tokens=100 + length // 2, allowed_token_ids=FEW)
        max_tokens[name] = 100 + length // 2
        for _ in range(8):
            finished |= {output.request_id: output for output in engine.step() if output.finished}
            watch()
    aborted = next(name for name in max_tokens if name not in finished)
    engine.llm.llm_engine.abort_request([aborted])
    del max_tokens[aborted]
    finished |= engine.run(watch)
    assert watch.preempted
    assert {name: len(finished[name].outputs[0].token_ids) for name in max_tokens} == max_tokens
    engine.assert_idle()
