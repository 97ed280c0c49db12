"""Choices that several functions share, as values: checked when they are made, and passed along
whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from bnnflow.arguments import Count, Positive, checked
from bnnflow.types import Optimiser

__all__ = ["Checkpoint", "Training"]


@checked
@dataclass(frozen=True)
class Checkpoint:
    """Where a long computation keeps its state, and whether it goes on from what is there.

    Attributes:
        path: a folder for `bnnflow.sample` and `fit_inrs`, a file for trained flows.
        resume: go on with the computation that is kept there, if there is one; without it a path
            that is in use is refused.
    """

    path: str | Path
    resume: bool = False

    @classmethod
    def of(cls, given: Checkpoint | str | Path | None) -> Checkpoint | None:
        """Return the checkpoint that is meant: a path is one to begin with."""
        return given if given is None or isinstance(given, Checkpoint) else cls(given)


@checked
@dataclass(frozen=True)
class Training:
    """How long and how fast a network is trained.

    Attributes:
        budget: seconds of training, unless ``steps`` says how many.
        steps: optimiser steps; with them the same seed gives the same result, on CPU bit for bit.
        batch_size: pairs, or draws, in a step, of all processes together.
        learning_rate: at its height; the function's own if None.
        optimiser: ``"muon"``: Muon (Jordan et al. 2024) for matrices, its updates scaled to the
            size of AdamW's, and AdamW for all else; or ``"adamw"`` for all, better for small
            changes of a trained field. The function's own if None.
        patience: looks at held-out draws without a gain, before training ends.
        autocast: compute the network in bfloat16.
        compile: compile the network.
    """

    budget: Positive = 120.0
    steps: Count | None = None
    batch_size: Count = 256
    learning_rate: Positive | None = None
    optimiser: Optimiser | None = None
    patience: Count = 20
    autocast: bool = False
    compile: bool = False

    def with_defaults(self, learning_rate: float, optimiser: Optimiser) -> Self:
        """Return the same with a learning rate and an optimiser where none was chosen."""
        return replace(
            self,
            learning_rate=self.learning_rate or learning_rate,
            optimiser=self.optimiser or optimiser,
        )
