"""The operators of csrc/ behind the signatures of ``reference``. ``kernels`` offers these where the library is
built.
"""

import importlib.resources
import warnings

import torch

from vllm_qfilters.kernels.layout import PagedCache
from vllm_qfilters.kernels.ops import PLAIN_SOFTMAX, Softmax
from vllm_qfilters.kernels.reference import pool_neighbours, take_out_pages

LIBRARY = importlib.resources.files("vllm_qfilters") / "_C.so"
OPERATORS = torch.ops.vllm_qfilters
# By operator, as of these sources.
NUM_ARGUMENTS = {
    "score_and_store": 4,
    "close_gaps": 8,
    "select_kept": 4,
    "mean_standardised": 3,
    "page_scores": 4,
    "expected_attention": 9,
    "observed_attention": 8,
    "distinctness": 5,
    "value_norms": 4,
}


def load() -> bool:
    """Loads the operators. False: the library is not built, or not for this PyTorch or these sources (then it
    warns).
    """
    if not LIBRARY.is_file():
        return False
    try:
        torch.ops.load_library(LIBRARY)
        _register_fakes()
        _check_arguments()
    except (OSError, RuntimeError) as error:
        reason = f"the C++ ones do not load, reinstall to rebuild them: {error.__cause__ or error}"
        warnings.warn(f"PyTorch kernels are used; {reason}", stacklevel=2)
        return False
    return True


def _register_fakes() -> None:
    """RuntimeError: the library is of other sources, and lacks an operator."""
    torch.library.register_fake("vllm_qfilters::score_and_store", lambda *arguments: None)
    torch.library.register_fake("vllm_qfilters::close_gaps", lambda *arguments: None)
    torch.library.register_fake(
        "vllm_qfilters::select_kept", lambda scores, *arguments: scores.new_empty(scores.shape, dtype=torch.bool)
    )
    torch.library.register_fake(
        "vllm_qfilters::mean_standardised",
        lambda scores, *arguments: scores.new_empty(scores.shape[0], 1, scores.shape[2]),
    )
    torch.library.register_fake(
        "vllm_qfilters::page_scores", lambda score_plane, pages, *arguments: score_plane.new_empty(pages.shape)
    )
    torch.library.register_fake(
        "vllm_qfilters::expected_attention",
        lambda pages, key_offsets, page_table, num_tokens, means, *rest: _fake_attention(pages, num_tokens, means),
    )
    torch.library.register_fake(
        "vllm_qfilters::observed_attention",
        lambda pages, key_offsets, page_table, num_tokens, queries, *rest: (
            _fake_attention(pages, num_tokens, queries),
            _fake_attention(pages, num_tokens, queries),
        ),
    )
    torch.library.register_fake(
        "vllm_qfilters::distinctness",
        lambda pages, offsets, page_table, num_tokens, pool: _fake_attention(pages, num_tokens, torch.empty(0)),
    )
    torch.library.register_fake(
        "vllm_qfilters::value_norms",
        lambda pages, offsets, page_table, num_tokens: _fake_attention(pages, num_tokens, torch.empty(0)),
    )


def _check_arguments() -> None:
    """RuntimeError: the library is of other sources, where an operator takes other arguments."""
    for name, expected in NUM_ARGUMENTS.items():
        found = len(getattr(OPERATORS, name).default._schema.arguments)
        if found != expected:
            raise RuntimeError(f"{name} takes {found} arguments, not {expected}")


def _fake_attention(pages: torch.Tensor, num_tokens: int, queries: torch.Tensor) -> torch.Tensor:
    return queries.new_empty(pages.shape[0], pages.shape[2], num_tokens)


def score_and_store(
    key: torch.Tensor, filters: torch.Tensor, score_plane: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See :func:`vllm_qfilters.kernels.reference.score_and_store`."""
    OPERATORS.score_and_store.default(key, filters, score_plane, slot_mapping)


def _times_key_scales(cache: PagedCache, vectors: torch.Tensor) -> torch.Tensor:
    """``vectors``, shape ``[num_layers, ...]``, contiguous: their products with stored keys are then those with the
    keys.
    """
    return (vectors * cache.key_scales.view(-1, *[1] * (vectors.dim() - 1))).contiguous()


def _of_layers(softmax: Softmax) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    """What operators read of a model's softmax: vectors have its scale already."""
    return softmax.group_sizes, softmax.sinks, softmax.soft_cap


def expected_attention(
    cache: PagedCache,
    pages: torch.Tensor,
    num_tokens: int,
    means: torch.Tensor,
    factors: torch.Tensor,
    softmax: Softmax = PLAIN_SOFTMAX,
) -> torch.Tensor:
    """See :func:`vllm_qfilters.kernels.reference.expected_attention`."""
    statistics = _times_key_scales(cache, means), _times_key_scales(cache, factors)
    return OPERATORS.expected_attention.default(
        cache.pages, cache.layout.keys, pages, num_tokens, *statistics, *_of_layers(softmax)
    )


def observed_attention(
    cache: PagedCache,
    pages: torch.Tensor,
    num_tokens: int,
    queries: torch.Tensor,
    num_newer: int,
    mean_pool: int,
    peak_reach: tuple[int, int],
    softmax: Softmax = PLAIN_SOFTMAX,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`vllm_qfilters.kernels.reference.observed_attention`."""
    mean, peak = OPERATORS.observed_attention.default(
        cache.pages,
        cache.layout.keys,
        pages,
        num_tokens - num_newer,
        _times_key_scales(cache, queries),
        *_of_layers(softmax),
    )
    return pool_neighbours(mean, peak, num_newer, mean_pool, peak_reach)


def distinctness(cache: PagedCache, pages: torch.Tensor, num_tokens: int, of_values: bool, pool: int) -> torch.Tensor:
    """See :func:`vllm_qfilters.kernels.reference.distinctness`."""
    offsets = cache.value_places if of_values else cache.layout.keys
    return OPERATORS.distinctness.default(cache.pages, offsets, pages, num_tokens, pool)


def value_norms(cache: PagedCache, pages: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """See :func:`vllm_qfilters.kernels.reference.value_norms`."""
    return OPERATORS.value_norms.default(cache.pages, cache.value_places, pages, num_tokens)


def mean_standardised(scores: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """See :func:`vllm_qfilters.kernels.reference.mean_standardised`."""
    return OPERATORS.mean_standardised.default(scores, sinks, window)


def select_kept(scores: torch.Tensor, kept: int, sinks: int, window: int, shared_by_heads: bool) -> torch.Tensor:
    """See :func:`vllm_qfilters.kernels.reference.select_kept`."""
    if shared_by_heads:
        shared = OPERATORS.select_kept.default(mean_standardised(scores, sinks, window), kept, sinks, window)
        return shared.expand(scores.shape).contiguous()
    return OPERATORS.select_kept.default(scores, kept, sinks, window)


def page_scores(plane: torch.Tensor, pages: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """See :func:`vllm_qfilters.kernels.reference.page_scores`."""
    return OPERATORS.page_scores.default(plane, pages, mean, deviation)


def compact(
    cache: PagedCache, old_pages: torch.Tensor, new_pages: torch.Tensor, is_kept: torch.Tensor, window: int
) -> None:
    """See :func:`vllm_qfilters.kernels.reference.compact`."""
    page_table, *bounds = take_out_pages(cache, old_pages, new_pages, is_kept.shape[-1], window)
    OPERATORS.close_gaps.default(
        cache.pages, cache.planes, cache.layout.keys, cache.layout.values, page_table, is_kept, *bounds
    )
