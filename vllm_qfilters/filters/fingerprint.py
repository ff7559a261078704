"""What the weights of a model are, in a word: filters that were calibrated for others must not be found for them."""

import hashlib

import torch
from torch import nn

SAMPLES = 64  # of every parameter


@torch.inference_mode()
def fingerprint(model: nn.Module) -> str:
    """A hash of a few numbers of every parameter.

    A fine-tuned model, a merged adapter, another revision and random weights differ in nearly every number of some
    parameter from what they were made of. Neither the names of parameters count, which adapters change, nor where the
    weights came from.

    Args:
        model: as it was loaded, or what a rank holds of it: other ways to divide it up have other fingerprints.
    """
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(f"{parameter.dtype} {tuple(parameter.shape)}".encode())
        if parameter.layout == torch.strided and parameter.numel():
            found.update(_samples(parameter).cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _samples(parameter: torch.Tensor) -> torch.Tensor:
    """Numbers at even distances, from the first to the last; strided parameters are not copied as a whole."""
    count = min(SAMPLES, parameter.numel())
    places = torch.linspace(0, parameter.numel() - 1, count, dtype=torch.float64, device=parameter.device).long()
    if parameter.element_size() == 1:
        parameter = parameter.view(torch.uint8)  # indexing knows no numbers of 8 bits that have a fraction
    if not parameter.dim():
        return parameter.reshape(1)
    return parameter[torch.unravel_index(places, parameter.shape)].contiguous()
