"""What belongs to a whole run: kept in every param group, where state_dict and pickling find it."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from zokern.laws import LAWS
from zokern.optim.parameters import is_number
from zokern.optim.precision import PRECISIONS

SETTINGS = (
    *("eps", "samples", "seed", "law", "precision", "layerwise", "stochastic_rounding"),
    *("fuse_next", "sign", "common_random_numbers"),
)
COUNTERS = ("step", "draws", "skipped")
# How many sweeps have rounded stochastically: the draw of the next one's bits.
ROUNDINGS = "roundings"

# eps is used in float32, where smaller and larger ones become 0 and infinity.
MIN_EPS, MAX_EPS = 2.0**-126, 2.0**126
LARGEST = 2.0**128


def run_settings(
    *,
    eps: float,
    samples: int,
    seed: int | None,
    law: str,
    precision: str,
    layerwise: bool,
    stochastic_rounding: bool,
    fuse_next: bool,
    sign: bool,
    common_random_numbers: bool,
) -> dict[str, Any]:
    """The settings that all methods share, checked, and the run's counters.

    Raises:
        ValueError: for one that is out of range.
    """
    if not (is_number(eps) and MIN_EPS <= eps <= MAX_EPS):
        raise ValueError(f"eps must be positive and finite in float32, not {eps!r}")
    directions = [name for name, entry in LAWS.items() if entry.is_direction]
    if law not in directions:
        raise ValueError(f"law must be one of {', '.join(directions)}, not {law!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    return {
        "eps": float(eps),
        "samples": integer("samples", samples, at_least=1, below=1 << 32),
        "seed": run_seed(seed),
        "law": law,
        "precision": precision,
        "layerwise": bool(layerwise),
        "stochastic_rounding": bool(stochastic_rounding),
        "fuse_next": bool(fuse_next),
        "sign": bool(sign),
        "common_random_numbers": bool(common_random_numbers),
        **dict.fromkeys((*COUNTERS, ROUNDINGS), 0),
    }


def check_step(groups: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError, naming it, for what may stand in the groups but makes no step."""
    run_settings(**{key: groups[0][key] for key in SETTINGS})
    for group in groups:
        for key in ("lr", "weight_decay"):
            if not (is_number(group[key]) and abs(group[key]) < LARGEST):
                raise ValueError(f"{key} must be finite in float32, not {group[key]!r}")
        if not (is_number(group["momentum"]) and 0 <= group["momentum"] < 1):
            raise ValueError(f"momentum must be at least 0 and below 1, not {group['momentum']!r}")


def integer(name: str, value: int, *, at_least: int, below: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or not at_least <= value < below:
        raise ValueError(
            f"{name} must be an integer of at least {at_least} and below 2^{below.bit_length() - 1}"
            f", not {value!r}"
        )
    return int(value)


def run_seed(seed: int | None) -> int:
    """A seed, checked; None takes one from torch's generator, so that manual_seed governs runs."""
    if seed is None:
        return int(torch.randint(-(1 << 63), (1 << 63) - 1, ())) % (1 << 64)
    return integer("seed", seed, at_least=0, below=1 << 64)
