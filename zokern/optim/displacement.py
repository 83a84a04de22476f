"""Moving weights between points of the form θ + Σ c_k·z_k, one fused sweep a move.

Restoring, moving to the next point and applying an update are the same operation: a difference of
coefficients. That is why a step of E evaluations needs E + 1 sweeps, and E with ``fuse_next``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from zokern import ops
from zokern.optim.interrupts import uninterrupted
from zokern.optim.rules import Rule
from zokern.sweep import Shard

T = TypeVar("T")

# The coefficient of each draw's direction.
Coefficients = dict[int, float]
# For each member the coefficients (of the draw's noise, of each of its dense tensors) that make up
# a draw's direction.
Expansion = list[tuple[float, ...]]
Rounding = Callable[[], int | None]


def never() -> None:
    """The draw of sweeps that round to nearest."""


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter as the sweeps see it: where its value is kept, and what moves along with it.

    Of DTensors it has the parts on this rank, and their shard.
    """

    param: Tensor
    residual: Tensor | None
    master: Tensor | None
    momentum: Tensor | None
    dense: tuple[Tensor, ...]
    tensor_id: int
    group: dict
    # The parameter and what is kept beside it, as the model and the optimizer have them.
    whole: Tensor
    kept: tuple[Tensor, ...]
    shard: Shard | None = None

    @property
    def identity(self) -> tuple[int, ...]:
        # What a DTensor wraps may be exchanged.
        place = () if self.shard is None else (self.param.data_ptr(),)
        return self.tensor_id, id(self.group), *map(id, (self.whole, *self.kept)), *place


@dataclass(frozen=True)
class Step:
    """An update of the place of rest: the estimated gradient and, by group, how it is applied."""

    gradient: Coefficients
    rule: Callable[[dict], Rule]
    sign: bool = False


@dataclass(frozen=True)
class Row:
    """What a sweep does to one member."""

    coeffs: list[float]
    scales: list[float]
    gradient: list[float]
    decay: float
    step: float


@dataclass(frozen=True)
class Route:
    """The draws that a sweep moves along: up to the place of rest, and from there to the target."""

    before: list[int]
    after: list[int]
    has_masters: bool
    accumulates: bool

    @property
    def merges(self) -> bool:
        """Whether the value at rest is not wanted, so that one coefficient leads past it."""
        return not self.has_masters and not self.accumulates


class Displacement:
    """Where weights stand: θ + Σ coefficients[draw]·z(draw), θ being their place of rest.

    z(draw) is the draw's noise, or what its expansion says; either all draws have one or none.
    Where weights have masters these stay at rest, and the parameters alone are displaced.
    """

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.coefficients: Coefficients = {}
        self.expansions: dict[int, Expansion] = {}
        # Seed and law of the noise along which the weights are displaced.
        self._noise: tuple[int, str] = (0, "")
        self._sweeper = ops.Sweeper()

    @property
    def at_rest(self) -> bool:
        return not self.coefficients

    @property
    def is_beside_rest(self) -> bool:
        """Whether the values at rest are kept elsewhere, so that it does not matter which way the
        weights have gone."""
        return self.members[0].master is not None

    def fresh(self) -> "Displacement":
        """Another one, of weights that nobody has moved yet."""
        return Displacement()

    def check(self, named_params: Sequence[tuple[str, Tensor]]) -> None:
        """Raises ValueError if it could not displace these parameters."""

    def settle(self) -> None:
        """End what an evaluation has left under way."""

    def move(
        self,
        target: Coefficients,
        *,
        seed: int,
        law: str,
        step: Step | None = None,
        rounding: Rounding = never,
    ) -> None:
        """Go to ``target`` in one sweep, with a step of the place of rest on the way.

        ``rounding`` gives the draw of a sweep that rounds stochastically, None for one that does
        not.
        """
        with uninterrupted():
            if not self.at_rest and self._noise != (seed, law):
                # Somebody has changed them in the meantime.
                self._sweep({}, None, *self._noise, rounding)
                self.coefficients = {}
            if step is not None or target != self.coefficients:
                self._sweep(target, step, seed, law, rounding)
            self.coefficients = {draw: c for draw, c in target.items() if c != 0.0}
            self._noise = (seed, law)

    def forget_all_but(self, kept: Coefficients) -> None:
        """Drop the expansions of draws that will not be moved along again."""
        self.expansions = {d: e for d, e in self.expansions.items() if d in kept}

    def keep(self, wanted: Callable[[Member], bool]) -> None:
        """Leave the other members where they stand."""
        kept = [i for i, member in enumerate(self.members) if wanted(member)]
        self.members = [self.members[i] for i in kept]
        self.expansions = {d: [rows[i] for i in kept] for d, rows in self.expansions.items()}
        if not self.members:
            self.coefficients = {}

    def from_rest(
        self, target: Coefficients, step: Step | None = None
    ) -> tuple[tuple[int, ...], tuple, tuple | None] | None:
        """Directions, coefficients and scales of the move from rest to a target, or by a step.

        None where momentum or sign take more than that.
        """
        groups = {id(member.group): member.group for member in self.members}
        to = Rule(direct=1.0)
        rules = {key: to if step is None else step.rule(g) for key, g in groups.items()}
        if not all(rule.is_direct for rule in rules.values()):
            return None
        target = target if step is None else step.gradient
        draws = list(target)

        def row(i: int) -> tuple[tuple, tuple]:
            rule = rules[id(self.members[i].group)]
            coeffs = self._expand(i, draws, [rule.direct * c for c in target.values()])
            return tuple(coeffs), (rule.scale, *[1.0] * (len(coeffs) - 1))[: len(coeffs)]

        directions = tuple(self._with_slots(draws))
        rows = self._per_member(row)
        alike = all(other is rows[0] or other == rows[0] for other in rows)
        coeffs, scales = rows[0] if alike else zip(*rows, strict=True)
        is_scaled = any(rule.scale != 1.0 for rule in rules.values())
        return directions, coeffs, scales if is_scaled else None

    def _per_member(self, row: Callable[[int], T]) -> list[T]:
        """A row for each member; where directions are noise alone, one for each group."""
        if self.expansions:
            return [row(i) for i in range(len(self.members))]
        by_group: dict[int, T] = {}
        for i, member in enumerate(self.members):
            if id(member.group) not in by_group:
                by_group[id(member.group)] = row(i)
        return [by_group[id(member.group)] for member in self.members]

    def _sweep(
        self, target: Coefficients, step: Step | None, seed: int, law: str, rounding: Rounding
    ) -> None:
        groups = {id(member.group): member.group for member in self.members}
        rules = {key: Rule() if step is None else step.rule(g) for key, g in groups.items()}
        route = self._route(target, step, list(rules.values()))
        rows = self._per_member(
            lambda i: self._row(i, route, target, step, rules[id(self.members[i].group)])
        )
        stays = route.merges and not any(
            any(row.coeffs) or any(scale != 1.0 for scale in row.scales) for row in rows
        )
        if stays:
            return
        before, after = self._with_slots(route.before), self._with_slots(route.after)
        members = self.members
        # Rows that are one for all members are given once.
        alike = all(row is rows[0] for row in rows)
        coeffs, scales, gradient = (
            getattr(rows[0], name) if alike else [getattr(row, name) for row in rows]
            for name in ("coeffs", "scales", "gradient")
        )
        update = None
        if step is not None and route.accumulates:
            update = ops.Update(
                gradient,
                [row.decay for row in rows],
                [row.step for row in rows],
                [m.momentum for m in members if m.momentum is not None] or None,
                step.sign,
            )
        has_slots = any(draw < 0 for draw in (*before, *after))
        self._sweeper.perturb_(
            [member.param for member in members],
            [*before, *after],
            coeffs,
            seed=seed,
            law=law,
            scales=scales,
            tensor_ids=[member.tensor_id for member in members],
            shards=[member.shard for member in members],
            residuals=[member.residual for member in members],
            masters=[m.master for m in members if m.master is not None] or None,
            dense=list(zip(*(m.dense for m in members), strict=True)) if has_slots else (),
            rest=len(before),
            update=update,
            rounding=rounding(),
        )
        # A cast that autocast has kept would show the forward pass the weights of before.
        torch.clear_autocast_cache()

    def _route(self, target: Coefficients, step: Step | None, rules: list[Rule]) -> Route:
        has_masters = self.members[0].master is not None
        accumulates = not all(rule.is_direct for rule in rules)
        undone = () if has_masters else self.coefficients
        gradient = () if step is None else step.gradient
        if has_masters or accumulates:
            return Route(list(dict.fromkeys((*undone, *gradient))), list(target),
                         has_masters, accumulates)  # fmt: skip
        return Route(list(dict.fromkeys((*undone, *gradient, *target))), [],
                     has_masters, accumulates)  # fmt: skip

    def _row(
        self, i: int, route: Route, target: Coefficients, step: Step | None, rule: Rule
    ) -> Row:
        gradient = {} if step is None else step.gradient
        current = {} if route.has_masters else self.coefficients
        coeffs = [
            (target.get(draw, 0.0) if route.merges else 0.0)
            - rule.scale * current.get(draw, 0.0)
            + rule.direct * gradient.get(draw, 0.0)
            for draw in route.before
        ]
        inflow = [rule.inflow * gradient.get(draw, 0.0) for draw in route.before]
        moves = self._expand(i, route.after, [target[draw] for draw in route.after])
        coeffs = self._expand(i, route.before, coeffs)
        return Row(
            coeffs=coeffs + moves,
            # The weights are scaled as they stand, before the first direction.
            scales=[rule.scale, *[1.0] * (len(coeffs) - 1)][: len(coeffs)] + [1.0] * len(moves),
            gradient=self._expand(i, route.before, inflow) + [0.0] * len(moves),
            decay=rule.decay,
            step=rule.step,
        )

    def _with_slots(self, draws: list[int]) -> list[int]:
        """Draws and the dense directions that their expansions are made of."""
        if not draws or not self.expansions:
            return draws
        return [*draws, *(~j for j in range(len(self.members[0].dense)))]

    def _expand(self, i: int, draws: list[int], coeffs: list[float]) -> list[float]:
        """Coefficients of z(draws) as those of :meth:`_with_slots`, for member i."""
        if not draws or not self.expansions:
            return coeffs
        parts = [
            [c * x for x in self.expansions[draw][i]] for draw, c in zip(draws, coeffs, strict=True)
        ]
        slots = range(1, 1 + len(self.members[0].dense))
        return [part[0] for part in parts] + [sum(part[j] for part in parts) for j in slots]
