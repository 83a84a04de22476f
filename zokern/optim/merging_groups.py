"""The hyper-parameters in the groups of the merging optimizers."""

from numbers import Integral
from typing import Any

from zokern.merging import AdamNumbers
from zokern.optim.parameters import is_number

Group = dict[str, Any]

# Steps of a smaller L1 norm are not rescaled.
NEGLIGIBLE = 1e-8
LARGEST = 2.0**128
# Words have 32 bits: of less nothing is ever kept.
SMALLEST_P = 2.0**-32


def check_group(group: Group) -> None:
    """Raises ValueError, naming it, for a hyper-parameter that is out of range."""
    for key in ("lr", "weight_decay", "eps"):
        if not (is_number(group[key]) and 0 <= group[key] < LARGEST):
            raise ValueError(f"{key} must be at least 0 and finite in float32, not {group[key]!r}")
    betas = group["betas"]
    if (
        not isinstance(betas, (tuple, list))
        or len(betas) != 2
        or not all(is_number(beta) and 0 <= beta < 1 for beta in betas)
    ):
        raise ValueError(f"betas must be two numbers of at least 0 and below 1, not {betas!r}")
    for key in ("alpha", "pull"):
        if key in group and not (is_number(group[key]) and 0 <= group[key] <= 1):
            raise ValueError(f"{key} must be at least 0 and at most 1, not {group[key]!r}")
    p = group.get("reserve_p", 1.0)
    if not (is_number(p) and SMALLEST_P <= p <= 1):
        raise ValueError(f"reserve_p must be above 0 (at least 2^-32) and at most 1, not {p!r}")
    clip = group.get("clip_val", 1.0)
    if not (is_number(clip) and clip > 0):
        raise ValueError(f"clip_val must be above 0, not {clip!r}")
    steps = group.get("online_step", 1)
    if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"online_step must be an integer of at least 1, not {steps!r}")


def check_paper(group: Group) -> None:
    """Raises ValueError for what the paper's equations do not have."""
    for key in ("correct_bias", "weight_decay", "rescale"):
        if group[key]:
            raise ValueError(
                f"semantics='paper' has neither bias correction, weight decay nor rescaling; {key} "
                f"is {group[key]!r}"
            )


def numbers_of(group: Group, t: int) -> AdamNumbers:
    """The row of a parameter that takes step number t, as of a step that merges.

    The step of Adam is lr·√(1 - β₂^t)/(1 - β₁^t), or lr without the correction of the bias.
    """
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    beta1, beta2 = map(float, group["betas"])
    alpha = float(group["alpha"]) if group.get("use_merge") else 0.0
    step = lr
    if group["correct_bias"]:
        step = lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
    return AdamNumbers(
        sign=-1.0 if group["maximize"] else 1.0,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        eps=float(group["eps"]),
        step=step,
        decay=lr * weight_decay,
        alpha=alpha,
        weight=1 - alpha,
    )


def limit_of(p: float) -> int:
    """The words of uniform32 that a Bernoulli(p) mask keeps are those below."""
    return int(p * (1 << 32))
