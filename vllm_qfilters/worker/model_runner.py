"""The model runner (V1): runs the model on caches that hold fewer tokens than have been computed.

Positions stay logical, they feed RoPE and sampling; slots and sequence lengths count resident tokens.
"""

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_qfilters.config import KVCompressionConfig
from vllm_qfilters.core.spec import QFiltersPageSpec, QFiltersSpec
from vllm_qfilters.filters.bank import FilterBank
from vllm_qfilters.filters.calibrate import NUM_SEQUENCES, SEQUENCE_TOKENS, calibrate, measure_scores, random_sequences
from vllm_qfilters.filters.format import Filters, ModelIdentity, save
from vllm_qfilters.filters.load import cache_path, find_filters
from vllm_qfilters.filters.rotary import Rotation
from vllm_qfilters.kernels import IMPLEMENTATION, PagedCache, probe_page_layout
from vllm_qfilters.plan import QFiltersSchedulerOutput, RequestCompaction
from vllm_qfilters.scorers import (
    ExpectedAttentionScorer,
    KeyDiffScorer,
    KeyNormScorer,
    RandomScorer,
    RecentQueries,
    RotaryFilterScorer,
    Scorer,
    StaticFilterScorer,
)
from vllm_qfilters.support import check_specs
from vllm_qfilters.worker.compactor import Compactor
from vllm_qfilters.attention.recent_queries import QueryRecorder
from vllm_qfilters.worker.page_scores import PageScorer
from vllm_qfilters.worker.request_state import EvictedTokens

logger = init_logger("vllm.kv_compression")  # below "vllm", whose handlers print it


class QFiltersCPUModelRunner(CPUModelRunner):
    """Applies compaction plans before, and resident lengths after, what vLLM does with a step."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.compression = KVCompressionConfig.from_vllm_config(vllm_config)
        self.evicted = EvictedTokens()
        self.layers: list[torch.nn.Module] = []  # attention layers in order, once the cache exists
        self.cache: PagedCache | None = None
        self.compactor: Compactor | None = None  # once compression started
        self.recorder: QueryRecorder | None = None  # where scores go by the last queries of prompts
        self.page_scorer: PageScorer | None = None  # in page granularity, where keys are scored

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs = super().get_kv_cache_spec()
        check_specs(specs)
        if self.shared_kv_cache_layers:
            raise ValueError("KV compression does not support models whose layers share one KV cache")
        spec_cls = QFiltersPageSpec if self.compression.evicts_whole_pages else QFiltersSpec
        max_resident_tokens = self.compression.max_resident_tokens(self.model_config.max_model_len, self.cache_config.block_size)
        num_planes = self.compression.num_planes
        return {name: spec_cls.from_full_attention(spec, max_resident_tokens, num_planes) for name, spec in specs.items()}

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        if is_profiling:
            return
        (tensor,) = kv_cache_config.kv_cache_tensors
        self.layers = [self.compilation_config.static_forward_context[name] for name in tensor.layers]
        first = self.layers[0]
        if first.impl.alibi_slopes is not None:
            raise ValueError("KV compression does not support ALiBi, which takes a token's place in the cache for its position")

        def write_cache(key, value, kv_cache, slot_mapping):
            first.impl.do_kv_cache_update(first, key, value, kv_cache, slot_mapping)

        layout = probe_page_layout(write_cache, self.cache_config.block_size, first.head_size, first.kv_cache.dtype)
        self.cache = PagedCache([layer.kv_cache for layer in self.layers], layout, self.compression.num_planes)

    def start_compression(self) -> None:
        """Finds or calibrates what scores need, and says in one line what is active. Call before serving."""
        origin = ""
        filters = None
        if self.compression.method == "qfilters":
            filters, origin = self._find_or_calibrate_filters()
        scorer = self._scorer(filters)
        self.compactor = Compactor(scorer, shared_by_heads=self.compression.granularity == "layer")
        if self.compression.observed_queries:
            self.recorder = QueryRecorder(len(self.layers), self.compression.observed_queries)
        for index, layer in enumerate(self.layers):
            layer.impl.index, layer.impl.scorer, layer.impl.recorder = index, scorer, self.recorder
        if self.compression.evicts_whole_pages and self.compression.needs_scores:
            self.page_scorer = self._page_scorer(filters)
        if get_tensor_model_parallel_rank() == 0:
            logger.info("%s", describe(self.compression, self.cache_config.block_size, origin))

    def calibrate_filters(self, sequences: list[list[int]], description: str) -> Filters:
        """See :func:`vllm_qfilters.filters.calibrate.calibrate`; the cache must not be in use."""
        return calibrate(self, self.layers, self._rotations(), sequences, description)

    def _rotations(self) -> list[Rotation]:
        """Of each layer; layers that share a rotary embedding share its rotation."""
        modules = dict(self.model.named_modules(remove_duplicate=False))  # layers share one rotary embedding
        rotary_embs = [_rotary_emb(modules, layer.layer_name) for layer in self.layers]
        rotations = {id(rotary_emb): Rotation(rotary_emb, self.layers[0].head_size) for rotary_emb in rotary_embs}
        return [rotations[id(rotary_emb)] for rotary_emb in rotary_embs]

    def _find_or_calibrate_filters(self) -> tuple[Filters, str]:
        model = ModelIdentity.from_model_config(self.model_config)
        needs_statistics = self.compression.filter != "static"
        found = find_filters(self.compression.filters, model, needs_statistics)
        if found is not None:
            return found
        sequences = self._random_sequences()
        description = f"{len(sequences)} sequences of {len(sequences[0])} random token ids"
        filters = self.calibrate_filters(sequences, description)
        path = cache_path(model)
        if get_tensor_model_parallel_rank() == 0:
            save(path, filters, model)
        return filters, f"calibrated now ({description}), kept in {path}"

    def _random_sequences(self) -> list[list[int]]:
        room = (self.kv_cache_config.num_blocks - 1) * self.cache_config.block_size
        num_tokens = min(SEQUENCE_TOKENS, self.model_config.max_model_len - 1, room)
        return random_sequences(self.model_config.get_vocab_size(), NUM_SEQUENCES, num_tokens)

    def _kv_heads(self) -> tuple[int, int]:
        """The first KV head of the model that this rank holds, and how many it holds."""
        total = self.model_config.get_total_num_kv_heads()
        first = get_tensor_model_parallel_rank() * total // get_tensor_model_parallel_world_size()
        return first, self.layers[0].num_kv_heads

    def _scorer(self, filters: Filters | None) -> Scorer:
        config, cache = self.compression, self.cache
        if config.method != "qfilters":
            return {"streaming": Scorer, "knorm": KeyNormScorer, "keydiff": KeyDiffScorer, "random": RandomScorer}[config.method](cache)
        if config.filter == "static":
            return StaticFilterScorer(cache, filters.of_heads(*self._kv_heads()))
        first, tp_rank = self.layers[0], get_tensor_model_parallel_rank()
        heads = slice(tp_rank * first.num_heads, (tp_rank + 1) * first.num_heads)
        rank = config.rank if config.filter == "expected" else 0
        bank = FilterBank(filters, self._rotations(), heads, rank, first.impl.scale)
        if config.filter == "rotary":
            return RotaryFilterScorer(cache, bank)
        return ExpectedAttentionScorer(cache, bank, first.impl.scale)

    def _page_scorer(self, filters: Filters | None) -> PageScorer:
        scores = self.cache.scores
        if filters is not None and filters.score_mean is not None and filters.score_std is not None:
            mean, std = filters.score_statistics_of_heads(*self._kv_heads())
        else:
            # Published filters have no statistics, and other methods no filters.
            sequences = self._random_sequences()
            mean, std = measure_scores(self, scores, sequences)
            if get_tensor_model_parallel_rank() == 0:
                logger.info(
                    "KV compression: page scores are normalised by what %d sequences of %d random token ids scored now",
                    len(sequences),
                    len(sequences[0]),
                )
        num_ranks = get_tensor_model_parallel_world_size()
        return PageScorer(scores, mean, std, lambda values: tensor_model_parallel_all_reduce(values) / num_ranks)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any):
        output = super().execute_model(scheduler_output, *args, **kwargs)
        if self.page_scorer is not None:
            self.page_scorer.score_filled_pages(scheduler_output)
        return output

    def sample_tokens(self, grammar_output: Any):
        # A prompt's chunks before its last are sampled and discarded, and vLLM 0.32 then rewinds the generator of a request with
        # a seed, which CPU generators cannot do: the worker dies. Rows to be discarded need no generator.
        generators = self.input_batch.generators
        discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
        held = {row: generators.pop(row) for row in discarded if row in generators}
        try:
            output = super().sample_tokens(grammar_output)
        finally:
            generators.update(held)
        return output if self.page_scorer is None else self.page_scorer.attach(output)

    def _update_states(self, scheduler_output: SchedulerOutput):
        # Plans first: vLLM appends new pages at the row's end, and may zero or hand out pages that the plan gave up.
        self.evicted.forget(scheduler_output.finished_req_ids)
        self.evicted.forget(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        if self.recorder is not None:
            self.recorder.forget(scheduler_output.finished_req_ids)
            self.recorder.forget(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        if isinstance(scheduler_output, QFiltersSchedulerOutput):
            for row in scheduler_output.compaction.rows:
                (block_ids,) = self.requests[row.req_id].block_ids
                if not self.compression.evicts_whole_pages:  # else nothing moves
                    self.compactor.compact(block_ids, row, self._recent_queries(row))
                block_ids[:] = row.block_ids
                batch_row = self.input_batch.req_id_to_index.get(row.req_id)
                if batch_row is not None:
                    self.input_batch.block_table.clear_row(batch_row)
                    self.input_batch.block_table.add_row((block_ids,), batch_row)
                self.evicted.add(row.req_id, row.evicted_tokens)
        return super()._update_states(scheduler_output)

    def _recent_queries(self, row: RequestCompaction) -> RecentQueries | None:
        """What is left of the prompt's queries; handed out for the last time when the first generated tokens are there."""
        recent = self.recorder.get(row.req_id) if self.recorder is not None else None
        if recent is not None and recent.end < row.position:
            self.recorder.forget([row.req_id])
        return recent

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray):
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        num_reqs = self.input_batch.num_reqs
        if self.recorder is not None:
            self.recorder.start_step(
                self.input_batch.req_ids,
                num_scheduled_tokens.tolist(),
                self.input_batch.num_computed_tokens_cpu[:num_reqs].tolist(),
                self.input_batch.num_prompt_tokens[:num_reqs].tolist(),
            )
        evicted = self.evicted.rows(self.input_batch.req_ids)
        if evicted is not None:
            by_request = torch.from_numpy(evicted)
            self.seq_lens[:num_reqs] -= by_request
            self.optimistic_seq_lens_cpu[:num_reqs] -= by_request
            by_token = torch.from_numpy(np.repeat(evicted, num_scheduled_tokens))
            self.input_batch.block_table.compute_slot_mapping(
                num_reqs,
                self.query_start_loc.gpu[: num_reqs + 1],
                self.positions[: scheduler_output.total_num_scheduled_tokens] - by_token,
            )
        return prepared


def describe(config: KVCompressionConfig, block_size: int, origin: str) -> str:
    """What is active, in one line."""
    budget = f"{config.budget} tokens" if isinstance(config.budget, int) else f"{config.budget:.0%} of the prompt"
    window = f"{config.window} tokens" if isinstance(config.window, int) else f"{config.window:.0%} of the budget"
    parts = [
        f"KV compression is on: method {config.method}",
        f"budget {budget}",
        f"window {window}",
        f"sinks {config.sinks}",
        f"interval {config.interval}",
        f"granularity {config.granularity}",
        f"prefill {config.prefill}" + (f" (chunks of {config.chunk})" if config.evicts_prompts_in_chunks else ""),
        f"scope {config.scope}",
    ]
    if config.method == "qfilters":
        parts.insert(1, f"filter {config.filter}" + (f" (rank {config.rank}, last {config.observed} queries observed)" if config.filter == "expected" else ""))
        parts.append(f"filters {origin}")
    if isinstance(config.budget, int):
        decoding = cdiv(config.budget, block_size)
        pages = f"at most {decoding} pages of {block_size} tokens per decoding sequence"
        if config.scope == "decode":
            pages += " beside its prompt"
        if config.evicts_prompts_in_chunks:
            pages += f", {cdiv(config.budget + config.chunk, block_size)} while its prompt is read"
        parts.append(pages)
    parts.append(f"kernels {IMPLEMENTATION}")
    return ", ".join(parts)


def _rotary_emb(modules: dict[str, torch.nn.Module], layer_name: str) -> torch.nn.Module | None:
    """The rotary embedding beside an attention layer: ``...self_attn.attn`` -> ``...self_attn.rotary_emb``.

    Raises:
        ValueError: there is one of a kind whose rotation cannot be taken off queries again.
    """
    rotary_emb = modules.get(layer_name.rpartition(".")[0] + ".rotary_emb")
    if rotary_emb is not None and not isinstance(rotary_emb, RotaryEmbeddingBase):
        raise ValueError(
            f"filters cannot be calibrated for {type(rotary_emb).__name__} of {layer_name}: give existing ones as "
            "--kv-compression-config.filters"
        )
    return rotary_emb
