"""The k-th largest magnitude and which of its equals are kept, by a stable sort."""

import torch
from torch import Tensor

from zokern.backends.reference.values import magnitudes, values_of
from zokern.merging import Selection, tensors_of

# A NaN that no magnitude is above, and the cut below which there is no element.
NOTHING = (0x7FFFFFFF, 0)


def select(selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds, cuts and the largest magnitude (0 where there is no element) of each tensor."""
    tensors = tensors_of(selection.values)
    own = [magnitudes(values_of(selection.values, i)) for i in range(len(tensors))]
    if selection.joined:
        threshold, cut = _kth_largest(torch.cat(own), selection.k[0])
        answers = []
        for magnitude in own:
            answers.append((threshold, min(max(cut, 0), magnitude.numel())))
            cut -= magnitude.numel()
    else:
        answers = [_kth_largest(m, k) for m, k in zip(own, selection.k, strict=True)]
    largest = [max(magnitude.tolist(), default=0) for magnitude in own]
    device = tensors[0].device

    def floats(bits: list[int]) -> Tensor:
        return torch.tensor(bits, dtype=torch.int32, device=device).view(torch.float32)

    cuts = torch.tensor([cut for _, cut in answers], device=device)
    return floats([threshold for threshold, _ in answers]), cuts, floats(largest)


def _kth_largest(magnitude: Tensor, k: int) -> tuple[int, int]:
    """The bits of the threshold, and the cut."""
    numel = magnitude.numel()
    if k == 0:
        return NOTHING
    if k >= numel:
        return 0, numel
    order = magnitude.sort(descending=True, stable=True)
    threshold, after = order.values[k - 1 : k + 1].tolist()
    all_ties = after < threshold
    return threshold, numel if all_ties else int(order.indices[k - 1]) + 1
