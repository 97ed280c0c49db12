"""Draws of both sides: judged by one another, and summed to an evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bnnflow import diagnostics
from bnnflow.bridge import bennett
from bnnflow.draws import Draws, as_theta
from bnnflow.gaussian import positive
from bnnflow.importance import SAME, Estimate, kish_ess
from bnnflow.model import BayesianModel
from bnnflow.seeding import as_generator
from bnnflow.types import Seed

__all__ = [
    "HeldOut",
    "Student",
    "bridge",
    "ks_distance",
    "rhat_and_ess",
]

_ROUNDING = 1e-13  # of the size of float64 numbers of any unit
# draws of each side that must be where both are before the two of them make an estimate
_OVERLAP = 10.0
_WIDTH = 1.5  # of a Student density, times the standard deviation of what it was fitted to
_LOG_PI = math.log(math.pi)


# ---------------------------------------- draws of the posterior itself


@dataclass(frozen=True)
class HeldOut:
    """Draws of chains, by which those of a flow are judged.

    Attributes:
        theta: ``(n, dim)``.
        shape: chains and draws of each; draws without chains are so many chains of one.
        log_weights: ``(n,)``, normalised, or None.
    """

    theta: Tensor
    shape: tuple[int, int]
    log_weights: Tensor | None = None

    @classmethod
    def of(
        cls,
        draws: Draws | Tensor | tuple[Tensor, Tensor | None],
        model: BayesianModel,
        most: int,
    ) -> HeldOut:
        """Check draws and keep at most ``most`` of them, evenly along the chains.

        Args:
            draws: draws; weights ``(chain, draw, dim)``, or ``(n, dim)`` if they are independent;
                or a pair of weights and log weights.
            model: whose posterior they are from.
            most: bound on their number.

        Raises:
            ValueError: if they do not fit the model, are fewer than ten, or hold NaN.
        """
        flat, weights = as_theta(draws, "held_out")
        model.spec.check(flat, "held_out")
        model.check_draws(draws)
        theta = (
            draws.theta
            if isinstance(draws, Draws)
            else draws[0]
            if isinstance(draws, tuple)
            else draws
        )
        shape = (theta.shape[0], theta.shape[1]) if theta.dim() == 3 else (len(flat), 1)
        if len(flat) < 10:
            raise ValueError(f"held_out needs at least 10 draws, got {len(flat)}")
        broken = int((~flat.isfinite().all(1)).sum())
        if broken:
            raise ValueError(f"{broken} of {len(flat)} held-out draws are NaN or infinite")
        if weights is not None and not bool(
            (weights < math.inf).all() and (weights > -math.inf).any()
        ):
            raise ValueError(
                "the log weights of the held-out draws must not be NaN or +inf, nor "
                "all be zero weights"
            )
        rows = torch.arange(len(flat)).unflatten(0, shape)
        if len(flat) > most:
            per_chain = max(1, most // shape[0])
            rows = rows[
                :, torch.linspace(0, shape[1] - 1, min(per_chain, shape[1])).round().long()
            ]
            rows = rows[torch.linspace(0, shape[0] - 1, min(most, shape[0])).round().long()]
        kept = rows.flatten().to(flat.device)
        flat = flat[kept].to(model.device, model.dtype)
        if weights is not None:
            weights = weights[kept].to(model.device).double()
            weights = weights - weights.logsumexp(0)
        return cls(flat, (rows.shape[0], rows.shape[1]), weights)

    @property
    def weights(self) -> Tensor:
        """The log weights ``(n,)``, normalised; equal ones if there are none."""
        if self.log_weights is not None:
            return self.log_weights
        n = len(self.theta)
        return torch.full((n,), -math.log(n), dtype=torch.float64, device=self.theta.device)

    def ess(self, values: Tensor) -> float:
        """Return how many independent draws tell as much of the mean of ``values`` ``(n,)``, at
        most n.
        """
        chains, draws = self.shape
        if self.log_weights is not None:
            return kish_ess(self.log_weights)
        if draws == 1 or float(values.max() - values.min()) < SAME:
            return float(len(values))
        if draws < 4:
            return float(chains)
        found = float(diagnostics.ess(_array(values.unflatten(0, self.shape)), "mean"))
        return min(found, float(len(values))) if found > 0 else 1.0


def bridge(forward: Tensor, reverse: Tensor, posterior: HeldOut) -> Estimate | None:
    """Estimate the evidence from draws of both sides by the optimal bridge (Bennett 1976; Meng and
    Wong 1996).

    The log evidence is the c at which n_q mean_q s(l - c + m) = n_p mean_p s(c - l - m), where l
    are log weights log p - log q, s is the logistic function and m = log(n_p / n_q). n_p counts
    effective draws of the chains, and so does the error (Frühwirth-Schnatter 2004).

    Args:
        forward: log weights at draws of q, ``(n,)``.
        reverse: log weights at draws of the posterior.
        posterior: these draws.

    Returns:
        The estimate, or None where the two hardly overlap.
    """
    forward, reverse = forward.double(), reverse.double()
    weights, n = posterior.weights.exp(), len(forward)
    value, ours, theirs = bennett(forward, reverse, weights, math.log(len(reverse) / n))
    if value.isnan():
        return None
    # found out by the first pass: how many draws of the chains count
    m = posterior.ess(theirs)
    value, ours, theirs = bennett(forward, reverse, weights, math.log(m / n))
    mean = float((weights * theirs).sum())
    if n * float(ours.mean()) < _OVERLAP:  # of either side: this is what c makes equal
        return None
    variance = float(ours.var()) / n / float(ours.mean()) ** 2
    variance += float((weights * (theirs - mean).square()).sum()) / m / mean**2
    return float(value), math.sqrt(variance)


def ks_distance(
    a: Tensor,
    a_weights: Tensor,
    b: Tensor,
    b_weights: Tensor,
    tolerance: Tensor | float = 0.0,
) -> float:
    """Return the largest Kolmogorov-Smirnov distance of any quantity of two weighted sets of draws.

    Args:
        a: ``(n, quantities)``.
        a_weights: log weights ``(n,)``, normalised.
        b: ``(m, quantities)``.
        b_weights: log weights ``(m,)``, normalised.
        tolerance: shifts of a quantity up to this do not count.
    """
    weights = torch.cat([a_weights.exp(), -b_weights.exp()])

    def excess(b: Tensor, sign: int) -> float:
        values, order = torch.cat([a, b]).double().sort(0)  # (n + m, quantities)
        steps = sign * weights[order].cumsum(0)
        # of equal values, what all of them add up to
        steps[:-1][values[1:] == values[:-1]] = 0.0
        return float(steps.max())

    return max(excess(b - tolerance, 1), excess(b + tolerance, -1))


def rhat_and_ess(values: Tensor) -> tuple[float, float]:
    """Return the largest R-hat and the smallest bulk ESS of quantities of chains (Vehtari et al.
    2021).

    Args:
        values: ``(chain, draw, quantities)``, two chains or more; a quantity that never changes
            says nothing.

    Where chains are far more than their draws, their means tell more of the ESS than the
    autocorrelations of each.
    """
    values = values[
        ...,
        values.amax((0, 1)) - values.amin((0, 1)) > _ROUNDING * values.abs().amax((0, 1)),
    ]
    if values.shape[1] < 4 or values.shape[2] == 0:
        return math.inf, float(len(values))
    many = len(values) > 4 * values.shape[1]
    r_hat = diagnostics.rhat(_array(values))
    ess = _array(_ess_of_means(values)) if many else diagnostics.ess(_array(values), "bulk")
    return float(np.nan_to_num(r_hat, nan=math.inf).max()), float(np.nan_to_num(ess).min())


def _ess_of_means(values: Tensor) -> Tensor:
    """Return how many independent draws have a mean as sharp as that of the normal scores of
    quantities of chains.
    """
    chains, draws, _ = values.shape
    ranks = values.flatten(0, 1).argsort(0).argsort(0).double()
    scores = torch.special.ndtri((ranks + 0.625) / (len(ranks) + 0.25)).unflatten(
        0, (chains, draws)
    )
    return (chains * scores.flatten(0, 1).var(0) / scores.mean(1).var(0)).clamp(
        max=chains * draws
    )


def _array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


# ---------------------------------------- a heavy tail


@dataclass(frozen=True)
class Student:
    """A multivariate Student-t law of 5 degrees of freedom, the heavy-tailed part of a defensive
    mixture.

    Attributes:
        loc: ``(dim,)``.
        scale_tril: ``(dim, dim)``, a Cholesky factor of the scale matrix.
    """

    loc: Tensor
    scale_tril: Tensor

    df = 5

    @classmethod
    def fit(cls, theta: Tensor) -> Student:
        """Fit draws ``(n, dim)`` and widen.

        Correlations are shrunk as if dim more draws had none.
        """
        theta = theta.double()
        n, dim = theta.shape
        covariance = torch.cov(theta.T).reshape(dim, dim)
        variance = positive(covariance.diagonal())
        shrunk = (n * covariance + dim * torch.diag(variance)) / (n + dim) + torch.diag(
            1e-9 * variance
        )
        return cls(theta.mean(0), _WIDTH * torch.linalg.cholesky(shrunk))

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw ``(n, dim)``."""
        generator, like = (
            as_generator(seed, self.loc.device),
            {"dtype": self.loc.dtype, "device": self.loc.device},
        )
        normal = torch.randn(n, len(self.loc), generator=generator, **like)
        squares = (
            torch.randn(n, self.df, generator=generator, **like)
            .square()
            .mean(1, keepdim=True)
        )
        return self.loc + (normal / squares.sqrt()) @ self.scale_tril.T

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log density, ``(n, dim) -> (n,)`` in float64."""
        offset = (theta.double() - self.loc).T
        z = torch.linalg.solve_triangular(self.scale_tril, offset, upper=False)  # (dim, n)
        tail = 0.5 * (self.df + len(self.loc)) * torch.log1p(z.square().sum(0) / self.df)
        return self._log_constant - tail

    @cached_property
    def _log_constant(self) -> float:
        df, dim = self.df, len(self.loc)
        log_det = float(self.scale_tril.diagonal().log().sum())
        return (
            math.lgamma(0.5 * (df + dim))
            - math.lgamma(0.5 * df)
            - 0.5 * dim * (math.log(df) + _LOG_PI)
            - log_det
        )
