"""Starts an engine in this process, with its scheduler within reach, and makes prompts for it."""

import collections
import os
import random
import time
from collections.abc import Callable
from typing import Any


class Engine:
    """An engine is vLLM's LLM, with or without KV compression.

    Args:
        job: ``model``, ``budget``, ``kv_cache_memory_bytes``, ``llm`` and ``options`` as given on the command line.
        method: of KV compression; None: plain vLLM.
        options: of KV compression, for all variants; a method that does not read one goes without. ``llm`` below
            takes precedence over the job's.
        llm: further arguments of vLLM's LLM.

    Attributes:
        runner: the model runner.
        seconds: the seconds that were spent so far in calls that are timed, by part.
        preemptions: how often the scheduler preempted a request so far.
    """

    def __init__(self, job: dict[str, Any], method: str | None, options: dict[str, Any], **llm: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        from vllm_qfilters import kv_compression
        from vllm_qfilters.methods.catalog import OPTIONS_OF_SOME, entry

        compression = {}
        if method is not None:
            options = {"budget": job["budget"], **job["options"], **options}
            unread = OPTIONS_OF_SOME - entry(method, options.get("filter")).options
            given = {name: value for name, value in options.items() if name not in unread}
            compression = kv_compression(method, **given)
        given = {
            "kv_cache_memory_bytes": job["kv_cache_memory_bytes"] or None,
            "max_num_batched_tokens": 2048,
            **job["llm"],
        }
        self.llm: LLM = LLM(job["model"], **{**given, **llm}, **compression)
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.manager = getattr(self.scheduler, "block_manager", managers[0])
        self.preemptions = 0
        self._preempt_request = self.scheduler._preempt_request
        self.scheduler._preempt_request = self._count_preemption
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.seconds: collections.Counter[str] = collections.Counter()

    @property
    def evicted_tokens(self) -> int:
        return self._compression_stats("evicted_tokens")

    @property
    def compaction_seconds(self) -> float:
        return self._compression_stats("compaction_seconds")

    def prompts(self, count: int, num_tokens: int) -> list[list[int]]:
        """Cuts prompts from a text, or from random token ids where there is no tokenizer; no two begin alike."""
        if self.llm.model_config.skip_tokenizer_init:
            numbers, end = random.Random(0), self.llm.model_config.get_vocab_size()
            return cut_prompts(lambda needed: [numbers.randrange(3, end) for _ in range(needed)], count, num_tokens)
        return cut_prompts(lambda needed: text_tokens(self.llm.get_tokenizer(), needed), count, num_tokens)

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)

    def step(self) -> list[Any]:
        return self.engine.step()

    def time_calls(self, owner: Any, name: str, part: str) -> None:
        """Times calls of a method of ``owner`` from now on, and counts them as ``part``."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - begin

        setattr(owner, name, timed)

    def read_prompts(self) -> tuple[float, int]:
        """Steps until every sequence has its first token.

        Returns:
            The seconds it took, and the most pages that a sequence held.
        """
        begin, pages = time.perf_counter(), 0
        while any(
            request.is_prefill_chunk or not request.num_computed_tokens for request in self.scheduler.requests.values()
        ):
            self.step()
            pages = max(pages, self.pages())
        return time.perf_counter() - begin, pages

    def pages(self) -> int:
        """Counts the pages of the sequence that holds most now."""
        return max((len(blocks) for blocks in self.manager.req_to_blocks.values()), default=0)

    def drop_everything(self) -> None:
        self.engine.abort_request(list(self.scheduler.requests), internal=True)
        while self.engine.has_unfinished_requests():
            self.step()

    def _compression_stats(self, name: str) -> float:
        """Reads a number of the scheduler's statistics; it is 0 with plain vLLM."""
        return getattr(getattr(self.scheduler, "compression_stats", None), name, 0)

    def _count_preemption(self, *args: Any, **kwargs: Any) -> Any:
        self.preemptions += 1
        return self._preempt_request(*args, **kwargs)


def cut_prompts(tokens: Callable[[int], list[int]], count: int, num_tokens: int) -> list[list[int]]:
    """Cuts ``count`` prompts of ``num_tokens`` each, no two of which begin alike, from as many tokens as are needed."""
    stride = 997
    text = tokens(num_tokens + count * stride)
    return [text[index * stride :][:num_tokens] for index in range(count)]


def text_tokens(tokenizer: Any, num_tokens: int) -> list[int]:
    """Reads tokens of Python's own documentation, which begins over again where it ends."""
    from pydoc_data import topics

    tokens = tokenizer("\n".join(topics.topics.values())).input_ids
    return (tokens * (1 + num_tokens // len(tokens)))[:num_tokens]
