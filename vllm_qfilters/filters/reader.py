"""Reads filters files of all versions, and published ones, which may come from anybody: nothing of a tensor is read
before a header of limited length says that it is of the model's shape, and then no more than the layers and heads that
are asked for.
"""

import dataclasses
import json
import math
import os
import pathlib
import stat
from collections.abc import Sequence
from typing import Any

import safetensors
import torch

from vllm_qfilters.filters.format import (
    BY_LAYER,
    FORMAT,
    HORIZON,
    PUBLISHED_NAME,
    VERSION,
    Filters,
    ModelIdentity,
    Part,
    last,
)

MAX_HEADER_BYTES = 1 << 20  # ours have a few hundred per layer
MAX_MAGNITUDE = 1e12  # of a number in the file; larger ones, no model has, and scores would overflow

_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_WHOLE = Part()


def load(path: str | os.PathLike, model: ModelIdentity, part: Part = _WHOLE) -> Filters:
    """Reads ``part`` of a filters file, ours or a published one, for ``model``.

    Raises:
        ValueError: it is no safetensors file, lacks filters or layers, has impossible ones or too few factors, or was
            made for another model; the message has both sides' numbers.
        OSError: it cannot be read.
    """
    path = pathlib.Path(path)
    _check_sizes(path, model)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            reader = _Reader(path, file, model, part)
            if PUBLISHED_NAME not in reader.names:
                found = ", ".join(_shown(name) for name in sorted(reader.names)[:5])
                raise ValueError(f"{path} holds no tensor {PUBLISHED_NAME!r}, only {found}: not a filters file")
            if _checked_version(path, metadata, model) < 3:
                layers, tensors = part.layers or (), reader.stacked()
            else:
                layers, tensors = reader.by_layer(_checked_layers(path, metadata, model))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {_shown(error, 200)}") from error
    if "score_std" in tensors and bool((tensors["score_std"] < 0).any()):
        raise ValueError(f"{path}: score_std has negative numbers, which no standard deviation is")
    filters = -tensors.pop(PUBLISHED_NAME)
    return Filters(filters, layers, **tensors, calibration=metadata.get("calibration", ""))


def max_file_bytes(model: ModelIdentity) -> int:
    """Of a filters file for ``model``, with all statistics in the widest type. Those of version 2 are the largest."""
    return MAX_HEADER_BYTES + sum(8 * math.prod(shape) for shape in shapes_before_version_3(model).values())


def shapes_before_version_3(model: ModelIdentity) -> dict[str, tuple[int, ...]]:
    """Of the tensors of versions 1 and 2; what is after RoPE is not read any more. Published files have the first."""
    kv = (model.num_layers, model.num_kv_heads)
    query = (model.num_layers, model.num_heads, model.head_size)
    return {
        PUBLISHED_NAME: (*kv, model.head_size),
        "query_mean_before_rope": query,
        "query_second_before_rope": (*query, model.head_size),
        "query_mean_after_rope": query,
        "query_second_after_rope": (*query, model.head_size),
        "score_mean": kv,
        "score_std": kv,
    }


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads what ``part`` asks for as float32, each tensor after a look at its shape and type."""

    path: pathlib.Path
    file: Any  # safetensors.safe_open
    model: ModelIdentity
    part: Part

    @property
    def names(self) -> set[str]:
        return set(self.file.keys())

    def stacked(self) -> dict[str, torch.Tensor]:
        """Of published files, and of ours before version 3. Without factors, second moments are not read either."""
        part, shapes, names = self.part, shapes_before_version_3(self.model), self.names
        rows = None if part.layers is None else list(part.indices)
        wanted = ["query_mean_before_rope", "query_second_before_rope", "score_mean", "score_std"]
        if part.rank == 0:
            wanted.remove("query_second_before_rope")
        tensors = {}
        for name in (PUBLISHED_NAME, *wanted):
            if name in names:
                heads = part.heads if name.startswith("query") else part.kv_heads
                tensors[name] = self._layers(name, shapes[name], rows, heads)
        return tensors

    def _layers(self, name: str, shape: tuple[int, ...], rows: Sequence[int] | None, heads: slice) -> torch.Tensor:
        """Of some layers, None: of all."""
        if rows is None:
            return self._read(name, shape, (slice(None), heads))
        return torch.cat([self._read(name, shape, (slice(row, row + 1), heads)) for row in rows])

    def by_layer(self, layers: Sequence[str]) -> tuple[tuple[str, ...], dict[str, torch.Tensor]]:
        """Of version 3: the names of what was read, and the tensors of all together.

        Args:
            layers: those of the file.
        """
        model, part, names = self.model, self.part, self.names
        wanted = tuple(layers) if part.layers is None else part.layers
        for layer in wanted:
            if layer not in layers:
                raise ValueError(
                    f"{self.path} has no layer {layer}, only {_shown(layers[0])} and the like: calibrate it again"
                )
        shape = (model.num_layers, model.num_kv_heads, model.head_size)
        of_layers = [
            self._read(PUBLISHED_NAME, shape, (slice(index, index + 1), part.kv_heads))
            for index in map(layers.index, wanted)
        ]
        tensors = {PUBLISHED_NAME: torch.cat(of_layers)}
        shapes: dict[str, tuple[int, ...]] = {
            "query_mean_before_rope": (model.num_heads, model.head_size),
            "score_mean": (model.num_kv_heads,),
            "score_std": (model.num_kv_heads,),
        }
        for name in BY_LAYER:
            if not any(f"{layer}.{name}" in names for layer in wanted):
                continue
            for layer in wanted:
                if f"{layer}.{name}" not in names:
                    raise ValueError(f"{self.path} lacks {_shown(layer)}.{name}, which others have: calibrate it again")
            if name == "query_factors":
                tensors[name] = self._factors([f"{layer}.{name}" for layer in wanted])
                continue
            heads = part.heads if name.startswith("query") else part.kv_heads
            tensors[name] = torch.stack([self._read(f"{layer}.{name}", shapes[name], (heads,)) for layer in wanted])
        return wanted, tensors

    def _factors(self, names: Sequence[str]) -> torch.Tensor:
        """Of each layer as many as are asked for, or as all have."""
        model, asked = self.model, self.part.rank
        shapes = [tuple(self.file.get_slice(name).get_shape()) for name in names]
        # A shape that cannot be is refused where it is read.
        stored = [shape[1] if len(shape) == 3 and shape[1] <= model.head_size else model.head_size for shape in shapes]
        rank = min(stored) if asked is None else min(asked, model.head_size)
        if rank > min(stored):
            raise ValueError(
                f"{self.path} holds {min(stored)} factors per query head, and rank={asked} needs {rank}: set rank to "
                f"{min(stored)} at most, or make a file with `vllm-qfilters calibrate --rank {rank}`"
            )
        return torch.stack(
            [
                self._read(name, (model.num_heads, count, model.head_size), (self.part.heads, last(rank, count)))
                for name, count in zip(names, stored, strict=True)
            ]
        )

    def _read(self, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> torch.Tensor:
        found = self.file.get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise ValueError(
                f"{self.path}: {_shown(name)} has shape {_shown(tuple(found.get_shape()))}, but {self.model.name} "
                f"needs {shape}: the file was made for another model"
            )
        if found.get_dtype() not in _DTYPES:
            raise ValueError(
                f"{self.path}: {_shown(name)} must hold floating-point numbers ({', '.join(_DTYPES)}), not "
                f"{found.get_dtype()}"
            )
        tensor = found[index].to(torch.float32)
        if not bool((tensor.abs() <= MAX_MAGNITUDE).all()):  # false for NaN
            raise ValueError(
                f"{self.path}: {_shown(name)} must hold finite numbers, of magnitude {MAX_MAGNITUDE:g} at most"
            )
        return tensor


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


def _shown(value: Any, most: int = 80) -> str:
    """What a file says of itself, fit for one line of a log."""
    text = str(value)
    text = "".join(character if character.isprintable() else "?" for character in text[: most + 1])
    return text if len(text) <= most else text[:most] + "..."


def _damaged(path: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(f"{path} has a damaged header ({type(error).__name__}): calibrate it again")


def _checked_version(path: pathlib.Path, metadata: dict[str, str], model: ModelIdentity) -> int:
    """Of the format, after a look at which model the file was made for; 0: a published file, which names none, so that
    its shape must do.
    """
    if metadata.get("format") != FORMAT:
        return 0
    try:
        version = int(metadata["version"])
        if version < 1:
            raise ValueError("no version")
        made_for = dict(json.loads(metadata["model"])) if version <= VERSION else {}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if version > VERSION:
        raise ValueError(f"{path} has version {version}, this package reads up to {VERSION}: update vllm-qfilters")
    not_compared = {"name", "revision"} if version >= 3 else {"name", "revision", "has_long_rope"}
    for name, value in dataclasses.asdict(model).items():
        if name not in not_compared and made_for.get(name) != value:
            raise ValueError(
                f"{path} was made for {_shown(made_for.get('name'))} ({name} {_shown(made_for.get(name))}), "
                f"but {model.name} has {name} {value}: calibrate filters for it, or use filters 'auto'"
            )
    return version


def _checked_layers(path: pathlib.Path, metadata: dict[str, str], model: ModelIdentity) -> tuple[str, ...]:
    """The names of all layers, in order, after a look at how many positions their factors were averaged over."""
    try:
        layers, horizon = json.loads(metadata["layers"]), int(metadata["horizon"])
        names = {layer for layer in layers if isinstance(layer, str)}
        if not isinstance(layers, list) or not len(layers) == len(names) == model.num_layers:
            raise ValueError("not as many names as layers")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if horizon != HORIZON:
        raise ValueError(
            f"{path} has factors averaged over {horizon} positions, this package needs {HORIZON}: calibrate it again"
        )
    return tuple(layers)
