"""The filters file, and the two conventions everything else relies on.

A score is high for tokens to keep, and a filter points along the mean query: ``score = <key, filter>``. Published files
(``nthngdy/<model>_qfilt``; make_filters.py and hf_cache.py of github.com/NathanGodey/qfilters) store the NEGATED filter
and negate the projection again. :func:`load` and :func:`save` are the only places that know: nothing else ever negates.
"""

import dataclasses
import json
import math
import os
import pathlib
import stat
import tempfile
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

FORMAT = "vllm-qfilters"
VERSION = 2
MAX_HEADER_BYTES = 1 << 20  # ours and published ones have a few thousand
MAX_MAGNITUDE = 1e12  # of a number in the file; larger ones, no model has, and scores would overflow

_PUBLISHED_NAME = "q_filters"
_OPTIONAL = (
    "query_mean_before_rope",
    "query_second_before_rope",
    "query_mean_after_rope",
    "query_second_after_rope",
    "score_mean",
    "score_std",
)
_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """What a filters file must agree on with the model it is used for.

    Attributes:
        name: as the user gave it: a repository or a folder. Informative; a moved model keeps its filters.
        architecture: of the model, e.g. LlamaForCausalLM.
        num_layers, num_kv_heads, head_size: of the whole model, not of one rank.
        num_heads: likewise; of the layer that has the most.
        rope: the rotary parameters of its configuration.
        revision: the commit of its repository; empty for a folder. Informative, like the name.
    """

    name: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rope: dict[str, Any]
    revision: str = ""

    @classmethod
    def from_model_config(cls, model_config: Any) -> "ModelIdentity":
        """From vLLM's ModelConfig."""
        rope = getattr(model_config.hf_text_config, "rope_parameters", None) or {}
        return cls(
            name=str(model_config.model),
            architecture=model_config.architecture,
            num_layers=model_config.get_total_num_hidden_layers(),
            num_heads=most_query_heads(model_config.hf_text_config),
            num_kv_heads=model_config.get_total_num_kv_heads(),
            head_size=model_config.get_head_size(),
            rope=json.loads(json.dumps(dict(rope), default=str, sort_keys=True)),
            revision=str(getattr(model_config.hf_config, "_commit_hash", None) or model_config.revision or ""),
        )


def most_query_heads(hf_text_config: Any) -> int:
    """Of a layer. Where they differ (Laguna, Step-3.5), the configuration has one number for all, and others beside."""
    by_layer = getattr(hf_text_config, "num_attention_heads_per_layer", None) or ()
    others = getattr(hf_text_config, "attention_other_setting", None) or {}
    return max(hf_text_config.num_attention_heads, others.get("num_attention_heads", 0), *by_layer)


@dataclasses.dataclass(frozen=True)
class Filters:
    """Filters of a model, and the statistics they were made from where the file has them.

    Attributes:
        filters: pointing along the mean query, shape ``[num_layers, num_kv_heads, head_size]``, float32.
        query_mean_before_rope, query_mean_after_rope: shape ``[num_layers, num_heads, head_size]``; zeros stand behind
            the heads of layers that have fewer than others, likewise below.
        query_second_before_rope, query_second_after_rope: uncentred second moments,
            shape ``[num_layers, num_heads, head_size, head_size]``.
        score_mean, score_std: of ``<key, filter>`` over the calibration tokens, shape ``[num_layers, num_kv_heads]``.
        calibration: how they were made, one line; empty if unknown.
    """

    filters: torch.Tensor
    query_mean_before_rope: torch.Tensor | None = None
    query_second_before_rope: torch.Tensor | None = None
    query_mean_after_rope: torch.Tensor | None = None
    query_second_after_rope: torch.Tensor | None = None
    score_mean: torch.Tensor | None = None
    score_std: torch.Tensor | None = None
    calibration: str = ""

    def of_layers(self, first: int, end: int) -> "Filters":
        """Of the layers from ``first`` up to ``end``, as a pipeline stage needs them."""
        values = {name: getattr(self, name) for name in ("filters", *_OPTIONAL)}
        sliced = {name: value if value is None else value[first:end] for name, value in values.items()}
        return dataclasses.replace(self, **sliced)

    def of_heads(self, first: int, count: int) -> torch.Tensor:
        """The filters of ``count`` KV heads from ``first`` on, as a tensor-parallel rank needs them."""
        return self.filters[:, first : first + count]

    def score_statistics_of_heads(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``score_mean`` and ``score_std`` of the same KV heads, where the file has them."""
        return self.score_mean[:, first : first + count], self.score_std[:, first : first + count]


def save(path: str | os.PathLike, filters: Filters, model: ModelIdentity) -> None:
    """Writes a filters file, in one piece or not at all.

    ``q_filters`` in it has the published name, shape and sign, so that tools for published files read ours.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(filters, name) for name in _OPTIONAL if getattr(filters, name) is not None}
    tensors[_PUBLISHED_NAME] = -filters.filters
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": json.dumps(dataclasses.asdict(model), sort_keys=True),
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


def load(path: str | os.PathLike, model: ModelIdentity) -> Filters:
    """Reads a filters file, ours or a published one, for ``model``. The file may come from anybody: of tensors nothing
    is read before the header, of limited length, says that they are of the model's shapes.

    Raises:
        ValueError: it is no safetensors file, lacks filters, has impossible ones, or was made for another model; the
            message has both sides' numbers.
        OSError: it cannot be read.
    """
    path = pathlib.Path(path)
    _check_sizes(path, model)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            if _PUBLISHED_NAME not in names:
                found = ", ".join(_shown(name) for name in sorted(names)[:5])
                raise ValueError(f"{path} holds no tensor {_PUBLISHED_NAME!r}, only {found}: not a filters file")
            _check_model(path, metadata, model)
            expected = _expected_shapes(model)
            tensors = {
                name: _read(path, file, name, expected[name], model)
                for name in (_PUBLISHED_NAME, *_OPTIONAL)
                if name in names
            }
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {_shown(error, 200)}") from error
    if "score_std" in tensors and bool((tensors["score_std"] < 0).any()):
        raise ValueError(f"{path}: score_std has negative numbers, which no standard deviation is")
    return Filters(filters=-tensors.pop(_PUBLISHED_NAME), **tensors, calibration=metadata.get("calibration", ""))


def max_file_bytes(model: ModelIdentity) -> int:
    """Of a filters file for ``model``, with all statistics in the widest type."""
    return MAX_HEADER_BYTES + sum(8 * math.prod(shape) for shape in _expected_shapes(model).values())


def _check_sizes(path: pathlib.Path, model: ModelIdentity) -> None:
    """Of the file and its header, before anything is parsed."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    most = max_file_bytes(model)
    if status.st_size > most:
        raise ValueError(f"{path} has {status.st_size} bytes, a filters file of {model.name} at most {most}")
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path} is not a readable safetensors file of filters: its header would have {header_bytes} bytes, "
            "theirs have "
            f"{MAX_HEADER_BYTES} at most"
        )


def _read(
    path: pathlib.Path, file: safetensors.safe_open, name: str, shape: tuple[int, ...], model: ModelIdentity
) -> torch.Tensor:
    """One tensor as float32."""
    found = file.get_slice(name)
    if tuple(found.get_shape()) != shape:
        raise ValueError(
            f"{path}: {name} has shape {_shown(tuple(found.get_shape()))}, but {model.name} needs {shape} "
            "(layers, heads, head size): the file was made for another model"
        )
    if found.get_dtype() not in _DTYPES:
        raise ValueError(
            f"{path}: {name} must hold floating-point numbers ({', '.join(_DTYPES)}), not {found.get_dtype()}"
        )
    tensor = file.get_tensor(name).to(torch.float32)
    if not bool((tensor.abs() <= MAX_MAGNITUDE).all()):  # false for NaN
        raise ValueError(f"{path}: {name} must hold finite numbers, of magnitude {MAX_MAGNITUDE:g} at most")
    return tensor


def _shown(value: Any, most: int = 80) -> str:
    """What a file says of itself, fit for one line of a log."""
    text = str(value)
    text = "".join(character if character.isprintable() else "?" for character in text[: most + 1])
    return text if len(text) <= most else text[:most] + "..."


def _expected_shapes(model: ModelIdentity) -> dict[str, tuple[int, ...]]:
    kv = (model.num_layers, model.num_kv_heads)
    query = (model.num_layers, model.num_heads, model.head_size)
    return {
        _PUBLISHED_NAME: (*kv, model.head_size),
        "query_mean_before_rope": query,
        "query_second_before_rope": (*query, model.head_size),
        "query_mean_after_rope": query,
        "query_second_after_rope": (*query, model.head_size),
        "score_mean": kv,
        "score_std": kv,
    }


def _check_model(path: pathlib.Path, metadata: dict[str, str], model: ModelIdentity) -> None:
    if metadata.get("format") != FORMAT:
        return  # a published file names no model: its shape must do
    try:
        version = int(metadata["version"])
        if version < 1:
            raise ValueError("no version")
        made_for = dict(json.loads(metadata["model"])) if version <= VERSION else {}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({type(error).__name__}): calibrate it again") from error
    if version > VERSION:
        raise ValueError(f"{path} has version {version}, this package reads up to {VERSION}: update vllm-qfilters")
    for name, value in dataclasses.asdict(model).items():
        if name not in ("name", "revision") and made_for.get(name) != value:
            raise ValueError(
                f"{path} was made for {_shown(made_for.get('name'))} ({name} {_shown(made_for.get(name))}), "
                f"but {model.name} has {name} {value}: calibrate filters for it, or use filters 'auto'"
            )
