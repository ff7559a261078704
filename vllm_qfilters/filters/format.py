"""The filters file, and the two conventions everything else relies on.

A score is high for tokens to keep, and a filter points along the mean query: ``score = <key, filter>``. Published files
(``nthngdy/<model>_qfilt``; make_filters.py and hf_cache.py of github.com/NathanGodey/qfilters) store the NEGATED filter
and negate the projection again. :func:`save` and :func:`vllm_qfilters.filters.reader.load` are the only places that
know: nothing else ever negates.

Version 3, which :func:`save` writes, has ``q_filters`` in the published shape and sign, and beside it tensors by the
name of each layer: what is known of its queries, and of the scores of its keys (:data:`BY_LAYER`). All are float32, so
that the same tokens are evicted as by what they were made of; with factors in float16, one of 2,000 tokens kept is
another one (measured). Versions 1 and 2 stacked the layers, and had second moments in the place of factors. All of them
are read.
"""

import collections
import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_qfilters.groups import LayerKinds, attention_blocks, num_attention_layers, num_sharing_layers

FORMAT = "vllm-qfilters"
VERSION = 3
HORIZON = 128  # coming positions that statistics are averaged over; 128 and 512 lose the same (measured)
STORED_RANK = 24  # of the factors, unless a calibration is asked for more

PUBLISHED_NAME = "q_filters"
BY_LAYER = ("query_mean_before_rope", "query_factors", "score_mean", "score_std")  # behind its name and a dot


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """What a filters file must agree on with the model it is used for.

    Attributes:
        name: as the user gave it: a repository or a folder. Informative; a moved model keeps its filters.
        architecture: of the model, e.g. LlamaForCausalLM.
        num_layers, num_kv_heads, head_size: of the attention layers of the whole model that have a KV cache, not of one
            rank; where those with a sliding window have other KV heads than those of full attention (Gemma 4), of the
            latter.
        num_heads: likewise; of the layer whose keys the most attend to.
        rope: the rotary parameters of its configuration.
        revision: the commit of its repository; empty for a folder. Informative, like the name.
        has_long_rope: of the two tables of longrope, positions turn by the long one, as they do where ``max_model_len``
            is beyond what the model was first trained on. Files before version 3 hold nothing that depends on it.
    """

    name: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rope: dict[str, Any]
    revision: str = ""
    has_long_rope: bool = False

    @classmethod
    def from_model_config(cls, model_config: Any) -> "ModelIdentity":
        """From vLLM's ModelConfig."""
        config = model_config.hf_text_config
        num_layers, num_kv_heads = num_attention_layers(model_config), model_config.get_total_num_kv_heads()
        head_size = head_size_of(model_config)
        kinds = LayerKinds.of(model_config)
        if kinds.num_states or num_sharing_layers(config):
            num_layers = kinds.num_full + kinds.num_sliding
        if model_config.use_mla:
            num_kv_heads = 1  # which all query heads share
        if len(kv_shapes(config)) > 1:
            num_layers = kinds.num_full
            ((num_kv_heads, head_size),) = kv_shapes(config, with_windows=False)
        rope = dict(getattr(config, "rope_parameters", None) or {})
        first_trained_on = rope.get("original_max_position_embeddings")
        return cls(
            name=str(model_config.model),
            architecture=model_config.architecture,
            num_layers=num_layers,
            num_heads=most_query_heads(config),
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            rope=json.loads(json.dumps(rope, default=str, sort_keys=True)),
            revision=str(getattr(model_config.hf_config, "_commit_hash", None) or model_config.revision or ""),
            has_long_rope=rope.get("rope_type") == "longrope" and model_config.max_model_len > first_trained_on,
        )


def kv_shapes(hf_text_config: Any, with_windows: bool = True) -> set[tuple[int, int]]:
    """Numbers and sizes of KV heads that layers have, of a configuration of Transformers that keeps what differs
    between layers in one of each (Gemma 4), or has numbers of its own for those with a sliding window (MiMo-V2) or for
    every layer (Nemotron NAS); empty: they do not differ.

    Args:
        with_windows: of layers with a sliding window too.
    """
    config = hf_text_config
    num_sliding_heads = getattr(config, "swa_num_key_value_heads", None)
    if num_sliding_heads is not None:
        of_full = {(config.num_key_value_heads, config.head_dim)}
        return of_full | {(num_sliding_heads, config.swa_head_dim)} if with_windows else of_full
    blocks = [attention for attention in attention_blocks(config) if not attention.no_op]
    if blocks:
        return {(config.num_attention_heads // attention.n_heads_in_group, None) for attention in blocks}
    if not getattr(config, "is_heterogeneous", False):
        return set()
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = [
        config.per_layer_config[index] for index, kind in enumerate(types) if with_windows or kind == "full_attention"
    ]
    return {(layer.num_key_value_heads, getattr(layer, "head_dim", None)) for layer in layers}


def head_size_of(model_config: Any) -> int:
    """Elements of a key. model_config: vLLM's, which where latents become keys of heads before they are cached
    (MiniCPM3) knows of those alone that turn."""
    config = model_config.hf_text_config
    nope, rotary = (getattr(config, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    if not model_config.use_mla and getattr(config, "kv_lora_rank", None) and nope and rotary:
        return int(nope + rotary)
    return int(model_config.get_head_size())


def most_query_heads(hf_text_config: Any, with_windows: bool = True) -> int:
    """That attend to the keys of one layer. Where layers differ in them (Laguna, Step-3.5), the configuration has one
    number for all, and others beside. Where later layers attend to the same keys (Gemma 4 E2B), theirs count too.

    Args:
        with_windows: of layers with a sliding window too, unless their KV heads are other ones: filters are of them.
    """
    config = hf_text_config
    by_layer = getattr(config, "num_attention_heads_per_layer", None) or ()
    others = getattr(config, "attention_other_setting", None) or {}
    of_layer = max(config.num_attention_heads, others.get("num_attention_heads", 0), *by_layer)
    num_sharing = num_sharing_layers(config)
    if not num_sharing:
        return of_layer
    by_kind = collections.Counter(config.layer_types[-num_sharing:])
    if with_windows and len(kv_shapes(config)) <= 1:
        return of_layer * (1 + max(by_kind.values()))
    return of_layer * (1 + by_kind["full_attention"])


@dataclasses.dataclass(frozen=True)
class Part:
    """What a rank needs of a file: the layers of its pipeline stage, its heads, and factors of its rank.

    Attributes:
        layers: names of attention layers, as vLLM has them; None: all of the file.
        indices: which of the model's they are, for files that do not name their layers.
        heads, kv_heads: of each layer.
        rank: factors per query head, ``head_size`` at most; None: all of the file.
    """

    layers: tuple[str, ...] | None = None
    indices: tuple[int, ...] = ()
    heads: slice = dataclasses.field(default_factory=lambda: slice(None))
    kv_heads: slice = dataclasses.field(default_factory=lambda: slice(None))
    rank: int | None = None


@dataclasses.dataclass(frozen=True)
class Filters:
    """Filters of a model or of a :class:`Part` of it, and the statistics they were made from where the file has them.

    What is scored by are mean and covariance of the queries of the ``HORIZON`` positions to come. The mean follows from
    that of the queries before RoPE. The covariance does not follow from few directions of theirs: averaged over the
    rotations of as many positions it has a higher rank than before, so that its eigenvectors would have to be looked
    for at every start. Instead it is averaged when it is calibrated, over the positions from 0 on, and its factors are
    kept. Turned to position n, as the mean is, they are those of the queries from n on.

    Attributes:
        filters: pointing along the mean query, shape ``[num_layers, num_kv_heads, head_size]``, float32.
        layers: the name of each, as vLLM has it; empty if the file does not say.
        query_mean_before_rope: shape ``[num_layers, num_heads, head_size]``, float32. Zeros stand behind the heads of
            layers that have fewer than others, likewise below. Where later layers attend to the same keys, the heads of
            one KV head stand layer after layer, and rank after rank where the ranks that calibrated held copies of it.
        query_factors: F with ``F^T F`` the covariance, or as much of it as ``rank`` directions hold, of the queries at
            positions 0 to ``HORIZON - 1``: rows are eigenvectors times standard deviations, the largest last. Shape
            ``[num_layers, num_heads, rank, head_size]``, float32.
        query_second_before_rope: in the place of factors, the uncentred second moment that files before version 3 have,
            shape ``[num_layers, num_heads, head_size, head_size]``, float32.
        score_mean, score_std: of ``<key, filter>`` over the calibration tokens, shape ``[num_layers, num_kv_heads]``.
        calibration: how they were made, one line; empty if unknown.
    """

    filters: torch.Tensor
    layers: tuple[str, ...] = ()
    query_mean_before_rope: torch.Tensor | None = None
    query_factors: torch.Tensor | None = None
    query_second_before_rope: torch.Tensor | None = None
    score_mean: torch.Tensor | None = None
    score_std: torch.Tensor | None = None
    calibration: str = ""

    def of(self, part: Part) -> "Filters":
        """Of these layers and heads, with no more factors than ``part`` asks for."""
        names = self.layers if part.layers is None else part.layers
        rows = [self.layers.index(name) for name in names]

        def cut(tensor: torch.Tensor | None, heads: slice) -> torch.Tensor | None:
            return None if tensor is None else tensor[rows][:, heads]

        factors = cut(self.query_factors, part.heads)
        return dataclasses.replace(
            self,
            layers=names,
            filters=cut(self.filters, part.kv_heads),
            query_mean_before_rope=cut(self.query_mean_before_rope, part.heads),
            query_factors=None if factors is None else factors[:, :, last(part.rank, factors.shape[2])],
            query_second_before_rope=cut(self.query_second_before_rope, part.heads),
            score_mean=cut(self.score_mean, part.kv_heads),
            score_std=cut(self.score_std, part.kv_heads),
        )


def save(path: str | os.PathLike, filters: Filters, model: ModelIdentity) -> None:
    """Writes a filters file, in one piece or not at all.

    ``q_filters`` in it has the published name, shape and sign, so that tools for published files read ours.

    Args:
        filters: of the whole model, whose layers have names.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {PUBLISHED_NAME: -filters.filters}
    for name in BY_LAYER:
        of_layers = getattr(filters, name)
        if of_layers is not None:
            tensors |= {f"{layer}.{name}": tensor for layer, tensor in zip(filters.layers, of_layers, strict=True)}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": json.dumps(dataclasses.asdict(model), sort_keys=True),
        "layers": json.dumps(filters.layers),
        "horizon": str(HORIZON),
        "calibration": filters.calibration,
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def file_bytes(model: ModelIdentity, rank: int = STORED_RANK) -> int:
    """Of the tensors of a file that :func:`save` writes for ``model``."""
    of_keys = model.num_kv_heads * (model.head_size + 2)  # a filter, mean and deviation of its scores
    of_queries = model.num_heads * model.head_size * (1 + rank)  # mean and factors
    return 4 * model.num_layers * (of_keys + of_queries)


def last(rank: int | None, stored: int) -> slice:
    """The factors that ``rank`` asks for, of which the largest are the last."""
    return slice(0 if rank is None else max(0, stored - rank), stored)
