"""What a method is asked to do, in one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from bnnflow.draws import Draws
from bnnflow.model import BayesianModel
from bnnflow.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from bnnflow.inference.checkpoint import Checkpoint

__all__ = ["Method", "Run"]


@dataclass(frozen=True)
class Run:
    """The settings that every method shares; a None leaves the choice to the method.

    Args:
        generator: the source of randomness, the same in every process.
        chains: number of chains, over all processes.
        warmup: transitions spent on tuning.
        draws: draws per chain.
        init: where to start, ``(dim,)`` or ``(n, dim)`` as the model computes; ``"prior"`` for draws of it.
        progress: whether a bar may be shown.
        checkpoint: where the run is kept.
        ranks: the processes that share the run.
    """

    generator: torch.Generator
    chains: int | None = None
    warmup: int | None = None
    draws: int | None = None
    init: Tensor | Literal["prior"] | None = None
    progress: bool = False
    checkpoint: Checkpoint | None = None
    ranks: Ranks = ALONE

    def chains_or(self, default: int) -> int:
        """Return the number of chains: as asked, else one for each row of ``init``, else ``default``."""
        rows = len(self.init) if isinstance(self.init, Tensor) and self.init.dim() == 2 else None
        return self.chains or rows or default

    def refuse(self, method: object, takes: str, *names: str) -> None:
        """Raise ``ValueError`` if one of the named settings was given, which ``method`` knows nothing of."""
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            raise ValueError(f"{type(method).__name__} takes {takes}, not {', '.join(given)}")


class Method(Protocol):
    """A way to get posterior draws: a frozen dataclass of settings, checked when it is made."""

    def sample(self, model: BayesianModel, run: Run) -> Draws:
        """Return draws."""
        ...
