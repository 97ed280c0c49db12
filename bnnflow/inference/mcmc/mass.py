"""Diagonal inverse mass matrices, one for each chain, from what the chains have seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnnflow.gaussian import positive
from bnnflow.ranks import Ranks

__all__ = ["Moments"]

# draws of its own after which a chain's variances count as much as those of all chains
_OWN_DRAWS = 100.0


class Moments(NamedTuple):
    """Running sums of every chain's coordinates in float64, about a fixed point and in fixed
    units.
    """

    draws: int
    origin: Tensor  # (chain, dim)
    unit: Tensor  # (chain, dim)
    total: Tensor  # (chain, dim)
    squares: Tensor  # (chain, dim)

    @classmethod
    def start(cls, theta: Tensor, inverse_mass_matrix: Tensor) -> Moments:
        """Begin with no draws; sums are taken about ``theta``, so that they keep their digits."""
        origin = theta.double()
        nothing = torch.zeros_like(origin)
        return cls(0, origin, inverse_mass_matrix.double().sqrt(), nothing, nothing)

    def update(self, theta: Tensor) -> Moments:
        """Add one draw of every chain."""
        offset = (theta - self.origin) / self.unit
        return self._replace(
            draws=self.draws + 1,
            total=self.total + offset,
            squares=self.squares + offset * offset,
        )

    def inverse_mass_matrix(self, before: Tensor, ranks: Ranks) -> Tensor:
        """Estimate the diagonal of every chain, ``(chain, dim)``.

        Return ``before`` if nothing has moved.

        It is the chain's own variances, shrunk towards their mean over all chains.
        """
        count = max(1, self.draws)
        mean = self.total / count
        variance = (self.squares / count - mean**2).clamp(min=0.0) * self.unit**2
        pooled = ranks.mean(variance.mean(0))
        if not bool(pooled.max() > 0):
            return before
        weight = count / (count + _OWN_DRAWS)
        return (weight * variance + (1 - weight) * positive(pooled)).to(before)
