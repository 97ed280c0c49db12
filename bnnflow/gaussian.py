"""A Gaussian over weight space: the simplest `Posterior`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bnnflow.arguments import Count, Share, checked, shaped
from bnnflow.seeding import as_generator
from bnnflow.types import Seed

__all__ = ["Gaussian", "positive"]


@checked
@dataclass(frozen=True)
class Gaussian:
    """N(loc, scale_tril scale_tril^T).

    Args:
        loc: ``(dim,)``.
        scale_tril: ``(dim, dim)`` lower triangular, or ``(dim,)`` for independent coordinates.
    """

    loc: Tensor
    scale_tril: Tensor

    def __post_init__(self) -> None:
        loc, factor = tuple(self.loc.shape), tuple(self.scale_tril.shape)
        if len(loc) != 1 or factor not in (loc, loc * 2):
            raise ValueError(
                f"loc must be (dim,) and scale_tril (dim,) or (dim, dim), got {loc} and {factor}"
            )

    @classmethod
    @checked
    def fit(cls, theta: Tensor, *, shrinkage: Share = 1e-3) -> Gaussian:
        """Fit mean and full covariance to draws ``(..., dim)``, shrunk a little towards its
        diagonal.
        """
        flat = shaped("theta", theta, None, None, lead=True).flatten(0, -2).double()
        if len(flat) < 2:
            raise ValueError("theta must be two draws or more")
        covariance = torch.cov(flat.T).reshape(flat.shape[-1], flat.shape[-1])
        # Of a weight that never moves, what float64 can tell of it.
        least = (torch.finfo(torch.float64).eps * flat.abs().amax(0)).square()
        diagonal = torch.diag(positive(torch.maximum(covariance.diagonal(), least)))
        factor = torch.linalg.cholesky((1 - shrinkage) * covariance + shrinkage * diagonal)
        return cls(flat.mean(0).to(theta.dtype), factor.to(theta.dtype))

    @classmethod
    def of_precision(cls, loc: Tensor, precision: Tensor) -> Gaussian:
        """Make the Gaussian with this precision matrix ``(dim, dim)``, factorised in float64, in
        the dtype of ``loc``.

        Raises:
            torch.linalg.LinAlgError: if it is not positive definite.
        """
        # With J the reversal and C the Cholesky factor of J P J, P^-1 = S S^T for the lower
        # triangular S = J C^-T J. lower: P = factor^T factor
        factor = torch.linalg.cholesky(precision.double().flip(0, 1)).flip(0, 1).mT
        eye = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
        return cls(
            loc, torch.linalg.solve_triangular(factor, eye, upper=False).to(loc.dtype)
        )

    @checked
    def sample(self, n: Count, seed: Seed) -> Tensor:
        """Draw ``(n, dim)``."""
        generator = as_generator(seed, self.loc.device)
        noise = torch.randn(
            n,
            len(self.loc),
            generator=generator,
            device=self.loc.device,
            dtype=self.loc.dtype,
        )
        return self.loc + (
            noise * self.scale_tril
            if self.scale_tril.dim() == 1
            else noise @ self.scale_tril.T
        )

    @checked
    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log density, ``(..., dim) -> (...)`` in float64."""
        if theta.shape[-1:] != self.loc.shape:
            raise ValueError(
                f"theta must end in an axis of length {len(self.loc)}, got shape "
                f"{tuple(theta.shape)}"
            )
        offset = (theta.to(self.loc) - self.loc).double()
        factor = self.scale_tril.double()
        if factor.dim() == 1:
            z, log_det = offset / factor, factor.log().sum()
        else:
            flat = offset.reshape(-1, len(factor))
            z = torch.linalg.solve_triangular(factor, flat.T, upper=False).T.reshape(
                offset.shape
            )
            log_det = factor.diagonal().log().sum()
        return -0.5 * (z * z).sum(-1) - log_det - 0.5 * len(factor) * math.log(2 * math.pi)


def positive(variance: Tensor) -> Tensor:
    """Return variances ``(..., dim)``, in place of zeros the mean of all: a weight that no draw
    moves stops no other.

    Others stay as they are, since weights may differ in scale by any factor. If all are zero they
    become one.
    """
    mean = variance.mean(-1, keepdim=True)
    return torch.where(variance > 0, variance, torch.where(mean > 0, mean, 1.0))
