"""What is timed together: lines of zokern's, what users run instead, and plain memory traffic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from zokern import ops

Run = Callable[[], Any]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# zokern's run, where there is one.
OURS = "zokern"
COPY = "copy"
IN_PLACE = "read and write in place"

# The scale of weights.
SCALE = 0.02
# Of data, so that it is not the noise that is being added.
DATA_SEED = 1 << 40


class Unavailable(Exception):
    """Why an operation or a peer cannot run here."""


@dataclass(frozen=True)
class Setting:
    """Where, in which dtype and on how much an operation is timed.

    Attributes:
        numel: parameters of a sweep; operations that take longer have a part of them.
        model: of :mod:`zokern.bench.models`, for lists of tensors and whole steps.
        tokens: a batch of a whole step.
    """

    device: torch.device
    dtype: torch.dtype
    numel: int
    model: str
    tokens: int = 128

    def part(self, divisor: int) -> "Setting":
        """The setting of operations whose peers take long, or which keep many tensors."""
        return replace(self, numel=max(1, self.numel // divisor))


@dataclass(frozen=True)
class Line:
    """One of zokern's runs.

    Attributes:
        floor: the fewest bytes per parameter that it can read and write.
    """

    run: Run
    floor: float


@dataclass
class Comparison:
    """Runs over the same parameters.

    Attributes:
        parameters: how many.
        lines: zokern's runs: :data:`OURS`, and variants by what differs.
        peers: what users run instead.
        skipped: peers that cannot run here, and why.
        note: what the table says of the parameters besides their number.
    """

    parameters: int
    lines: dict[str, Line]
    peers: dict[str, Run]
    skipped: dict[str, str] = field(default_factory=dict)
    note: str = ""


def bandwidth(setting: Setting, numel: int) -> dict[str, Run]:
    """A copy, and a pass that reads and writes in place: what memory can do here and now."""
    source = weights(setting, numel)
    target = torch.empty_like(source)
    return {COPY: lambda: target.copy_(source), IN_PLACE: lambda: source.mul_(1.0)}


def random_values(
    setting: Setting,
    *shape: int,
    scale: float = SCALE,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """N(0, scale²), in the dtype of the setting where none is given."""
    values = torch.zeros(shape, device=setting.device, dtype=dtype or setting.dtype)
    # The other laws have few magnitudes, which selections would find equal.
    ops.perturb_([values], [0], [scale], seed=DATA_SEED + seed, law="normal")
    return values


def weights(setting: Setting, numel: int | None = None) -> Tensor:
    return random_values(setting, setting.numel if numel is None else numel)


def numels(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
