"""Mass matrices: diagonal, with a few correlated directions if wanted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnnflow.gaussian import positive
from bnnflow.ranks import Ranks

__all__ = ["LowRank", "Moments", "Scale", "scale_of"]


class LowRank(NamedTuple):
    """The inverse mass matrix D^1/2 (I + V (diag(values) - I) V^T) D^1/2.

    Attributes:
        diagonal: D, ``(dim,)`` or ``(chain, dim)``, ideally the posterior variances.
        directions: V, ``(dim, rank)``, orthonormal.
        values: ``(rank,)``, ideally the variances along them in coordinates scaled by D^1/2.
    """

    diagonal: Tensor
    directions: Tensor
    values: Tensor

    @classmethod
    def identity(cls, theta: Tensor, rank: int) -> LowRank:
        """Return the identity for every chain of ``theta`` ``(chain, dim)``, with room for ``rank`` directions."""
        directions = torch.eye(theta.shape[1], rank, dtype=theta.dtype, device=theta.device)
        return cls(torch.ones_like(theta), directions, theta.new_ones(rank))


class Scale(NamedTuple):
    """A square root A of the inverse mass matrix A A^T, possibly times a step size."""

    diagonal: Tensor
    directions: Tensor  # (dim, rank)
    stretch: Tensor  # (rank,), root of the values, minus one

    def times(self, step_size: Tensor | float) -> Scale:
        """Return ``step_size`` times A, for step sizes ``(chain, 1)``."""
        return self._replace(diagonal=step_size * self.diagonal)

    def move(self, theta: Tensor, velocity: Tensor) -> Tensor:
        """Return theta + A velocity."""
        return torch.addcmul(theta, self.diagonal, self._stretched(velocity))

    def push(self, velocity: Tensor, grad: Tensor, factor: float = 1.0) -> Tensor:
        """Return velocity + factor A^T grad."""
        if len(self.stretch):
            return velocity + factor * self.pull(grad)
        return torch.addcmul(velocity, self.diagonal, grad, value=factor)

    def pull(self, grad: Tensor) -> Tensor:
        """Return A^T grad."""
        return self._stretched(self.diagonal * grad)

    def tangent(self, velocity: Tensor) -> Tensor:
        """Return A velocity."""
        return self.diagonal * self._stretched(velocity)

    def _stretched(self, vector: Tensor) -> Tensor:
        if len(self.stretch):
            return vector + ((vector @ self.directions) * self.stretch) @ self.directions.T
        return vector


def scale_of(inverse_mass_matrix: Tensor | LowRank) -> Scale:
    """Return the root of a mass matrix; a tensor is a diagonal."""
    if isinstance(inverse_mass_matrix, Tensor):
        nothing = inverse_mass_matrix.new_empty(0)
        return Scale(inverse_mass_matrix.sqrt(), nothing, nothing)
    diagonal, directions, values = inverse_mass_matrix
    return Scale(diagonal.sqrt(), directions, values.sqrt() - 1)


class Moments(NamedTuple):
    """Running sums of every chain's coordinates in float64, about a fixed point and in fixed units.

    Products of coordinates are summed over chains, and only if directions are wanted.
    """

    draws: int
    origin: Tensor  # (chain, dim)
    unit: Tensor  # (chain, dim)
    total: Tensor  # (chain, dim)
    squares: Tensor  # (chain, dim)
    products: Tensor  # (dim, dim), or empty

    @classmethod
    def start(cls, theta: Tensor, mass: LowRank) -> Moments:
        """Begin with no draws; sums are taken about ``theta``, so that they keep their digits."""
        origin = theta.double()
        dim = theta.shape[1] if mass.directions.shape[1] else 0
        nothing = torch.zeros_like(origin)
        return cls(0, origin, mass.diagonal.double().sqrt(), nothing, nothing, origin.new_zeros(dim, dim))

    def update(self, theta: Tensor) -> Moments:
        """Add one draw of every chain."""
        offset = (theta - self.origin) / self.unit
        return self._replace(
            draws=self.draws + 1,
            total=self.total + offset,
            squares=self.squares + offset * offset,
            products=self.products + offset.T @ offset if len(self.products) else self.products,
        )

    def mass(self, before: LowRank, ranks: Ranks) -> LowRank:
        """Estimate the inverse mass matrix; return ``before`` if nothing has moved.

        The diagonal of every chain is its own variances, shrunk towards their mean over all chains. Directions are
        those whose correlations, within chains and pooled over them, stretch or squeeze them most.
        """
        count = max(1, self.draws)
        mean = self.total / count
        variance = (self.squares / count - mean**2).clamp(min=0.0) * self.unit**2
        pooled = ranks.mean(variance.mean(0))
        if not bool(pooled.max() > 0):
            return before
        pooled = positive(pooled)
        weight = count / (count + _OWN_DRAWS)
        diagonal = weight * variance + (1 - weight) * pooled
        like, rank = before.diagonal, before.directions.shape[1]
        if rank == 0:
            return before._replace(diagonal=diagonal.to(like))
        covariance = ranks.mean((self.products / count - mean.T @ mean) / len(mean))
        sd = covariance.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()  # of weights that never move
        # Draws of one chain are hardly independent: a tenth of them are counted.
        seen = 0.1 * count * len(mean) * ranks.size
        shrunk = seen / (seen + len(sd))
        correlation = shrunk * covariance / sd / sd[:, None]
        correlation.diagonal().fill_(1.0)
        values, directions = torch.linalg.eigh(correlation)
        values = values.clamp(min=1e-6)  # of correlations, which have no scale: what rounding leaves of zero
        chosen = values.log().abs().topk(rank).indices
        return LowRank(diagonal.to(like), directions[:, chosen].to(like), values[chosen].to(like))


_OWN_DRAWS = 100.0  # draws of its own after which a chain's variances count as much as those of all chains
