"""Couplings: which draw of the source travels to which draw of the target.

A coupling takes independent batches ``x0`` and ``x1`` and returns pairs with the same marginals, up to one thing: the
target is spread over its whole orbit. Every pair is moved by one random element of the group that leaves the source
invariant, the same for both ends. That keeps x0 ~ N(0, I) whatever was matched, and lets a field see all modes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bnnflow.model import BayesianModel
from bnnflow.symmetry import match
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["Coupling", "Independent", "Matched"]


class Coupling(Protocol):
    """A rule that pairs a batch of the source with a batch of the target."""

    def pair(
        self, x0: Tensor, x1: Tensor, spec: WeightSpec, group: Symmetries, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return pairs ``(batch, dim), (batch, dim)``."""
        ...


def source_symmetries(model: BayesianModel) -> Symmetries:
    """Return the symmetries of the network's function that leave the prior invariant."""
    return model.spec.symmetries(model.prior)


@dataclass(frozen=True)
class Independent:
    """Pairs as they come."""

    def pair(
        self, x0: Tensor, x1: Tensor, spec: WeightSpec, group: Symmetries, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return pairs ``(batch, dim), (batch, dim)``."""
        return _spread(x0, x1, spec, group, generator)


@dataclass(frozen=True)
class Matched:
    """Permute and flip each x0 to be as close as can be to its x1: straighter paths, for fewer solver steps.

    Raises:
        ValueError: if the prior keeps no symmetry of the network, so that there is nothing to match by.
    """

    def pair(
        self, x0: Tensor, x1: Tensor, spec: WeightSpec, group: Symmetries, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return pairs ``(batch, dim), (batch, dim)``."""
        if not group.permutation and not group.sign:
            raise ValueError("Matched needs a prior that is exchangeable over hidden units; use Independent")
        return _spread(match(x0, spec, x1, group=group), x1, spec, group, generator)


def _spread(
    x0: Tensor, x1: Tensor, spec: WeightSpec, group: Symmetries, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    if not any(group):
        return x0, x1
    x0, x1 = spec.transform(group, generator, x0, x1)
    return x0, x1
