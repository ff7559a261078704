"""Finds the filters of a model: a given file, the local cache, published ones on the hub."""

import dataclasses
import hashlib
import json
import pathlib

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from vllm import envs
from vllm.logger import init_logger

from vllm_qfilters.filters.format import VERSION, Filters, ModelIdentity, load, max_file_bytes

logger = init_logger("vllm.kv_compression")  # below "vllm", whose handlers print it

AUTO = "auto"
_WEIGHTS_NAME = "model.safetensors"
_PUBLISHER = "nthngdy"
_NOT_DOWNLOADED = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
_CALIBRATION = 2  # how it is done; what was calibrated otherwise is not found in the cache
_NAME_CHARACTERS = 100  # of a model in the name of a cached file, which file systems limit


def find_filters(wanted: str, model: ModelIdentity, needs_statistics: bool = False) -> tuple[Filters, str] | None:
    """Filters for ``model``, and a word on where they came from.

    Args:
        wanted: the configuration's ``filters``: ``auto``, a file or folder, or a repository.
        needs_statistics: of the queries before RoPE, which published filters lack: ``auto`` then does not look for
            those.

    Returns:
        None if ``wanted`` is ``auto`` and there are none yet: they must be calibrated.

    Raises:
        ValueError: the filters are for another model, or ``wanted`` names none.
    """
    if wanted != AUTO:
        path = pathlib.Path(wanted)
        if path.is_dir():
            path = path / _WEIGHTS_NAME
        if path.exists():
            return load(path, model), str(path)
        if wanted.count("/") != 1 or path.suffix == ".safetensors":
            raise ValueError(f"filters={wanted!r}: no such file; give an existing one, a repository, or 'auto'")
        try:
            path = _download(wanted, max_file_bytes(model))
        except _NOT_DOWNLOADED as error:
            raise ValueError(
                f"filters={wanted!r}: neither a file nor a repository that can be read: {error}"
            ) from error
        return load(path, model), f"hub {wanted}"
    cached = cache_path(model)
    if cached.exists():
        try:
            return load(cached, model), f"cache {cached}"
        except ValueError as error:
            raise ValueError(
                f"{error}; these filters were calibrated here: delete the file, and they will be again"
            ) from error
    repository = published_repository(model)
    if repository is None or needs_statistics:
        return None
    try:
        return load(_download(repository, max_file_bytes(model)), model), f"hub {repository}"
    except RepositoryNotFoundError:
        logger.info("No published filters %s.", repository)
    except _NOT_DOWNLOADED as error:
        logger.info("Published filters %s cannot be had (%s).", repository, type(error).__name__)
    return None


def cache_path(model: ModelIdentity) -> pathlib.Path:
    """Where calibrated filters of ``model`` are kept. Changes with the model's configuration and weight files."""
    key = json.dumps([VERSION, _CALIBRATION, dataclasses.asdict(model), _weight_files(model.name)], sort_keys=True)
    name = pathlib.PurePath(model.name).name[:_NAME_CHARACTERS]
    return (
        pathlib.Path(envs.VLLM_CACHE_ROOT)
        / "qfilters"
        / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    )


def published_repository(model: ModelIdentity) -> str | None:
    """The repository the authors of Q-Filters would publish ``model``'s filters in; None for a local model."""
    if pathlib.Path(model.name).exists() or model.name.count("/") != 1:
        return None
    return f"{_PUBLISHER}/{model.name.split('/')[1]}_qfilt"


def _download(repository: str, most_bytes: int) -> str:
    """From the hub, or its local cache. Raises ValueError before a file is downloaded that is too large to hold
    filters.
    """
    if try_to_load_from_cache(repository, _WEIGHTS_NAME) is None:
        size = get_hf_file_metadata(hf_hub_url(repository, _WEIGHTS_NAME)).size
        if size is not None and size > most_bytes:
            raise ValueError(
                f"{repository} holds {size} bytes, filters of this model {most_bytes} at most: is it a model, and not "
                "its filters?"
            )
    return hf_hub_download(repository, _WEIGHTS_NAME)


def _weight_files(name: str) -> list[tuple[str, int, int]]:
    folder = pathlib.Path(name)
    if not folder.is_dir():
        return []
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".gguf"))
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
