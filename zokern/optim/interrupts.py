"""Ctrl-C between two statements must not part the weights from the record of where they stand."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts off SIGINT until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    caught = []
    signal.signal(signal.SIGINT, lambda signum, frame: caught.append((signum, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[-1])


class Postponed:
    """Puts off SIGINT until its block has ended, but for the parts in which it is let through.

    If it is not ``wanted``, nothing is put off.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._caught: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> "Postponed":
        if self._wanted and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self.now()

    @contextmanager
    def let_through(self) -> Iterator[None]:
        self.now()
        if self._handler is None:
            yield
            return
        signal.signal(signal.SIGINT, self._handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._catch)

    def now(self) -> None:
        """Handle one that was put off."""
        caught, self._caught = self._caught, None
        if caught is not None and self._handler is not None:
            self._handler(*caught)

    def _catch(self, signum: int, frame: FrameType | None) -> None:
        self._caught = signum, frame
