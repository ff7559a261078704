"""Finds the filters of a model: a given file or repository, or the local cache; and keeps them there."""

import dataclasses
import hashlib
import json
import pathlib

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from vllm import envs
from vllm.logger import init_logger

from vllm_qfilters.filters.format import VERSION, Filters, ModelIdentity, load, max_file_bytes, save

logger = init_logger("vllm.kv_compression")  # below "vllm", whose handlers print it

AUTO = "auto"
_WEIGHTS_NAME = "model.safetensors"
_NOT_DOWNLOADED = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
_CALIBRATION = 2  # how it is done; what was calibrated otherwise is not found in the cache


def given_filters(wanted: str, model: ModelIdentity) -> tuple[Filters, str]:
    """Filters that the user named, and a word on where they came from.

    Args:
        wanted: the configuration's ``filters``: a file or folder, or a repository, whose commit may follow behind an
            ``@``.

    Raises:
        ValueError: the filters are for another model, or ``wanted`` names none.
    """
    wanted = wanted.rstrip("/") or wanted
    path = pathlib.Path(wanted)
    if path.is_dir():
        path = path / _WEIGHTS_NAME
    if path.exists():
        return load(path, model), str(path)
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
    return load(path, model), f"hub {repository}@{commit}"


def keep(filters: Filters, model: ModelIdentity, weights: str) -> str:
    """Keeps calibrated filters in the cache where that can be written, and says in a word what became of them."""
    path = cache_path(model, weights)
    try:
        save(path, filters, model)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "KV compression: filters cannot be kept in %s (%s): the next start calibrates again", path, error
        )
        return "not kept"
    return f"kept in {path}"


def cached_filters(model: ModelIdentity, weights: str) -> tuple[Filters, str] | None:
    """Filters that were calibrated for these weights before, and a word on where they came from; None: there are none,
    or none that can be used."""
    path = cache_path(model, weights)
    if not path.exists():
        return None
    try:
        return load(path, model), f"cache {path}"
    except (ValueError, OSError) as error:
        logger.warning("KV compression: cached filters cannot be used (%s): they are calibrated anew", error)
        return None


def cache_path(model: ModelIdentity, weights: str) -> pathlib.Path:
    """Where calibrated filters are kept.

    Args:
        model: its name and revision do not count: a folder may be moved and renamed.
        weights: their :func:`vllm_qfilters.filters.fingerprint.fingerprint`.
    """
    described = dataclasses.asdict(model)
    del described["name"], described["revision"]
    key = json.dumps([VERSION, _CALIBRATION, described, weights], sort_keys=True)
    name = f"{model.architecture}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    return pathlib.Path(envs.VLLM_CACHE_ROOT) / "qfilters" / name


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
