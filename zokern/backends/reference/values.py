"""The values whose magnitudes are looked at, and which of them a mask keeps."""

import torch
from torch import Tensor

from zokern.backends.reference import adam
from zokern.backends.reference.noise import values_at
from zokern.backends.reference.perturb import elements_of
from zokern.merging import Differences, Mask, Values


def values_of(values: Values, i: int) -> Tensor:
    """Of one tensor, float32, of one dimension."""
    if isinstance(values, Differences):
        return _difference(values, i)
    return adam.delta(values, i)


def _difference(values: Differences, i: int) -> Tensor:
    tensor = values.tensors[i].flatten()
    if values.bases is None:
        return tensor.float()
    difference = tensor.float() - values.bases[i].flatten().float()
    return difference.to(tensor.dtype).float() if values.rounded else difference


def magnitudes(value: Tensor) -> Tensor:
    """The bits without the sign: integers in the order of the magnitudes, NaN above infinity."""
    return value.contiguous().view(torch.int32) & 0x7FFFFFFF


def kept(mask: Mask, i: int, value: Tensor, like: Tensor) -> Tensor:
    """Whether the mask keeps each of a tensor's values."""
    if mask.thresholds is not None and mask.cuts is not None:
        magnitude = magnitudes(value)
        threshold = magnitudes(mask.thresholds)[i].to(value.device)
        index = torch.arange(value.numel(), device=value.device)
        below_cut = index < mask.cuts[i].to(value.device)
        return (magnitude > threshold) | ((magnitude == threshold) & below_cut)
    words = values_at(
        "uniform32",
        elements_of(like, mask.shards[i]),
        seed=mask.seed,
        draw=int(mask.draws[i]),
        tensor_id=mask.tensor_ids[i],
    )
    return words < mask.limits[i].to(value.device)
