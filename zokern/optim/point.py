"""Where a module that is evaluated layerwise shows its weights."""

from collections.abc import Sequence

from zokern import ops


class Point:
    """Where the weights seem to be: what :meth:`Displacement.from_rest` says of a target."""

    def __init__(self, draws: tuple[int, ...], coeffs: Sequence, seed: int, law: str) -> None:
        self.draws, self.law = draws, law
        self._coeffs, self._seed = coeffs, seed
        # Of members that have one row for all.
        self._shared: ops.SweepNumbers | None = None
        if not isinstance(coeffs[0], tuple):
            self._shared = self._numbers(coeffs, 1)

    def numbers(self, members: list[int]) -> ops.SweepNumbers:
        """Of a sweep of these."""
        if self._shared is not None:
            return self._shared
        return self._numbers([self._coeffs[i] for i in members], len(members))

    def _numbers(self, coeffs: Sequence, count: int) -> ops.SweepNumbers:
        slots = sum(draw < 0 for draw in self.draws)
        return ops.read_numbers(count, slots, self.draws, coeffs, seed=self._seed)
