"""Estimates that several methods share."""

from collections.abc import Sequence

from zokern.optim.displacement import Coefficients


def scaled(direction: Coefficients, factor: float) -> Coefficients:
    return {draw: factor * c for draw, c in direction.items()}


def pairs(directions: Sequence[Coefficients], eps: float) -> list[Coefficients]:
    """The points +ε·v and -ε·v of each direction."""
    return [scaled(v, sign * eps) for v in directions for sign in (1, -1)]


def two_sided(
    directions: Sequence[Coefficients], losses: Sequence[float], eps: float
) -> Coefficients:
    """Mean over directions of (L(θ + εv) - L(θ - εv))/2ε · v, from the losses at their pairs."""
    gradient: Coefficients = {}
    for v, plus, minus in zip(directions, losses[0::2], losses[1::2], strict=True):
        g = (plus - minus) / (2 * eps) / len(directions)
        for draw, c in v.items():
            gradient[draw] = gradient.get(draw, 0.0) + g * c
    return gradient


def ranked(draws: Sequence[int], losses: Sequence[float], *, maximize: bool) -> list[int]:
    """Draws, the best loss first; of equal ones the earlier draw."""
    sign = -1 if maximize else 1
    order = sorted(zip(losses, draws, strict=True), key=lambda pair: (sign * pair[0], pair[1]))
    return [draw for _, draw in order]
