"""Scores of pages: the kernel, and their way to the scheduler with a step's output."""

import pickle

import pytest
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from tests.test_layout import Geometry, make_cache
from vllm_qfilters.kernels import CPU_OPS
from vllm_qfilters.messages import QFiltersModelRunnerOutput, QFiltersSchedulerOutput
from vllm_qfilters.plan import CompactionPlan
from vllm_qfilters.worker.page_scorer import PageScorer

GEOMETRY = Geometry(num_layers=3, num_blocks=7, num_kv_heads=2, block_size=16)
PAGES = (5, 0, 3)


def make_statistics() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    shape = (GEOMETRY.num_layers, GEOMETRY.num_kv_heads)
    return 3 * torch.randn(shape, generator=generator), 0.1 + torch.rand(shape, generator=generator)


def by_loops(scores: torch.Tensor, pages, mean: torch.Tensor, std: torch.Tensor) -> list[float]:
    found = []
    for page in pages:
        total, count = 0.0, 0
        for layer in range(scores.shape[0]):
            for head in range(scores.shape[2]):
                for score in scores[layer, page, head].tolist():
                    total += (score - float(mean[layer, head])) / float(std[layer, head])
                    count += 1
        found.append(total / count)
    return found


def step(pages_to_score: tuple[int, ...]) -> QFiltersSchedulerOutput:
    output = QFiltersSchedulerOutput.from_output(SchedulerOutput.make_empty(), CompactionPlan())
    output.pages_to_score = pages_to_score
    return output


def make_output() -> ModelRunnerOutput:
    return ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}, sampled_token_ids=[[7]])


class Later(AsyncModelRunnerOutput):
    def get_output(self) -> ModelRunnerOutput:
        return make_output()

    def get_kv_connector_output(self):
        return "of the connector"


def test_a_page_scores_the_mean_of_its_normalised_scores():
    _, cache = make_cache(GEOMETRY)
    mean, std = make_statistics()
    found = CPU_OPS.page_scores(cache.scores, torch.tensor(PAGES), mean, std)
    torch.testing.assert_close(found, torch.tensor(by_loops(cache.scores, PAGES, mean, std)), atol=1e-4, rtol=1e-5)


def test_a_head_whose_scores_never_varied_has_no_say():
    _, cache = make_cache(GEOMETRY)
    mean, std = make_statistics()
    std[1, 0] = 0
    scorer = PageScorer(CPU_OPS.page_scores, cache.scores, mean, std, lambda values: values)
    scorer.score_filled_pages(step(PAGES))
    found = torch.tensor(scorer.attach(make_output()).page_scores)
    assert bool(found.isfinite().all())
    cache.scores[1, :, 0] = 1e9
    scorer.score_filled_pages(step(PAGES))
    torch.testing.assert_close(torch.tensor(scorer.attach(make_output()).page_scores), found)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_scores_travel_with_the_output_of_their_step(is_async):
    _, cache = make_cache(GEOMETRY)
    mean, std = make_statistics()
    scorer = PageScorer(CPU_OPS.page_scores, cache.scores, mean, std, lambda values: values / 2)
    expected = [score / 2 for score in by_loops(cache.scores, PAGES, mean, std)]
    scorer.score_filled_pages(step(PAGES))
    output = scorer.attach(Later() if is_async else make_output())
    cache.scores.zero_()  # the next step writes before the output of this one is read
    if is_async:
        assert isinstance(output, AsyncModelRunnerOutput) and output.get_kv_connector_output() == "of the connector"
        output = output.get_output()
    output = pickle.loads(pickle.dumps(output))
    assert isinstance(output, QFiltersModelRunnerOutput)
    assert (output.req_ids, output.sampled_token_ids) == (["a"], [[7]])
    torch.testing.assert_close(torch.tensor(output.page_scores), torch.tensor(expected), atol=1e-4, rtol=1e-5)

    plain = make_output()
    for scheduler_output in (step(()), SchedulerOutput.make_empty()):
        scorer.score_filled_pages(scheduler_output)
        assert scorer.attach(plain) is plain
