"""What the model runners of all platforms share: the cache specification, and how scores get what they need.

A model runner applies compaction plans before, and resident lengths after, what vLLM does with a step. How it does that
is the business of ``runner_v1.py`` and ``runner_v2.py``.
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_world_group,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope import Phi3LongRoPEScaledRotaryEmbedding
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.math_utils import cdiv
from vllm.utils.mem_utils import format_gib
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
)
from vllm.v1.worker.utils import select_common_block_size

from vllm_qfilters.attention import FP8_DTYPES, in_its_dtype
from vllm_qfilters.attention.latent import watch_queries, with_heads, write_keys
from vllm_qfilters.attention.queries import QueryRecorder
from vllm_qfilters.core.spec import QFiltersPageSpec, QFiltersSpec, beside_compressed, in_equal_pages
from vllm_qfilters.filters.bank import FilterBank
from vllm_qfilters.filters.calibrate import (
    NUM_SEQUENCES,
    SEQUENCE_TOKENS,
    calibrate,
    fitting,
    measure_scores,
    random_sequences,
    rotations_in_use,
)
from vllm_qfilters.filters.calibrate import describe as describe_sequences
from vllm_qfilters.filters.fingerprint import fingerprint
from vllm_qfilters.filters.format import HORIZON, STORED_RANK, Filters, ModelIdentity, Part
from vllm_qfilters.filters.load import AUTO, cached_file, given_file, keep, part_of
from vllm_qfilters.filters.rotary import RotaryTable, Rotation
from vllm_qfilters.groups import attention_index, attention_per_layer, num_attention_layers
from vllm_qfilters.kernels.ops import PLAIN_SOFTMAX, Cache, Ops, TokenStat
from vllm_qfilters.messages import QFiltersSchedulerOutput
from vllm_qfilters.methods.base import Method, Model, RecentQueries, make
from vllm_qfilters.plan import RequestCompaction
from vllm_qfilters.policy import Policy
from vllm_qfilters.worker.caches import layers_by_cache, num_query_heads
from vllm_qfilters.worker.collectives import max_over_ranks, mean_over_copies, mean_over_ranks
from vllm_qfilters.worker.compactor import Compactor
from vllm_qfilters.worker.kept_tokens import KeptTokens
from vllm_qfilters.worker.lengths import ResidentLengths
from vllm_qfilters.worker.page_scorer import PageScorer
from vllm_qfilters.worker.softmax import softmax_of
from vllm_qfilters.worker.specs import check_identity, check_layers, check_specs, compressed_group, is_compressed
from vllm_qfilters.worker.timer import CompactionTimer

logger = init_logger("vllm.kv_compression")  # below "vllm", whose handlers print it


class CompressedModelRunner:
    """Goes before a model runner of vLLM. Subclasses say where the cache and the tables of pages are.

    Attributes:
        layers: attention layers that are compressed, in order, once the cache exists.
        calibrated_layers: attention layers whose keys have the shape of theirs, in order; those with a sliding window
            are among them also where they are not compressed, so that filters serve either way.
        identity: of the model, as filters files have it.
        attending: by the name of each layer with a KV cache of its own, that layer and those that attend to it as well.
        group: KV cache group of ``layers``.
        ops: operators on the cache, once it exists.
        attends_to_narrow_values: whether vLLM's attention takes values that are narrower than keys.
        cache: keys, values and token stats of ``layers``, once they exist.
        lengths: what sequences hold in the cache.
        recorder: keeps last queries where scores go by them.
        page_scorer: in page granularity, where keys are scored.
        kept_tokens: while somebody wants to see them.
    """

    ops: Ops
    attends_to_narrow_values = True
    cache: Cache
    compactor: Compactor

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.compression = Policy.from_vllm_config(vllm_config)
        # As the front end knows it: some models write into their configuration while they are loaded.
        self.identity = ModelIdentity.from_model_config(self.model_config)
        self.lengths = ResidentLengths()
        self.compaction_timer = CompactionTimer(device)
        self.layers: list[torch.nn.Module] = []
        self.calibrated_layers: list[torch.nn.Module] = []
        self.attending: dict[str, list[torch.nn.Module]] = {}
        self.group = 0
        self.recorder: QueryRecorder | None = None
        self.page_scorer: PageScorer | None = None
        self.kept_tokens: KeptTokens | None = None
        self._rotations: list[Rotation] | None = None

    def bind_cache(self) -> None:
        """Finds out where the caches of ``layers`` lie, and has slots computed for resident tokens."""
        raise NotImplementedError

    def tables_of(self, compactions: Sequence[RequestCompaction]) -> tuple[list[int], torch.Tensor]:
        """The pages of sequences that are about to be compacted.

        Returns:
            table_rows: where each sequence stands in the table.
            block_table: shape ``[num_rows, max_num_pages]``, int32; may be written to.
        """
        raise NotImplementedError

    def replace_pages(self, compaction: RequestCompaction) -> None:
        """Lets vLLM's runner know the pages of a sequence after its compaction."""
        raise NotImplementedError

    @property
    def compressed_groups(self) -> list[bool]:
        """Of each KV cache group, whether it is compressed."""
        return [index == self.group for index in range(len(self.kv_cache_config.kv_cache_groups))]

    def kv_caches_in_their_dtype(self) -> list[torch.Tensor]:
        """The caches of ``layers``, fp8 ones as fp8 instead of bytes."""
        return [in_its_dtype(with_heads(layer.kv_cache), self.cache_config.cache_dtype) for layer in self.layers]

    @property
    def has_latents(self) -> bool:
        """Whether the cache holds latents (MLA)."""
        return isinstance(self.layers[0], MLAAttention)

    @property
    def latent_size(self) -> int | None:
        """How many of the first elements of a latent are its value; None without latents."""
        return self.layers[0].kv_lora_rank if self.has_latents else None

    def key_scales(self) -> torch.Tensor | None:
        """What keys in an fp8 cache are to be multiplied by, float32, shape ``[num_layers]``; None for other caches."""
        if self.cache_config.cache_dtype not in FP8_DTYPES:
            return None
        return torch.stack([layer._k_scale.reshape(()) for layer in self.layers]).to(self.device, torch.float32)

    def start_scoring(self, filters: Filters | None) -> None:
        """Makes what scores and compacts; layers see keys and values from now on.

        Args:
            filters: of the layers and heads of this rank; None for methods without.
        """
        method = self._method(filters)
        if not self.compression.evicts_whole_pages:
            num_heads = self.most_query_heads if self.compression.expects_attention else self.cache.num_kv_heads
            of_copies = functools.partial(mean_over_copies, num_kv_heads=self.identity.num_kv_heads)
            shared = self.compression.heads_keep_the_same
            pool = self.compression.distinct_pool
            self.compactor = Compactor(method, num_heads, shared, mean_over_ranks, of_copies, pool)
        if method.stat == TokenStat.NONE:
            return
        for index, layer in enumerate(self.layers):
            layer.impl.write_stats = functools.partial(
                self.ops.write,
                method.stat,
                planes=self.cache.planes[index],
                filters=None if method.filters is None else method.filters[index],
                seed=index,
            )

    def warm_up(self) -> None:
        """Launches every kernel that serving will, each as often as it is compiled, on vLLM's null page, which nobody
        reads."""
        if not self.ops.warm_up_tokens:
            return
        layer, dtype = self.layers[0], self.model_config.dtype
        for num_tokens in self.ops.warm_up_tokens if layer.impl.write_stats is not None else ():
            keys = torch.zeros(num_tokens, layer.num_kv_heads, layer.head_size, dtype=dtype, device=self.device)
            nowhere = torch.full((num_tokens,), -1, dtype=torch.int64, device=self.device)
            if self.has_latents:
                write_keys(layer, keys, with_heads(layer.kv_cache), nowhere)
                continue
            values = keys[..., : layer.head_size_v]
            layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, nowhere)
        if self.page_scorer is not None:
            self.page_scorer.warm_up()
        if not self.compression.evicts_whole_pages:
            recent = None if self.recorder is None else self.recorder.blank()
            self.compactor.warm_up(recent)

    def _method(self, filters: Filters | None) -> Method:
        softmax = PLAIN_SOFTMAX
        if self.compression.scores_by_queries:
            softmax = softmax_of(self._attending_to(self.layers), self.device)
        model = Model(
            cache=self.cache,
            ops=self.ops,
            softmax=softmax,
            shared_by_heads=self.compression.heads_keep_the_same,
            max_over_ranks=max_over_ranks,
            static_filters=lambda: filters.filters,
            filter_bank=functools.partial(self.filter_bank, filters),
        )
        return make(self.compression.entry, model)

    @property
    def most_query_heads(self) -> int:
        """That attend to the cache of one of ``layers``, on this rank."""
        return max(map(num_query_heads, self._attending_to(self.layers)))

    def _attending_to(self, layers: Iterable[torch.nn.Module]) -> list[list[torch.nn.Module]]:
        return [self.attending[layer.layer_name] for layer in layers]

    def apply_plan(self, scheduler_output: SchedulerOutput) -> None:
        """Evicts what the scheduler planned. Call before vLLM updates its requests: it appends new pages at the end of
        a table's row, and may zero or hand out pages that the plan gave up.
        """
        if not isinstance(scheduler_output, QFiltersSchedulerOutput):
            return
        for hit in scheduler_output.prefix_hits:
            self.lengths.add(hit.req_id, hit.evicted_tokens)
        if scheduler_output.compaction.compactions:
            self._evict(scheduler_output.compaction.compactions)
        if self.kept_tokens is not None:
            for hit in scheduler_output.prefix_hits:
                self.kept_tokens.start(hit)

    def _evict(self, compactions: Sequence[RequestCompaction]) -> None:
        if not self.compression.evicts_whole_pages:
            table_rows, block_table = self.tables_of(compactions)
            recent_queries = [self.recent_queries(compaction) for compaction in compactions]
            with self.compaction_timer.measure():
                kept = self.compactor.apply(
                    compactions, table_rows, block_table, recent_queries, returns_kept=self.kept_tokens is not None
                )
            if self.kept_tokens is not None:
                for compaction, is_kept in zip(compactions, kept, strict=True):
                    self.kept_tokens.follow(compaction, is_kept)
        elif self.kept_tokens is not None:
            table_rows, block_table = self.tables_of(compactions)
            for compaction, row in zip(compactions, table_rows, strict=True):
                num_pages = cdiv(compaction.resident_tokens, self.cache_config.block_size)
                self.kept_tokens.take_out_pages(compaction, block_table[row, :num_pages].tolist())
        for compaction in compactions:
            self.replace_pages(compaction)
            self.lengths.add(compaction.req_id, compaction.evicted_tokens)

    def record_queries(
        self, req_ids: Sequence[str], num_scheduled_tokens: np.ndarray, computed: np.ndarray, prompt: np.ndarray
    ) -> None:
        """Announces the queries of a step to the recorder, where there is one.

        Args:
            req_ids: in the order of the batch.
            num_scheduled_tokens, computed, prompt: tokens of each request in this step, before it, and of its prompt.
        """
        if self.recorder is None:
            return
        if self.compression.entry.follows_decoding or (computed < prompt).any():
            self.recorder.start_step(req_ids, num_scheduled_tokens.tolist(), computed.tolist(), prompt.tolist())
        else:
            self.recorder.skip_step()

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs = super().get_kv_cache_spec()
        # A backend may have changed the block size since the front end looked.
        self.compression = self.compression.for_block_size(self.cache_config.block_size)
        check_specs(self.compression, specs, self.model_config.max_model_len, self.attends_to_narrow_values)
        layers = self.compilation_config.static_forward_context
        block_size = self.cache_config.block_size
        spec_cls = QFiltersPageSpec if self.compression.evicts_whole_pages else QFiltersSpec
        max_resident_tokens = self.compression.max_resident_tokens(self.model_config.max_model_len, block_size)
        has_one_window = len({layers[name].sliding_window for name in specs if self._is_compressed(specs[name])}) == 1
        made: dict[str, KVCacheSpec] = {}
        for name, spec in specs.items():
            if not self._is_compressed(spec):
                made[name] = beside_compressed(spec, block_size)
                continue
            backend = layers[name].get_attn_backend()
            if backend.get_name() == "FLASHINFER" and not has_one_window:
                raise ValueError(
                    "KV compression keeps layers with and without a sliding window in one cache, for which attention "
                    "backend FLASHINFER plans one window: use --attention-backend FLASH_ATTN or TRITON_ATTN"
                )
            made[name] = spec_cls.from_attention(spec, block_size, max_resident_tokens, self._planes_in_pages(spec))
            kernel_block_size = select_common_block_size(block_size, [backend], [made[name]])
            if kernel_block_size != block_size:
                remedy = f": use --block-size {kernel_block_size} instead of {block_size}"
                if self.compression.beside.num_states:
                    remedy = (
                        f", but those as large as the model's states have {block_size}: use --attention-backend "
                        "FLASH_ATTN or TRITON_ATTN"
                    )
                raise ValueError(
                    f"KV compression cannot split pages, and attention backend {backend.get_name()} reads pages of "
                    f"{kernel_block_size} tokens at most{remedy}"
                )
        self.compression.check_block_size(block_size)
        return in_equal_pages(made)

    def _planes_in_pages(self, spec: AttentionSpec) -> int:
        """Those of latents are memory of their own: see :meth:`separate_planes`."""
        return 0 if type(spec) is MLAAttentionSpec else self.compression.num_planes

    def separate_planes(self) -> torch.Tensor | None:
        """Token stats of a cache of latents, whose pages must lie one behind the other; None for other caches.

        Shape ``[num_layers, num_blocks, num_planes, 1, block_size]``, float32.
        """
        if not self.has_latents:
            return None
        sizes = len(self.layers), self.kv_cache_config.num_blocks, self.compression.num_planes
        return torch.zeros(*sizes, 1, self.cache_config.block_size, device=self.device)

    def _is_compressed(self, spec: KVCacheSpec) -> bool:
        return is_compressed(self.compression, spec)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        if is_profiling:
            return
        groups = kv_cache_config.kv_cache_groups
        self.group = compressed_group(self.compression, groups)
        by_name = self.compilation_config.static_forward_context
        self.attending = layers_by_cache(by_name)
        names = groups[self.group].layer_names
        self.layers = [by_name[name] for name in names]
        check_layers(dict(zip(names, self.layers, strict=True)))
        of_one_shape = [group for group in groups if _kv_shape(group) == _kv_shape(groups[self.group])]
        calibrated = sorted((name for group in of_one_shape for name in group.layer_names), key=self._layer_index)
        self.calibrated_layers = [by_name[name] for name in calibrated]
        if not self.has_latents and self.layers[0].impl.alibi_slopes is not None:
            raise ValueError(
                "KV compression does not support ALiBi, which takes a token's place in the cache for its position"
            )
        if self.compression.entry.needs_filters:
            check_identity(self.identity, self.calibrated_layers)
        self.bind_cache()
        if self.has_latents:
            for layer in self.layers:
                watch_queries(layer)
        for index, attn_groups in enumerate(self.attn_groups):
            for builder in (builder for group in attn_groups for builder in group.metadata_builders):
                builder.lengths, builder.group = self.lengths, index

    def start_compression(self) -> None:
        """Finds or calibrates what scores need, and says in one line what is active. Call before serving, and before
        CUDA graphs are captured."""
        origin = ""
        filters = None
        if self.compression.entry.needs_filters:
            filters, origin = self._find_or_calibrate_filters()
        self.start_scoring(filters)
        if self.compression.observed_queries:
            self.recorder = QueryRecorder(
                len(self.layers),
                self.compression.observed_queries,
                self.most_query_heads,
                self.layers[0].head_size,
                self.model_config.dtype,
                self.device,
                self.compression.entry.follows_decoding,
                self.layers[0].num_kv_heads,
                [len(attending) for attending in self._attending_to(self.layers)],
            )
            if self._is_first_rank and self.device.type == "cuda":
                most = self.recorder.sequence_bytes * self.scheduler_config.max_num_seqs
                logger.info(
                    "KV compression: observed queries take up to %s GiB of the host's memory, pinned, if no prompt of "
                    "--max-num-seqs %d is cut",
                    format_gib(most),
                    self.scheduler_config.max_num_seqs,
                )
        for index, attending in enumerate(self._attending_to(self.layers)):
            for layer in attending:
                layer.impl.index, layer.impl.recorder = index, self.recorder
        if self.compression.evicts_whole_pages and self.compression.needs_scores:
            self.page_scorer = self._page_scorer(filters)
        self.warm_up()
        if self._is_first_rank:
            logger.info("%s", describe(self.compression, self.cache_config.block_size, origin, self.ops.name))

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any):
        if self.recorder is not None:
            for request in scheduler_output.scheduled_new_reqs:
                if not self._may_evict(request):
                    self.recorder.ignore(request.req_id)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        if self.page_scorer is not None:
            self.page_scorer.score_filled_pages(scheduler_output)
        return output

    def sample_tokens(self, grammar_output: Any):
        output = super().sample_tokens(grammar_output)
        if self.page_scorer is not None:
            output = self.page_scorer.attach(output)
        return self.compaction_timer.attach(output)

    def calibrate_filters(self, sequences: list[list[int]], description: str, rank: int = STORED_RANK) -> Filters:
        """See :func:`vllm_qfilters.filters.calibrate.calibrate`; the cache must not be in use."""
        layers = self._attending_to(self.calibrated_layers)
        return calibrate(self, layers, self.rotations(), sequences, description, rank)

    def rotations(self) -> list[Rotation]:
        """Of each calibrated layer; layers that share a rotary embedding share its rotation. The cache must not be in
        use at the first call.
        """
        if self._rotations is None:
            modules = dict(self.model.named_modules(remove_duplicate=False))  # layers share one rotary embedding
            head_size, num_positions = self.layers[0].head_size, self.model_config.max_model_len + HORIZON
            none, possible, of_layers = Rotation(None, head_size), {}, []
            places = {module: name for name, module in modules.items()}
            # Of keys made of latents the last elements turn, in heads of their own too (MiniCPM3).
            is_behind = getattr(self.model_config.hf_text_config, "kv_lora_rank", None) is not None
            for layer in self.calibrated_layers:
                # Where a layer stands, which its name does not say in all models (Falcon-H1, Zamba2).
                rotary_emb = _rotary_emb(modules, places.get(layer, layer.layer_name))
                if rotary_emb not in possible:
                    tables = _rotary_tables(rotary_emb, layer.layer_name, num_positions)
                    possible[rotary_emb] = [
                        *(
                            Rotation(table, head_size, head_size - table.rotary_dim if is_behind else 0)
                            for table in tables
                        ),
                        none,
                    ]
                of_layers.append(possible[rotary_emb])
            self._rotations = rotations_in_use(self, self._attending_to(self.calibrated_layers), of_layers)
        return self._rotations

    def filter_bank(self, filters: Filters) -> FilterBank:
        """Of the query heads of this rank."""
        first, tp_rank = self.layers[0], get_tensor_model_parallel_rank()
        if self._part().heads == slice(None):
            counts = map(num_query_heads, self._attending_to(self.layers))
            heads = [slice(tp_rank * count, (tp_rank + 1) * count) for count in counts]
        else:  # others were not read
            heads = [slice(0, self.most_query_heads)] * len(self.layers)
        rank, scale = self.compression.rank, first.impl.scale
        rotations = [self.rotations()[self.calibrated_layers.index(layer)] for layer in self.layers]
        return FilterBank(filters, rotations, heads, first.num_kv_heads, rank, scale)

    def record_kept_tokens(self) -> None:
        """From now on; forgets what was recorded before.

        Raises:
            ValueError: requests may go on from what others held, of which nothing was recorded.
        """
        if self.compression.resumes:
            raise ValueError("what stays is not recorded with prefix='resume'; use prefix='exact'")
        self.kept_tokens = KeptTokens(len(self.layers), self._kv_heads()[1], self.cache_config.block_size)

    def take_kept_tokens(self) -> dict[str, Any]:
        """What was recorded, and which part of the model it is; records no more.

        Returns:
            ``layers``: indices; ``first_kv_head`` and ``num_kv_heads``; ``requests``: see :meth:`KeptTokens.masks`.
        """
        first_kv_head, num_kv_heads = self._kv_heads()
        recorded, self.kept_tokens = self.kept_tokens, None
        return {
            "layers": [self._layer_index(layer.layer_name) for layer in self.layers],
            "first_kv_head": first_kv_head,
            "num_kv_heads": num_kv_heads,
            "requests": recorded.masks(),
        }

    def forget(self, finished: Iterable[str], restarted: Iterable[str]) -> None:
        """Requests that ended, and requests that start again after a preemption."""
        for req_ids in (finished, restarted):
            self.lengths.forget(req_ids)
            if self.recorder is not None:
                self.recorder.forget(req_ids)
        if self.kept_tokens is not None:
            self.kept_tokens.restart(restarted)

    def recent_queries(self, compaction: RequestCompaction) -> RecentQueries | None:
        """The last queries of a sequence so far, no more than tokens up to them are held.

        Where they are those of prompts alone, they are handed out for the last time at the first eviction after the
        prompt. None while a prompt with distinct tokens is read: what looking costs buys nothing there, all that stays
        is looked at again when the prompt ends.
        """
        if self.recorder is None:
            return None
        recent = self.recorder.get(compaction.req_id, compaction.position - compaction.resident_tokens)
        if recent is None:
            return None
        if not recent.have_read_prompt_at(compaction.position):
            return None if compaction.distinct_tokens else recent
        if not self.compression.entry.follows_decoding:
            self.recorder.forget([compaction.req_id])
        return recent

    def _may_evict(self, request: NewRequestData) -> bool:
        params = request.sampling_params
        limits = self.compression.request_limits(params.extra_args, request.prompt_len, self.cache_config.block_size)
        return limits is not None and request.prompt_len + params.max_tokens > limits.budget

    def weights_fingerprint(self) -> str:
        """What the weights are, for the cache of filters."""
        return fingerprint(self.identity, self.load_config.download_dir)

    def _find_or_calibrate_filters(self) -> tuple[Filters, str]:
        """Of the layers and heads of this rank, and a word on where they came from."""
        model, wanted = self.identity, self.compression.filters
        # Random weights, as benchmarks and trainers start with, come from no file.
        is_random = self.load_config.load_format == "dummy"
        found, weights, ranks, rank = None, "", get_world_group(), self.compression.rank
        if ranks.is_first_rank:  # for all: another one may be on another machine, with other files
            if wanted != AUTO:
                found = given_file(wanted, model, rank)
            elif not is_random:
                weights = self.weights_fingerprint()
                for few in dict.fromkeys((None, self._few_tokens())):
                    found = found or cached_file(model, weights, rank, few)
        found = ranks.broadcast_object(found)
        if found is not None:
            return part_of(found, model, self._part(), ranks), found.origin
        sequences = self._random_sequences()
        description = describe_sequences(sequences)
        filters = self.calibrate_filters(sequences, description, max(rank, STORED_RANK))
        if is_random:
            kept = "not kept, as the weights are random"
            if ranks.is_first_rank:
                logger.warning(
                    "KV compression: filters are calibrated of the random weights of --load-format dummy; for weights "
                    "that are loaded into the model later give --kv-compression-config.filters"
                )
        else:
            kept = keep(filters, model, weights, self._few_tokens()) if self._is_first_rank else "kept by another rank"
        return filters.of(self._part()), f"calibrated now ({description}), {kept}"

    def _few_tokens(self) -> int | None:
        """How many tokens filters are calibrated from where there is room for fewer than usual; else None."""
        num_tokens = fitting(self, SEQUENCE_TOKENS)
        return num_tokens if num_tokens < SEQUENCE_TOKENS else None

    def _random_sequences(self) -> list[list[int]]:
        return random_sequences(self.model_config.get_vocab_size(), NUM_SEQUENCES, fitting(self, SEQUENCE_TOKENS))

    def _kv_heads(self) -> tuple[int, int]:
        """The first KV head of the model that this rank holds, and how many it holds."""
        total = self.identity.num_kv_heads
        first = get_tensor_model_parallel_rank() * total // get_tensor_model_parallel_world_size()
        return first, self.layers[0].num_kv_heads

    def _part(self) -> Part:
        """What of the model's filters this rank needs."""
        num_heads, tp_rank = self.most_query_heads, get_tensor_model_parallel_rank()
        has_as_many = all(num_query_heads(each) == num_heads for each in self._attending_to(self.layers))
        first_kv_head, num_kv_heads = self._kv_heads()
        return Part(
            tuple(layer.layer_name for layer in self.layers),
            self._indices_of_layers(),
            heads=slice(tp_rank * num_heads, (tp_rank + 1) * num_heads) if has_as_many else slice(None),
            kv_heads=slice(first_kv_head, first_kv_head + num_kv_heads),
            rank=self.compression.rank,
        )

    def _indices_of_layers(self) -> tuple[int, ...]:
        """Where ``layers`` stand in files that do not name theirs: among all of the model, or of those that are
        calibrated where others are different."""
        if self.identity.num_layers == num_attention_layers(self.model_config):
            return tuple(self._layer_index(layer.layer_name) for layer in self.layers)
        return tuple(map(self.calibrated_layers.index, self.layers))

    def _layer_index(self, name: str) -> int:
        """Which attention layer of the model has this name."""
        config = self.model_config.hf_text_config
        return attention_index(config, extract_layer_index(name, attention_per_layer(config)))

    def _page_scorer(self, filters: Filters | None) -> PageScorer:
        scores = self.cache.scores
        if filters is not None and filters.score_mean is not None and filters.score_std is not None:
            mean, std = filters.score_mean, filters.score_std
        else:
            # Published filters have no statistics, and other methods no filters.
            sequences = self._random_sequences()
            mean, std = measure_scores(self, scores, sequences)
            if self._is_first_rank:
                logger.info(
                    "KV compression: page scores are normalised by what %s scored now",
                    describe_sequences(sequences),
                )
        windows = [layer.sliding_window or math.inf for layer in self.layers]
        slides = torch.tensor(windows, device=std.device) <= self.compression.sliding_window
        if not slides.all():  # what layers with a sliding window do not attend to any more is for the others to judge
            std = std.masked_fill(slides.unsqueeze(1), 0)
        return PageScorer(self.ops.page_scores, scores, mean, std, mean_over_ranks)

    @property
    def _is_first_rank(self) -> bool:
        return get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank


def _kv_shape(group: KVCacheGroupSpec) -> tuple[int, int] | None:
    """Number and size of the KV heads of its layers; None where they have none."""
    spec = group.kv_cache_spec
    return (spec.num_kv_heads, spec.head_size) if isinstance(spec, AttentionSpec) else None


def describe(config: Policy, block_size: int, origin: str, kernels: str) -> str:
    """What is active, in one line."""
    budget = f"{config.budget} tokens" if isinstance(config.budget, int) else f"{config.budget:.0%} of the prompt"
    window = f"{config.window} tokens" if isinstance(config.window, int) else f"{config.window:.0%} of the budget"
    if config.min_window:
        window += f" (at least {config.min_window} tokens, for layers with a sliding window of {config.sliding_window})"
    if config.beside.window:
        window += f" (sliding windows of {config.beside.window} tokens hold no more and are not compressed)"
    prefill = config.prefill
    if config.evicts_prompts_in_chunks:
        prefill += f" (cut every {config.prefill_interval} tokens, at most {config.chunk} beside the budget)"
    parts = [
        f"KV compression is on: method {config.method}",
        f"budget {budget}",
        f"window {window}",
        f"sinks {config.sinks}",
        f"interval {config.interval}",
        f"granularity {config.granularity}",
        *([f"prefill {prefill}"] if config.scope == "all" else []),
        f"scope {config.scope}",
        f"evict {config.evict}",
        *([f"prompt_share {config.prompt_share}"] if config.prompt_share else []),
        *([f"distinct_share {config.distinct_share}"] if config.distinct_share else []),
        *([f"prefix {config.prefix}"] if config.resumes else []),
    ]
    if config.filter is not None:
        has_rank = "rank" in config.entry.options
        details = f" (rank {config.rank}, last {config.observed} queries observed)" if has_rank else ""
        parts.insert(1, f"filter {config.filter}{details}")
        parts.append(f"filters {origin}")
    if isinstance(config.budget, int):
        decoding = cdiv(config.budget, block_size)
        pages = f"at most {decoding} pages of {block_size} tokens per decoding sequence"
        if config.scope == "decode":
            pages += " beside its prompt"
        if config.evicts_prompts_in_chunks:
            pages += f", {cdiv(config.budget + config.chunk, block_size)} while its prompt is read"
        parts.append(pages)
    parts.append(f"kernels {kernels}")
    return ", ".join(parts)


def _rotary_emb(modules: dict[str, torch.nn.Module], place: str) -> torch.nn.Module | None:
    """The rotary embedding nearest to an attention layer: ``...self_attn.attn`` -> ``...self_attn.rotary_emb``, or, in
    models that Transformers implements, that of the whole model."""
    name, dot, _ = place.rpartition(".")
    while f"{name}{dot}rotary_emb" not in modules and dot:
        name, dot, _ = name.rpartition(".")
    return modules.get(f"{name}{dot}rotary_emb")


def _rotary_tables(
    rotary_emb: torch.nn.Module | None, layer_name: str, num_positions: int
) -> Sequence[RotaryEmbeddingBase | RotaryTable]:
    """What ``rotary_emb`` may do to the queries of a layer.

    Raises:
        ValueError: its rotation cannot be taken off queries again.
    """
    if rotary_emb is None:
        return []
    tables: Sequence[RotaryEmbeddingBase | RotaryTable] = []
    if isinstance(rotary_emb, RotaryEmbeddingBase):
        if rotary_emb.cos_sin_cache.shape[1:] == (rotary_emb.rotary_dim,):  # FoPE has cosines of its own in each head
            tables = [rotary_emb]
    elif isinstance(rotary_emb, Phi3LongRoPEScaledRotaryEmbedding):
        tables = [RotaryTable.of_longrope(rotary_emb)]
    else:
        with contextlib.suppress(AttributeError):
            tables = RotaryTable.both_styles(rotary_emb, num_positions)
    if not tables:
        raise ValueError(
            f"filters cannot be calibrated for {type(rotary_emb).__name__} of {layer_name}, whose rotation cannot be "
            "taken off queries: choose a method without filters, such as streaming or knorm"
        )
    return tables
