"""A zeroth-order step: its points, its estimate, and the generator that a method writes it as."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from zokern.optim.displacement import Coefficients
from zokern.optim.randomness import RandomState


@dataclass(frozen=True)
class Move:
    """From the place of rest θ to another: scales[0]·θ + Σ coeffs[k]·z(draws[k]).

    Whoever holds the same weights can make it with :func:`zokern.ops.perturb_`, which takes all of
    these. :meth:`ZOOptimizer.ask` gives one for each point at which it wants the loss, and
    ``StepResult.update`` is the one that the step made of the place of rest.

    Attributes:
        draws: the directions; ~j stands for the method's dense direction j (ZOPrO: 0 is the
            previous update, 1 the reward delta).
        coeffs: a number for each direction; or a row of them for each parameter that moves, in the
            order of the param groups, where they differ from one to the other.
        scales: like coeffs; None where all are 1.
        seed, law: of the noise.
    """

    draws: tuple[int, ...]
    coeffs: tuple
    scales: tuple | None
    seed: int
    law: str


@dataclass(frozen=True)
class Estimate:
    """An estimated gradient, Σ gradient[draw]·z(draw), and the losses that it was made of.

    ``state`` holds what the method remembers for the next step, by the names of its ``STATE``.
    """

    gradient: Coefficients
    losses: Sequence[float]
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        losses: those that estimate the gradient, in the order of evaluation.
        draws: of the directions of the estimate.
        projected_gradient: for each draw its coefficient, in float32: the estimated gradient is
            Σ projected_gradient[k]·z(draws[k]).
        skipped: whether a loss was not finite, so that the weights were not updated.
        update: what the weights at rest made of it; None where it was skipped, or took more than
            moving along directions (momentum, sign).
    """

    losses: tuple[float, ...]
    draws: tuple[int, ...]
    projected_gradient: tuple[float, ...]
    skipped: bool
    update: Move | None

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
        # The points of the round that the weights have been moved to.
        self.visited = 0
        # Whether the weights stood at rest before it.
        self.from_rest = True
        # That of its first evaluation.
        self.random_state: RandomState | None = None
        self._method = method(self)
        self.round = next(self._method)

    def close(self) -> None:
        """Let go of the method, and with it of the optimizer."""
        self._method.close()

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
        self.visited = 0
        return None
