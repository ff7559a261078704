"""Engines shared by the tests, and a window into them."""

import contextlib
import functools
import importlib
import itertools
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType

from transformers.utils import is_torchvision_available
from vllm import LLM, SamplingParams, envs
from vllm.distributed import parallel_state
from vllm.inputs import TokensPrompt
from vllm.model_executor.models import registry
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms.cpu import CpuPlatform
from vllm.triton_utils import dispatcher

from vllm_qfilters import kv_compression
from vllm_qfilters.methods.catalog import METHODS

BLOCK = 32
ANY_BUDGET = {"max_budget": "unlimited", "allow_kv_budget_off": True}  # for requests that set their own

# An engine that starts looks for Triton kernels in all that is imported, and vLLM 0.32 stumbles over llvmlite, which an
# engine with n-gram drafts in the same process has imported before.
dispatcher.vars = lambda value: vars(value) if isinstance(vars(value), dict) else {}

# vLLM asks a process, which imports all of it again, what a model can do, so as to keep CUDA out of its own.
registry._run_in_subprocess = lambda function: function()


def make_empty_cache(folder: pathlib.Path) -> pathlib.Path:
    """``folder`` in place of ``VLLM_CACHE_ROOT``: holds nothing but what vLLM has asked about models."""
    asked = pathlib.Path(envs.VLLM_CACHE_ROOT) / "modelinfos"
    asked.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    (folder / asked.name).symlink_to(asked, target_is_directory=True)
    return folder


_alive: list[LLM] = []


def keep_alive(llm: LLM) -> LLM:
    """An engine that is collected takes down what all engines of the process share: of this one that never happens."""
    _alive.append(llm)
    return llm


def share_group_of_experts() -> None:
    """vLLM makes the group that experts are spread over with the first engine of a process, where that has any. Of one
    rank it is that of its tensor parallelism. Call before an engine with experts starts."""
    if parallel_state._EP is None:
        parallel_state._EP = parallel_state._TP


class Engines:
    """Starts each configuration once; tests share the engines and leave them idle. llm: more keywords of vLLM's
    ``LLM``."""

    def __init__(self, model: pathlib.Path, filters: pathlib.Path, **llm) -> None:
        self._model, self._filters, self._llm = model, filters, llm
        self._engines: dict[tuple, Engine] = {}

    def get(
        self,
        num_blocks: int = 512,
        max_model_len: int = 4096,
        max_batched: int = 512,
        method: str = "qfilters",
        num_drafts: int = 0,
        kv_cache_dtype: str = "auto",
        **options,
    ) -> "Engine":
        """num_drafts: draft tokens of n-gram speculative decoding; options: of the compression."""
        key = (
            num_blocks,
            max_model_len,
            max_batched,
            method,
            num_drafts,
            kv_cache_dtype,
            tuple(sorted(options.items())),
        )
        if key not in self._engines:
            filters = {"filters": str(self._filters)} if METHODS[method].needs_filters else {}
            self._engines[key] = Engine(
                self._model,
                num_blocks,
                max_model_len,
                max_batched,
                kv_compression(method, **{**ANY_BUDGET, **filters, **options}),
                kv_cache_dtype=kv_cache_dtype,
                **(speculation(num_drafts) if num_drafts else {}),
                **self._llm,
            )
        return self._engines[key]


@contextlib.contextmanager
def prefixes_kept_with_cpu_mla() -> Iterator[None]:
    """Engines that start meanwhile read prompts in chunks and keep prefixes, as vLLM does with MLA on GPUs and on CPUs
    with AMX. Beside CPU_MLA it switches both off, although that attention can do it."""
    check = CpuPlatform.__dict__["check_and_update_config"]

    def keep(cls, vllm_config) -> None:
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        kept = scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens
        check.__func__(cls, vllm_config)
        scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens = kept

    CpuPlatform.check_and_update_config = classmethod(keep)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = check


class MLAEngines(Engines):
    """Of a model with MLA, in float32, that keep prefixes."""

    def __init__(self, model: pathlib.Path, filters: pathlib.Path) -> None:
        super().__init__(model, filters, attention_backend="CPU_MLA")

    def get(self, **options) -> "Engine":
        with prefixes_kept_with_cpu_mla():
            return super().get(**options)


TEXT_ONLY = {"limit_mm_per_prompt": {"image": 0, "video": 0}}  # engine arguments of models with images


QWEN_VL = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
}


def register_qwen_vl(*modules: str) -> None:
    """Of :data:`QWEN_VL`, for which vLLM imports names of torchvision that nothing asks for while prompts are text:
    beside a PyTorch for CPUs there is none on PyPI.
    """
    if is_torchvision_available():  # Transformers remembers the answer
        return
    names = ["torchvision", *(f"torchvision.{name}" for name in ("transforms", "transforms.v2"))]
    stand_ins = {name: ModuleType(name) for name in [*names, "torchvision.transforms.v2.functional"]}
    for name in [*stand_ins][1:]:
        parent, _, child = name.rpartition(".")
        setattr(stand_ins[parent], child, stand_ins[name])
    sys.modules.update(stand_ins)
    try:
        for module in modules:
            implementation = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), QWEN_VL[module])
            ModelRegistry.register_model(QWEN_VL[module], implementation)
    finally:
        for name in stand_ins:
            del sys.modules[name]


def speculation(num_drafts: int) -> dict:
    """Engine arguments of n-gram speculative decoding."""
    ngram = {"method": "ngram", "num_speculative_tokens": num_drafts, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
    return {"speculative_config": ngram}


class Engine:
    """An in-process engine on the tiny model; llm: more keywords of vLLM's ``LLM``."""

    _ids = itertools.count()

    def __init__(self, model, num_blocks: int, max_model_len: int, max_batched: int, compression: dict, **llm) -> None:
        defaults = dict(
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            block_size=BLOCK,
            num_gpu_blocks_override=num_blocks,
            kv_cache_memory_bytes=1 << 28,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_batched,
            max_num_seqs=16,
        )
        self.llm = keep_alive(LLM(str(model), **{**defaults, **llm}, **compression))

    @property
    def scheduler(self):
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def runner(self):
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    @functools.cached_property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    def generate(self, prompts, max_tokens=64, kv_budget=None, logprobs=0, **params):
        extra = None if kv_budget is None else {"kv_budget": kv_budget}
        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs,
            extra_args=extra,
            **params,
        )
        return self.llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], sampling, use_tqdm=False)

    def add(self, prompt, max_tokens=64, kv_budget=None, **params) -> str:
        """Adds a request without running it; returns its id."""
        if kv_budget is not None:
            params["extra_args"] = {"kv_budget": kv_budget}
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **params)
        request_id = f"test-{next(self._ids)}"
        self.llm.llm_engine.add_request(request_id, TokensPrompt(prompt_token_ids=prompt), params)
        return request_id

    def step(self):
        return self.llm.llm_engine.step()

    def run(self, on_step=lambda: None, max_steps=100_000) -> dict:
        """Steps until idle; returns the finished outputs by request id."""
        finished = {}
        for _ in range(max_steps):
            if not self.llm.llm_engine.has_unfinished_requests():
                return finished
            for output in self.step():
                if output.finished:
                    finished[output.request_id] = output
            on_step()
        raise AssertionError(f"still running after {max_steps} steps")

    @contextlib.contextmanager
    def attended_lengths(self) -> Iterator[list[int]]:
        """Yields a list that holds what attention last saw as the lengths of the step's sequences."""
        builder, seen = self.runner.attn_groups[self.runner.group][0].metadata_builders[0], []

        def build(*args, **kwargs):
            metadata = type(builder).build(builder, *args, **kwargs)
            seen[:] = metadata.seq_lens.tolist()
            return metadata

        builder.build = build
        try:
            yield seen
        finally:
            del builder.build

    def drop_everything(self) -> None:
        """Aborts what a failed test left behind, and forgets cached prefixes."""
        self.llm.llm_engine.abort_request(list(self.scheduler.requests), internal=True)
        self.run()
        assert self.llm.reset_prefix_cache()

    def assert_idle(self) -> None:
        """Every page is free, nothing is remembered of any request."""
        pages = self.scheduler.block_manager
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert not pages.evicted and not pages.limits and not pages.req_to_blocks and not pages._released
        assert (
            not pages.next_cuts
            and not pages._last_cuts
            and not pages._standings
            and not pages._planned
            and pages._found is None
        )
        assert not pages._first_filled and not pages._is_scheduling
        assert self.scheduler._computed_tokens == pages.all_evicted == 0
        assert all(block.ref_cnt == 0 for block in self.pool.blocks if not block.is_null)


def tokens_and_logprobs(output) -> tuple[list[int], list[float]]:
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    return ids, [step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)]
