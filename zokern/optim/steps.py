"""A zeroth-order step: its points, its estimate, and the generator that a method writes it as."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from zokern.optim.displacement import Coefficients


@dataclass(frozen=True)
class Point:
    """A place to evaluate the loss: θ + Σ coeffs[k]·z(draws[k]).

    Whoever holds the same weights at rest can move there with :func:`zokern.ops.perturb_`.
    """

    draws: tuple[int, ...]
    coeffs: tuple[float, ...]
    seed: int
    law: str


@dataclass(frozen=True)
class Estimate:
    """An estimated gradient, Σ gradient[draw]·z(draw), and the losses that it was made of."""

    gradient: Coefficients
    losses: Sequence[float]


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        losses: those that estimate the gradient, in the order of evaluation.
        draws: of the directions of the estimate.
        projected_gradient: for each draw its coefficient: the estimated gradient is
            Σ projected_gradient[k]·z(draws[k]).
        skipped: whether a loss was not finite, so that the weights were not updated.
    """

    losses: tuple[float, ...]
    draws: tuple[int, ...]
    projected_gradient: tuple[float, ...]
    skipped: bool

    @property
    def loss(self) -> float:
        """The mean of the losses."""
        return sum(self.losses) / len(self.losses)


# Yields the points of a round, is sent their losses, returns the estimate.
Method = Generator[list[Coefficients], list[float], Estimate]


class OpenStep:
    """A step whose losses are not all known yet; dropping it leaves no trace."""

    def __init__(self, method: Callable[["OpenStep"], Method], first_draw: int) -> None:
        self.next_draw = first_draw
        self.asked = False
        self._method = method(self)
        self.round = next(self._method)

    def take_draws(self, count: int) -> list[int]:
        """The numbers of the next directions of the run."""
        draws = list(range(self.next_draw, self.next_draw + count))
        self.next_draw += count
        return draws

    def send(self, losses: list[float]) -> Estimate | None:
        """The estimate, or None where the method wants another round."""
        try:
            self.round = self._method.send(losses)
        except StopIteration as end:
            return end.value
        self.asked = False
        return None
