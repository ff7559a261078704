"""Calibrates Q-Filters inside the serving engine: runs token ids through the loaded model and watches its attention
layers.

Runs in every worker at once, before the engine serves or while it idles. Covers whatever vLLM can run, quantised and
sharded models too: queries are taken where the attention backend gets them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tp_group
from vllm.sampling_params import SamplingParams
from vllm.sequence import IntermediateTensors
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_qfilters.filters.bank import query_factors
from vllm_qfilters.filters.format import STORED_RANK, Filters
from vllm_qfilters.filters.rotary import Rotation
from vllm_qfilters.filters.statistics import JoinedLayers, LayerStatistics, QuerySpread
from vllm_qfilters.groups import PAGES_OF_STATE
from vllm_qfilters.kernels.ops import in_groups_of

NUM_SEQUENCES = 1  # four lose the same: benchmarks/results/calibration-SmolLM2-135M-Instruct.json
SEQUENCE_TOKENS = 2048
REPEATED_TOKENS = 512
# Of queries that should be equal, relative to their length: SmolLM2 and Qwen2.5 in bfloat16 have 0.0015, others 0.14.
MOST_SPREAD = 0.1
_REQUEST_ID = "kv-compression-calibration"


def random_sequences(vocab_size: int, num_sequences: int, num_tokens: int, seed: int = 0) -> list[list[int]]:
    """Uniformly random token ids: as good as text for the mean query (measured: cosine 0.96 to filters from novels)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_sequences, num_tokens), generator=generator).tolist()


def describe(sequences: Sequence[Sequence[int]]) -> str:
    """What random token ids a calibration was made with, in a few words."""
    num_tokens = len(sequences[0])
    if len(sequences) == 1:
        return f"{num_tokens} random token ids"
    return f"{len(sequences)} sequences of {num_tokens} random token ids"


def fitting(runner: GPUModelRunner, num_tokens: int) -> int:
    """At most ``num_tokens``: as many as a sequence may have, and its cache holds."""
    num_tokens = min(num_tokens, runner.model_config.max_model_len - 1)
    while num_tokens and 1 + max(map(max, _block_ids(runner, num_tokens))) > runner.kv_cache_config.num_blocks:
        num_tokens = (num_tokens - 1) // runner.cache_config.block_size * runner.cache_config.block_size
    return num_tokens


def calibrate(
    runner: GPUModelRunner,
    layers: Sequence[Sequence[torch.nn.Module]],
    rotations: Sequence[Rotation],
    sequences: Sequence[Sequence[int]],
    description: str,
    rank: int,
) -> Filters:
    """Filters of the model ``runner`` holds, from forward passes over ``sequences``.

    Args:
        runner: an idle model runner whose cache exists.
        layers: its attention layers with a KV cache, in order, each followed by those that attend to it as well.
        rotations: of each cache's.
        sequences: token ids; each is run from position 0.
        description: goes into the file as ``calibration``.
        rank: factors of the covariance per query head, at most ``head_size``.

    Returns:
        The filters of the whole model, also on a rank that holds some of its layers or heads.
    """
    statistics = [
        LayerStatistics(
            sum(layer.num_heads for layer in attending),
            attending[0].num_kv_heads,
            attending[0].head_size,
            rotation,
            runner.positions,
        )
        for attending, rotation in zip(layers, rotations, strict=True)
    ]
    is_first_rank = get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank
    total = sum(len(sequence) for sequence in sequences)
    with (
        _watched_by(layers, statistics),
        tqdm(total=total, desc="Calibrating Q-Filters", unit=" tokens", disable=not is_first_rank) as progress,
    ):
        for sequence in sequences:
            for num_tokens in _run(runner, list(sequence)):
                progress.update(num_tokens)
    names = [attending[0].layer_name for attending in layers]
    return make_filters(names, statistics, runner.identity.num_kv_heads, description, rank)


def rotations_in_use(
    runner: GPUModelRunner, layers: Sequence[Sequence[torch.nn.Module]], possible: Sequence[Sequence[Rotation]]
) -> list[Rotation]:
    """How the queries of each layer, and of those that attend to its keys, do turn with their position.

    Models leave RoPE out in some layers, where an embedding stands beside the attention all the same, and some
    embeddings do not say which elements they turn together. So it is looked at, not assumed: where one token is
    repeated, attention is over equal values, and every layer makes the same query at all positions. Taken off their
    rotation they are equal again.

    Args:
        runner: an idle model runner whose cache exists.
        layers: as of :func:`calibrate`.
        possible: of each layer; of those that explain its queries as well, the first.

    Raises:
        ValueError: queries turn in a way that none explains.
    """
    spreads = [QuerySpread(rotations, runner.positions) for rotations in possible]
    ((token_id,),) = random_sequences(runner.model_config.get_vocab_size(), 1, 1)
    with _watched_by(layers, spreads):
        for _ in _run(runner, [token_id] * fitting(runner, REPEATED_TOKENS)):
            pass
    has_rotary = any("rotary" in type(module).__name__.lower() for module in runner.model.modules())
    group, in_use = get_tp_group(), []
    for (layer, *_), rotations, spread in zip(layers, possible, spreads, strict=True):
        by_rank = group.all_gather(spread.relative()[None].to(group.device), dim=0)
        least, index = by_rank.mean(0).min(0)  # ranks agree
        if has_rotary and least > MOST_SPREAD:
            raise ValueError(
                f"KV compression cannot tell how the queries of {layer.layer_name} turn with their position (equal "
                "ones differ by "
                f"{float(least):.0%} of their length): choose filter 'static' with --kv-compression-config.filters, "
                "or another method"
            )
        in_use.append(rotations[index])
    return in_use


def make_filters(
    layers: Sequence[str],
    statistics: Sequence[LayerStatistics],
    total_kv_heads: int,
    description: str,
    rank: int = STORED_RANK,
) -> Filters:
    """The paper's filters (arXiv 2503.02812, section 3), and factors of the covariance of the coming queries, from the
    statistics of each layer's heads on this rank. The second moments of queries stay on their rank.

    A filter is, per query head, the first right singular vector of its queries after RoPE, which is the first
    eigenvector of their second moment, signed along their mean; per KV head the average over its query heads.

    Args:
        layers: the name of each.

    Raises:
        ValueError: queries are not finite.
    """

    def local(attribute: str, moment: str) -> list[torch.Tensor]:
        return [getattr(getattr(layer, attribute), moment) for layer in statistics]

    def gathered(local: Sequence[torch.Tensor], num_total: int | None = None) -> list[torch.Tensor]:
        group, wholes = get_tp_group(), []
        for of_layer in local:
            whole = group.all_gather(of_layer.to(group.device).contiguous(), dim=0).cpu()
            # With fewer KV heads than ranks, neighbouring ranks hold copies of one head.
            wholes.append(whole if num_total is None else whole[:: whole.shape[0] // num_total])
        return [whole for of_stage in _of_all_stages(wholes) for whole in of_stage]

    if not all(mean.isfinite().all() for mean in gathered(local("query_after_rope", "mean"))):  # all ranks see it
        raise ValueError(
            "KV compression cannot calibrate filters: the model's queries of the token ids it runs are not all finite "
            "numbers; give others to `vllm-qfilters calibrate --text` and its file to "
            "--kv-compression-config.filters, or choose a method without filters, such as streaming or knorm"
        )
    directions = []
    for mean, second in zip(local("query_after_rope", "mean"), local("query_after_rope", "second"), strict=True):
        direction = torch.linalg.eigh(second.double()).eigenvectors[..., -1].float()
        directions.append(torch.where((direction * mean).sum(-1, keepdim=True) < 0, -1.0, 1.0) * direction)
    filters = torch.stack([whole.unflatten(0, (total_kv_heads, -1)).mean(1) for whole in gathered(directions)])

    means, seconds = local("query_before_rope", "mean"), local("query_before_rope", "second")
    factors = [
        query_factors(mean[None], second[None], [layer.rotation], rank)[0]
        for mean, second, layer in zip(means, seconds, statistics, strict=True)
    ]
    key_mean = torch.stack(gathered(local("key_after_rope", "mean"), total_kv_heads))
    key_second = torch.stack(gathered(local("key_after_rope", "second"), total_kv_heads))
    score_mean = (filters * key_mean).sum(-1)
    score_square = torch.einsum("lhi,lhij,lhj->lh", filters, key_second, filters)
    return Filters(
        filters=filters,
        layers=tuple(name for names in _of_all_stages(layers) for name in names),
        query_mean_before_rope=_with_zeros_behind(gathered(means)),
        query_factors=_with_zeros_behind(gathered(factors)),
        score_mean=score_mean,
        score_std=(score_square - score_mean.square()).clamp(min=0).sqrt(),
        calibration=description,
    )


def measure_scores(
    runner: GPUModelRunner, scores: torch.Tensor, sequences: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each head's scores on this rank, from forward passes over ``sequences``.

    Args:
        runner: an idle model runner whose layers score the keys they write.
        scores: where they do, shape ``[num_layers, num_blocks, num_kv_heads, block_size]``.
        sequences: token ids; each is run from position 0.

    Returns:
        Two tensors of shape ``[num_layers, num_kv_heads]``, float32.
    """
    seen = []
    for sequence in sequences:
        for _ in _run(runner, list(sequence)):
            pass
        num_blocks = cdiv(len(sequence), scores.shape[3])
        by_head = scores[:, 1 : num_blocks + 1].transpose(1, 2).flatten(2)  # [num_layers, num_kv_heads, slots]
        seen.append(by_head[..., : len(sequence)].clone())
    std, mean = torch.std_mean(torch.cat(seen, dim=-1), dim=-1, correction=0)
    return mean, std


@contextlib.contextmanager
def _watched_by(
    layers: Sequence[Sequence[torch.nn.Module]], watchers: Sequence[LayerStatistics] | Sequence[QuerySpread]
) -> Iterator[None]:
    """Meanwhile each watcher sees the queries and keys of its layers."""
    for attending, watcher in zip(layers, watchers, strict=True):
        joined = JoinedLayers(watcher, len(attending), attending[0].num_kv_heads)
        for layer in attending:
            layer.impl.statistics = joined
    try:
        yield
    finally:
        for layer in (layer for attending in layers for layer in attending):
            layer.impl.statistics = None


def _run(runner: GPUModelRunner, token_ids: list[int]) -> Iterator[int]:
    """Prefills one sequence chunk by chunk through the runner, in pages from 1 on; yields the tokens of each chunk."""
    block_ids = _block_ids(runner, len(token_ids))
    max_chunk = runner.scheduler_config.max_num_batched_tokens
    try:
        for start in range(0, len(token_ids), max_chunk):
            num_tokens = min(max_chunk, len(token_ids) - start)
            _execute_stage(runner, _step(token_ids, block_ids, start, num_tokens))
            runner.sample_tokens(None)
            yield num_tokens
    finally:
        end = SchedulerOutput.make_empty()
        end.finished_req_ids = {_REQUEST_ID}
        runner.execute_model(end)


def _execute_stage(runner: GPUModelRunner, step: SchedulerOutput) -> None:
    """Runs a step through the layers of this pipeline stage, as vLLM's worker does: all stages call this."""
    stages, received = get_pp_group(), None
    if not stages.is_first_rank:
        received = IntermediateTensors(stages.recv_tensor_dict(all_gather_group=get_tp_group()))
    output = runner.execute_model(step, received)
    if not stages.is_last_rank:
        stages.send_tensor_dict(output.tensors, all_gather_group=get_tp_group())


def _of_all_stages(own: Any) -> list[Any]:
    """What each pipeline stage has of its layers, of which there may be different numbers, in order."""
    stages = get_pp_group()
    return [stages.broadcast_object(own, rank) for rank in range(stages.world_size)]


def _with_zeros_behind(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of all ``layers``, for as many heads as the layer with the most has."""
    most = max(layer.shape[0] for layer in layers)
    return torch.stack([in_groups_of(most, layer, num_kv_heads=1) for layer in layers])


def _block_ids(runner: GPUModelRunner, num_tokens: int) -> tuple[list[int], ...]:
    """Pages for a lone sequence, by KV cache group: from 1 on in the group that is compressed, behind them in others.
    Those that a sliding window has left, and that held earlier states, are written again."""
    num_blocks = cdiv(num_tokens, runner.cache_config.block_size)
    block_ids: list[list[int]] = [list(range(1, num_blocks + 1))] * len(runner.kv_cache_config.kv_cache_groups)
    next_id = num_blocks + 1
    for index, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        if index == runner.group:
            continue
        spec = group.kv_cache_spec
        places = cdiv(num_tokens, spec.block_size)
        count = min(places, PAGES_OF_STATE)
        if isinstance(spec, SlidingWindowSpec):
            reach = spec.sliding_window + runner.scheduler_config.max_num_batched_tokens
            count = min(places, cdiv(reach, spec.block_size) + 1)
        block_ids[index] = [next_id + place % count for place in range(places)]
        next_id += count
    return tuple(block_ids)


def _step(token_ids: list[int], block_ids: tuple[list[int], ...], start: int, num_tokens: int) -> SchedulerOutput:
    """The scheduler output that prefills ``num_tokens`` of a lone request from position ``start`` on."""
    step = SchedulerOutput.make_empty()
    step.num_scheduled_tokens = {_REQUEST_ID: num_tokens}
    step.total_num_scheduled_tokens = num_tokens
    if start == 0:
        request = NewRequestData(
            req_id=_REQUEST_ID,
            prompt_token_ids=token_ids,
            prefill_token_ids=token_ids,
            mm_features=[],
            sampling_params=SamplingParams(temperature=0.0, max_tokens=1),
            pooling_params=None,
            block_ids=block_ids,
            num_computed_tokens=0,
            lora_request=None,
        )
        step.scheduled_new_reqs = [request]
    else:
        step.scheduled_cached_reqs = CachedRequestData(
            req_ids=[_REQUEST_ID],
            resumed_req_ids=set(),
            new_token_ids=[[]],
            all_token_ids={},
            new_block_ids=[None],
            num_computed_tokens=[start],
            num_output_tokens=[0],
        )
    return step
