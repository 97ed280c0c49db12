"""Progress bars, shown only to a person at a terminal or a notebook, and loops that Ctrl-C ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

__all__ = ["Steps", "progress_bar", "until_interrupted"]


@dataclass
class Steps:
    """How many steps of a loop are done, and whether Ctrl-C ended it there."""

    done: int = 0
    interrupted: bool = False


@contextmanager
def until_interrupted(least: float = 1) -> Iterator[Steps]:
    """Let Ctrl-C end a loop that counts its steps, and go on with what it has computed.

    Before ``least`` steps there is nothing to go on with, and the interrupt is raised again.
    """
    steps = Steps()
    try:
        yield steps
    except KeyboardInterrupt:
        if steps.done < least:
            raise
        steps.interrupted = True


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

    Silent unless ``progress`` and stderr is a terminal, or a notebook's.

    With ``delay`` it appears only after so many seconds, since what is done sooner needs no bar,
    and goes at the end.
    """
    notebook = type(sys.stderr).__module__.startswith("ipykernel")
    shown = progress and (sys.stderr.isatty() or notebook)
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
