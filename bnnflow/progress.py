"""Progress bars, shown only to a person at a terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(
    total: int | None,
    description: str,
    progress: bool,
    unit: str = "it",
    *,
    initial: int = 0,
    delay: float = 0.0,
) -> tqdm:
    """Return a tqdm bar on stderr, ``initial`` steps done.

    Silent unless ``progress`` and stderr is a terminal.

    With ``delay`` it appears only after so many seconds, since what is done sooner needs no bar,
    and goes at the end.
    """
    shown = progress and sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=not shown,
        dynamic_ncols=True,
        mininterval=0.2,
        delay=delay,
        leave=delay == 0,
    )
