"""Warnings that point at the caller's own line."""

import sys
import warnings

INNER = {"zokern", "torch"}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """As ``warnings.warn``, from the innermost line that is neither zokern's nor torch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in INNER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
