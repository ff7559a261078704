"""What ``tests/test_gpu_engine.py`` has run under Triton's interpreter: jobs of ``tests/interpreted_engine.py``."""

import json
import os
import pathlib
from collections.abc import Mapping

from tests.models import random_prompt
from tests.processes import output_of

RESULTS = "results: "  # before those of tests/interpreted_engine.py, whose other lines are vLLM's log

LLM = dict(
    block_size=32,
    num_gpu_blocks_override=32,
    kv_cache_memory_bytes=1 << 26,
    max_model_len=512,
    max_num_batched_tokens=128,
)
NARROW = dict(LLM, num_gpu_blocks_override=None, kv_cache_memory_bytes=1 << 20)  # as many pages as there is room for
WITHOUT_PREFIXES = dict(LLM, enable_prefix_caching=False)  # of models with states
EVICTING = dict(budget=96, window=24, sinks=4, interval=32, chunk=64, prefill_interval=32)
# Factors of random queries as wide as these would let last bits, which differ between kernels, decide.
EVICTING_LATENTS = dict(EVICTING, rank=0)
MLA = dict(LLM, block_size=16, num_gpu_blocks_override=64)  # pages of as many tokens as CPU_MLA has
LIKE_HUGGING_FACE = dict(EVICTING, rank=0)  # whose rule knows the whole covariance of queries or none
PAGES = dict(EVICTING, budget=128, granularity="page")
STATIC = dict(EVICTING, granularity="head", filter="static")
LONG = random_prompt(150, seed=1)
# Two at once, both evict; then one that begins like the first.
BATCHES = [
    [dict(prompt=LONG, max_tokens=12), dict(prompt=random_prompt(100, seed=2), max_tokens=12)],
    [dict(prompt=LONG[:96] + random_prompt(30, seed=3), max_tokens=8)],
]
# The last two hold the first two pages in common, and take out the second one in the same step, at their first token.
SHARING = dict(EVICTING, window=48)
SHARED_PREFIX = [
    [dict(prompt=LONG[:64] + random_prompt(63, seed=seed), max_tokens=max_tokens) for seed in seeds]
    for max_tokens, seeds in ((1, (7,)), (4, (8, 9)))
]
# A turn, and the next one, which starts behind the last cut of the first.
HISTORY = random_prompt(200, seed=10)
TURNS = [[dict(prompt=HISTORY + random_prompt(40, seed=11)[:num_tokens], max_tokens=8)] for num_tokens in (0, 40)]
SESSION = [[dict(prompt=HISTORY, max_tokens=28)], [dict(prompt=random_prompt(40, seed=11), max_tokens=8, goes_on=True)]]
SHORT = [dict(prompt=random_prompt(140, seed=4), max_tokens=3), dict(prompt=random_prompt(20, seed=5), max_tokens=5)]
# Eleven pages: too few when the last one has evicted down to three, and the others come to want a third each.
CROWD = [dict(prompt=random_prompt(length, seed=length), max_tokens=8) for length in (60, 61, 62, 150)]
CALIBRATION = [random_prompt(40, seed=6)]
# Cut while it is read, and while it is answered.
ONE = [[dict(prompt=random_prompt(150, seed=12), max_tokens=12)]]
# In Gemma 3n two tokens of that prompt score alike, and kernels may keep either.
ONE_WITHOUT_TIES = [[dict(prompt=random_prompt(150, seed=13), max_tokens=12)]]
# Each decodes its first token in the step of its first cut, when what its prompt's end looks at is observed, and is cut
# once more some steps later. Three at once, then one.
CUT_TWICE = dict(budget=64, window=12, sinks=4, interval=16, chunk=32, prefill_interval=16)
TOGETHER_AND_ALONE = [
    [dict(prompt=random_prompt(70, seed=seed), max_tokens=14) for seed in seeds] for seeds in ((20, 21, 22), (23,))
]
METHODS = ("snapkv", "tova", "lagkv", "cur", "random", "keydiff")


def prompt_after(said: list[int], request: dict) -> list[int]:
    """The tokens of a request, after those of the last one before and of its answer where it goes on from there."""
    return [*(said if request.get("goes_on") else []), *request["prompt"]]


class InterpretedRuns:
    """All runs, in one process.

    Args:
        folder: for the filters that runs calibrate.
        models: by name, the folder of a model and the file of its filters; "model" is that of the runs that name none.

    Attributes:
        calibrated: by number of pipeline stages, where the engines leave their filters.
    """

    def __init__(self, folder: pathlib.Path, models: Mapping[str, tuple[pathlib.Path, pathlib.Path]]) -> None:
        def of(name: str, compression: dict, **job) -> dict:
            model, filters = models[name]
            return dict(compression=dict(compression, filters=str(filters)), model=str(model), **job)

        self.calibrated = {stages: folder / f"{stages}.safetensors" for stages in (1, 2)}
        calibration = {stages: dict(sequences=CALIBRATION, path=str(path)) for stages, path in self.calibrated.items()}
        runs = {
            "plain": dict(compression=None, llm=LLM, requests=SHORT),
            "budget above length": dict(compression=dict(budget=256, chunk=64, interval=32), llm=LLM, requests=SHORT),
            "evicting": dict(
                compression=EVICTING, llm=dict(LLM, async_scheduling=True), requests=BATCHES, calibration=calibration[1]
            ),
            "crowd": dict(compression=STATIC, llm=dict(LLM, num_gpu_blocks_override=12), requests=CROWD),
            "pages": dict(compression=PAGES, llm=LLM, requests=BATCHES),
            "shared prefix": dict(compression=SHARING, llm=LLM, requests=SHARED_PREFIX),
            "two stages": dict(
                compression=EVICTING,
                llm=dict(LLM, pipeline_parallel_size=2),
                requests=BATCHES,
                calibration=calibration[2],
            ),
            "exaone": of("exaone", EVICTING, llm=LLM, requests=BATCHES),
            "gemma3n": of("gemma3n", EVICTING, llm=LLM, requests=ONE_WITHOUT_TIES),
            "lfm2": of("lfm2", EVICTING, llm=WITHOUT_PREFIXES, requests=BATCHES[:1]),
            "mimo": of("mimo", LIKE_HUGGING_FACE, llm=NARROW, requests=ONE),
            "qwen_vl": of(
                "qwen_vl", EVICTING, llm=dict(LLM, limit_mm_per_prompt={"image": 0, "video": 0}), requests=BATCHES
            ),
            "turns": dict(compression=EVICTING, llm=dict(LLM, async_scheduling=True), requests=TURNS),
            "plain, mla": dict(compression=None, llm=MLA, requests=SHORT, model=str(models["deepseek"][0])),
            "budget above length, mla": of("deepseek", dict(EVICTING_LATENTS, budget=256), llm=MLA, requests=SHORT),
            "evicting, mla": of(
                "deepseek", EVICTING_LATENTS, llm=dict(MLA, async_scheduling=True), requests=[*BATCHES, *TURNS]
            ),
            "session": dict(compression=dict(EVICTING, prefix="resume"), llm=LLM, requests=SESSION),
            "cut twice": dict(
                compression=CUT_TWICE,
                llm=dict(LLM, block_size=16, num_gpu_blocks_override=64, max_num_batched_tokens=256),
                requests=TOGETHER_AND_ALONE,
            ),
            **{method: dict(compression=dict(EVICTING, method=method), llm=LLM, requests=ONE) for method in METHODS},
        }
        model, filters = map(str, models["model"])
        self._job = dict(model=model, filters=filters, runs=runs)

    def results(self) -> dict[str, dict]:
        """Runs them: minutes, since Triton's interpreter takes long. The result of each, by name."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        output = output_of("tests.interpreted_engine", environment=environment, stdin=json.dumps(self._job))
        (results,) = [line for line in output.splitlines() if line.startswith(RESULTS)]
        return json.loads(results.removeprefix(RESULTS))
