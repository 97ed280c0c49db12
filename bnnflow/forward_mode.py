"""Forward-mode derivatives that any number of threads may take."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["jvp"]

# torch counts the levels of forward mode for the whole process: a second thread raises, or reads
# the first one's.
_LEVELS = threading.RLock()


def jvp(function: Callable, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    """Return ``function(*primals)`` and its derivative along ``tangents``, as ``torch.func.jvp``.

    One thread at a time; calls inside calls are those of one thread.
    """
    with _LEVELS:
        return torch.func.jvp(function, primals, tangents)  # type: ignore[return-value]
