"""How long work takes."""

from __future__ import annotations

import time

__all__ = ["Stopwatch"]


class Stopwatch:
    """Seconds since it was made, and those of earlier runs of the same work."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self._began = time.perf_counter() - seconds
        self._cpu_began = time.process_time() - cpu_seconds

    @property
    def seconds(self) -> float:
        """Of wall-clock time."""
        return time.perf_counter() - self._began

    @property
    def cpu_seconds(self) -> float:
        """Of all threads of this process together."""
        return time.process_time() - self._cpu_began

    def read(self) -> dict[str, float]:
        """Return both, as the ``info`` of draws and flows names them."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
