"""Hooks of modules for the time of an evaluation."""

from collections.abc import Callable
from typing import Any


class Hook:
    """Calls a function with one argument whenever a module runs; a copy of the module has none."""

    def __init__(self, run: Callable[[Any], None] | None, argument: Any) -> None:
        self._run, self._argument = run, argument

    def __call__(self, *_: object) -> None:
        if self._run is not None:
            self._run(self._argument)

    def __reduce__(self) -> tuple:
        return Hook, (None, None)
