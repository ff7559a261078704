"""Random arrivals, aborts, budgets and shared prefixes on caches so small that requests are preempted all the time."""

import random
from collections import Counter

import pytest

from tests.engines import BLOCK, Engine
from tests.models import random_prompt

CHUNK, BUDGET = 128, 192


def external(request_id: str) -> str:
    return request_id.rpartition("-")[0]  # vLLM appends a random suffix


class Watch:
    """Checks after every step that pages and counts add up."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.preempted: set[str] = set()
        self.decoding: set[tuple[str, int]] = (
            set()
        )  # requests whose next step decodes, unless they are preempted once more

    def __call__(self) -> None:
        scheduler, pages, pool = self.engine.scheduler, self.engine.scheduler.block_manager, self.engine.pool
        holders = Counter()
        for request_id, blocks in pages.req_to_blocks.items():
            request = scheduler.requests[request_id]
            ids = [block.block_id for block in blocks]
            assert len(set(ids)) == len(ids), "a sequence holds a page twice"
            holders.update(ids)
            resident, limits = pages.resident_tokens(request), pages.limits.get(request_id)
            assert 0 <= resident <= len(blocks) * BLOCK < resident + 2 * BLOCK
            if limits is not None:
                assert resident <= limits.max_resident_tokens(resident)
                if (request_id, request.num_preemptions) in self.decoding:
                    assert resident <= limits.budget
                    assert len(blocks) <= -(-limits.budget // BLOCK)
        for block in pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == holders[block.block_id], "references and holders of a page differ"
        assert pool.get_num_free_blocks() + len(holders) == pool.num_gpu_blocks - 1
        assert set(pages.evicted) <= set(pages.req_to_blocks)
        self.decoding = {(r.request_id, r.num_preemptions) for r in scheduler.running if not r.is_prefill_chunk}
        worker = self.engine.runner.lengths._evicted
        for request in scheduler.running:
            assert worker.get(request.request_id, 0) == pages.evicted.get(request.request_id, 0)
        self.preempted.update(external(r.request_id) for r in scheduler.requests.values() if r.num_preemptions)


@pytest.mark.parametrize(
    "granularity, prefill, seed",
    [
        ("layer", "chunked", 0), ("layer", "chunked", 1), ("layer", "chunked", 2), ("layer", "full", 3),
        ("page", "chunked", 4), ("page", "chunked", 5), ("page", "full", 6),
    ],
)  # fmt: skip
def test_random_load_keeps_every_invariant_and_ends(granularity, prefill, seed, engines):
    rng = random.Random(seed)
    cuts = dict(chunk=CHUNK, prefill_interval=64) if prefill == "chunked" else dict(prefill="full")
    engine = engines.get(
        budget=BUDGET,
        window=48,
        sinks=4,
        interval=64,
        granularity=granularity,
        num_blocks=34,
        max_model_len=1024,
        **cuts,
    )
    engine.drop_everything()
    prefixes = [random_prompt(length, seed=100 + length) for length in (64, 200, 330)]
    watch = Watch(engine)
    requests, alive, finished = {}, [], {}
    for _ in range(200):
        if len(requests) < 24 and rng.random() < 0.4:
            prompt = rng.choice([[], *prefixes]) + random_prompt(rng.randint(1, 300), seed=rng.randint(0, 10**6))
            job = dict(
                prompt=prompt, max_tokens=rng.randint(1, 150), kv_budget=rng.choice([None, None, 180, 250, 0.6, 0])
            )
            name = engine.add(**job)
            requests[name] = job
            alive.append(name)
        if alive and rng.random() < 0.02:
            name = alive.pop(rng.randrange(len(alive)))
            engine.llm.llm_engine.abort_request([name])
            requests.pop(name)
        for output in engine.step() if engine.llm.llm_engine.has_unfinished_requests() else []:
            if output.finished and output.request_id in requests:
                finished[output.request_id] = output
                alive.remove(output.request_id)
        watch()
    finished.update({name: output for name, output in engine.run(watch).items() if name in requests})
    assert set(finished) == set(requests)
    assert all(len(finished[name].outputs[0].token_ids) == job["max_tokens"] for name, job in requests.items())
    assert watch.preempted, "the cache was not small enough to test preemption"
    engine.assert_idle()

    # Evictions depend on positions alone: served alone and cold, each request says the same, preempted or not.
    undisturbed, preempted = sorted(set(requests) - watch.preempted), sorted(set(requests) & watch.preempted)
    for name in rng.sample(undisturbed, min(2, len(undisturbed))) + rng.sample(preempted, min(4, len(preempted))):
        assert engine.llm.reset_prefix_cache()
        job = requests[name]
        (alone,) = engine.generate([job["prompt"]], max_tokens=job["max_tokens"], kv_budget=job["kv_budget"])
        assert list(alone.outputs[0].token_ids) == list(finished[name].outputs[0].token_ids), (name, len(job["prompt"]))
