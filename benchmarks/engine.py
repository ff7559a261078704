"""An engine in this process, its scheduler within reach, and prompts for it."""

import collections
import os
import random
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


class Engine:
    """vLLM's LLM with or without KV compression.

    Args:
        job: ``model``, ``budget``, ``kv_cache_memory_bytes``, ``llm`` and ``options`` as given on the command line.
        method: of KV compression; None: plain vLLM.
        options: of KV compression, for all variants; a method that does not read one goes without. ``llm`` below
            takes precedence over the job's.
        llm: further arguments of vLLM's LLM.

    Attributes:
        runner: the model runner.
        seconds: spent so far in calls that are timed.
        preemptions: of the scheduler, so far.
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
        (self.manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
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
        """Pieces of a text, or of random token ids where there is no tokenizer; no two begin alike."""
        stride = 997
        needed = num_tokens + count * stride
        if self.llm.model_config.skip_tokenizer_init:
            numbers = random.Random(0)
            tokens = [numbers.randrange(3, self.llm.model_config.get_vocab_size()) for _ in range(needed)]
        else:
            tokens = text_tokens(self.llm.get_tokenizer(), needed)
        return [tokens[index * stride : index * stride + num_tokens] for index in range(count)]

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)

    def step(self) -> list[Any]:
        return self.engine.step()

    def time_calls(self, owner: Any, name: str, part: str) -> None:
        """From now on calls of a method of ``owner`` count as ``part``."""
        function = getattr(owner, name)

        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds[part] += time.perf_counter() - begin

        setattr(owner, name, timed)

    def read_prompts(self) -> tuple[float, int]:
        """Steps until every sequence has its first token: the seconds it took, and most pages a sequence held."""
        begin, pages = time.perf_counter(), 0
        while any(
            request.is_prefill_chunk or not request.num_computed_tokens for request in self.scheduler.requests.values()
        ):
            self.step()
            pages = max(pages, self.pages())
        return time.perf_counter() - begin, pages

    def pages(self) -> int:
        """Most pages one sequence holds now."""
        return max((len(blocks) for blocks in self.manager.req_to_blocks.values()), default=0)

    def drop_everything(self) -> None:
        self.engine.abort_request(list(self.scheduler.requests), internal=True)
        while self.engine.has_unfinished_requests():
            self.step()

    def _compression_stats(self, name: str) -> float:
        """0 for plain vLLM."""
        return getattr(getattr(self.scheduler, "compression_stats", None), name, 0)

    def _count_preemption(self, *args: Any, **kwargs: Any) -> Any:
        self.preemptions += 1
        return self._preempt_request(*args, **kwargs)


def text_tokens(tokenizer: Any, num_tokens: int) -> list[int]:
    """Of Python's own documentation, over again where it ends."""
    from pydoc_data import topics

    tokens = tokenizer("\n".join(topics.topics.values())).input_ids
    return (tokens * (1 + num_tokens // len(tokens)))[:num_tokens]
