"""Finds the filters of a model: a given file or repository, or the local cache; keeps them there, and hands each rank
its part.
"""

import dataclasses
import hashlib
import json
import pathlib

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from vllm import envs
from vllm.distributed import GroupCoordinator
from vllm.logger import init_logger

from vllm_qfilters.filters.fingerprint import fingerprint_of
from vllm_qfilters.filters.format import VERSION, Filters, ModelIdentity, Part, save
from vllm_qfilters.filters.reader import load, max_file_bytes

logger = init_logger("vllm.kv_compression")  # below "vllm", whose handlers print it

AUTO = "auto"
_WEIGHTS_NAME = "model.safetensors"
_NOT_DOWNLOADED = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
_CALIBRATION = 2  # how it is done; what was calibrated otherwise is not found in the cache


@dataclasses.dataclass(frozen=True)
class FiltersFile:
    """A file that a rank found, and can be used.

    Attributes:
        path: where that rank runs.
        content: its :func:`vllm_qfilters.filters.fingerprint.fingerprint_of`.
        origin: a word on where it came from.
    """

    path: str
    content: str
    origin: str


def given_file(wanted: str, model: ModelIdentity, rank: int) -> FiltersFile:
    """Filters that the user named.

    Args:
        wanted: the configuration's ``filters``: a file or folder, or a repository, whose commit may follow behind an
            ``@``.
        rank: as of :class:`vllm_qfilters.filters.format.Part`.

    Raises:
        ValueError: the filters are for another model or of a lower rank, or ``wanted`` names none.
    """
    wanted = wanted.rstrip("/") or wanted
    path = pathlib.Path(wanted)
    if path.is_dir():
        path = path / _WEIGHTS_NAME
    if path.exists():
        return _checked(path, model, rank, str(path))
    if wanted.count("/") != 1 or path.suffix == ".safetensors":
        raise ValueError(f"filters={wanted!r}: no such file; give an existing one, a repository, or 'auto'")
    repository, _, commit = wanted.partition("@")
    try:
        path = pathlib.Path(_download(repository, commit or None, max_file_bytes(model)))
    except _NOT_DOWNLOADED as error:
        raise ValueError(
            f"filters={wanted!r}: neither a file nor a repository with {_WEIGHTS_NAME} that can be read "
            f"({type(error).__name__}): give another, or 'auto', which calibrates them"
        ) from error
    commit = path.parent.name  # of the snapshot in the hub's cache
    logger.warning(
        "KV compression: filters of %s, commit %s, made by others: filters %s@%s pins them",
        repository,
        commit,
        repository,
        commit,
    )
    return _checked(path, model, rank, f"hub {repository}@{commit}")


def keep(filters: Filters, model: ModelIdentity, weights: str, num_tokens: int | None = None) -> str:
    """Keeps calibrated filters in the cache where that can be written, and says in a word what became of them.

    Args: as of :func:`cache_path`.
    """
    path = cache_path(model, weights, num_tokens)
    try:
        save(path, filters, model)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "KV compression: filters cannot be kept in %s (%s): the next start calibrates again", path, error
        )
        return "not kept"
    return f"kept in {path}"


def cached_file(model: ModelIdentity, weights: str, rank: int, num_tokens: int | None = None) -> FiltersFile | None:
    """Filters that were calibrated for these weights before; None: there are none, or none that can be used.

    Args:
        model, weights, num_tokens: as of :func:`cache_path`.
        rank: as of :class:`vllm_qfilters.filters.format.Part`.
    """
    path = cache_path(model, weights, num_tokens)
    try:
        return _checked(path, model, rank, f"cache {path}") if path.exists() else None
    except (ValueError, OSError) as error:
        logger.warning("KV compression: cached filters cannot be used (%s): they are calibrated anew", error)
        return None


def part_of(file: FiltersFile, model: ModelIdentity, part: Part, group: GroupCoordinator) -> Filters:
    """The ``part`` of this rank, of a file that the first rank of ``group`` found. All its ranks call this.

    Ranks that find the same file where they run read their part of it. To others, as on machines with another cache, or
    with none, the first rank sends what it reads for them.
    """
    own = load(file.path, model, part) if _is_here(file) else None
    missing = [group.broadcast_object(part if own is None else None, rank) for rank in range(group.world_size)]
    for rank, of_rank in enumerate(missing):
        if of_rank is not None and group.is_first_rank:
            group.send_object(load(file.path, model, of_rank), rank)
        elif of_rank is not None and group.rank_in_group == rank:
            own = group.recv_object(0)
    assert own is not None, "the first rank has the file that it found"
    return own


def cache_path(model: ModelIdentity, weights: str, num_tokens: int | None = None) -> pathlib.Path:
    """Where calibrated filters are kept.

    Args:
        model: its name and revision do not count: a folder may be moved and renamed.
        weights: their :func:`vllm_qfilters.filters.fingerprint.fingerprint`.
        num_tokens: what they are calibrated from, where an engine has room for no more: engines that have more do not
            use such filters.
    """
    described = dataclasses.asdict(model)
    del described["name"], described["revision"]
    few = [] if num_tokens is None else [num_tokens]
    key = json.dumps([VERSION, _CALIBRATION, described, weights, *few], sort_keys=True)
    name = f"{model.architecture}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    return pathlib.Path(envs.VLLM_CACHE_ROOT) / "qfilters" / name


def _checked(path: pathlib.Path, model: ModelIdentity, rank: int, origin: str) -> FiltersFile:
    """Of the whole model, so that no rank finds fault with its part later."""
    load(path, model, Part(rank=rank))
    return FiltersFile(str(path), fingerprint_of([path]), origin)


def _is_here(file: FiltersFile) -> bool:
    path = pathlib.Path(file.path)
    try:
        return path.is_file() and fingerprint_of([path]) == file.content
    except OSError:
        return False


def _download(repository: str, commit: str | None, most_bytes: int) -> str:
    """From the hub, or its local cache. Raises ValueError before a file is downloaded that is too large to hold
    filters.
    """
    if try_to_load_from_cache(repository, _WEIGHTS_NAME, revision=commit) is None:
        size = get_hf_file_metadata(hf_hub_url(repository, _WEIGHTS_NAME, revision=commit)).size
        if size is not None and size > most_bytes:
            raise ValueError(
                f"{repository} holds {size} bytes, filters of this model {most_bytes} at most: is it a model, and not "
                "its filters?"
            )
    return hf_hub_download(repository, _WEIGHTS_NAME, revision=commit)
