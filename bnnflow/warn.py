"""Warnings that point at the caller's own line, however deep in the package they arise."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]

# packages whose frames may lie between a warning and the caller
_BETWEEN = {"bnnflow", "torch", "contextlib"}


def warn(message: str) -> None:
    """Issue a ``UserWarning`` at the line that called into the package."""
    frame, level = sys._getframe(1), 2
    while (
        frame.f_back is not None
        and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
