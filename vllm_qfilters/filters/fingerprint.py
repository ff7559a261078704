"""What the weights of a model are, in a word: filters that were calibrated for others must not be found for them."""

import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from vllm_qfilters.filters.format import ModelIdentity

_WINDOWS, _WINDOW_BYTES = 4, 64  # of every tensor; more would be long to read from a disk far away
_MOST_HEADER_BYTES = 100_000_000  # of safetensors, as their own readers have it
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".tensors")


def fingerprint(model: ModelIdentity, download_dir: str | None = None) -> str:
    """A hash of the files that the weights were loaded from.

    Of safetensors a few numbers of every tensor are read: a fine-tuned model, a merged adapter, another revision and
    another quantization differ in nearly every number of some tensor from what they were made of. Names, folders and
    times do not count. Of files in other formats, and of damaged ones, name, size and time of change count, and of a
    repository whose files are not found on this machine its commit.

    Args:
        download_dir: where the engine keeps what it downloads; None: where the hub's client does.
    """
    folder = _folder(model, download_dir)
    if folder is None:
        return f"{model.name}@{model.revision}"
    return fingerprint_of([folder] if folder.is_file() else sorted(folder.iterdir()))


def fingerprint_of(files: list[pathlib.Path]) -> str:
    """A hash of files, see :func:`fingerprint`."""
    found = hashlib.sha256()
    lines = _of_safetensors(files)
    if not lines:
        others = [path for path in files if path.suffix in _OTHER_FORMATS]
        lines = [_stat(path) for path in others or files]
    for line in lines:
        found.update(line)
    return found.hexdigest()


def _folder(model: ModelIdentity, download_dir: str | None) -> pathlib.Path | None:
    path = pathlib.Path(model.name)
    if path.exists():
        return path
    try:
        config = try_to_load_from_cache(
            model.name, "config.json", cache_dir=download_dir, revision=model.revision or None
        )
    except HFValidationError:
        return None
    return pathlib.Path(config).parent if isinstance(config, str) else None


def _of_safetensors(files: list[pathlib.Path]) -> list[bytes]:
    """A line per tensor of all files, in the order of their names."""
    tensors = {}
    for path in files:
        if path.suffix == ".safetensors":
            try:
                with path.open("rb") as file:
                    tensors.update(_tensors(file))
            except (ValueError, TypeError, KeyError):
                tensors[path.name] = _stat(path)
    return [tensors[name] for name in sorted(tensors)]


def _tensors(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Names of the tensors of a file, with what tells each from others."""
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > _MOST_HEADER_BYTES:
        raise ValueError(f"a header of {header_bytes} bytes")
    header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    for name, described in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = described["data_offsets"]
        last = max(0, end - begin - _WINDOW_BYTES)
        line = f"{name} {described['dtype']} {described['shape']}".encode()
        for window in range(_WINDOWS):
            file.seek(8 + header_bytes + begin + last * window // (_WINDOWS - 1))
            line += file.read(min(_WINDOW_BYTES, end - begin))
        yield name, line


def _stat(path: pathlib.Path) -> bytes:
    stat = path.stat()
    return f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode()
