"""The tables of a merging step, for kernels that read them where they lie."""

import torch
from torch import Tensor


class Tables:
    """Puts what has a row for each tensor where the kernels read it, and keeps it there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: list[Tensor] = []

    def rows(self, table: Tensor | None, count: int) -> list[int]:
        """The address of each tensor's row; 0 where there is no table."""
        if table is None:
            return [0] * count
        here = table.to(self._device, non_blocking=True).contiguous()
        self._kept.append(here)
        size = here[0].numel() * here.element_size()
        return [here.data_ptr() + i * size for i in range(count)]
