"""Where the data pull an unfinished sample: approximations of the drive E[grad u(x1) | x_t].

With x0 ~ N(0, I), x_t = (1 - t) x0 + t x1 and q = t^2 + (1 - t)^2, the posterior of x1 given x_t is
N(x1; mu, s^2 I) exp(u(x1)) with mu = t x_t / q and s^2 = (1 - t)^2 / q. Its mean is mu + s^2 w with
w = E[grad u(x1) | x_t] (Stein's identity). Both classes follow the mode y = mu + s^2 w instead, by iterating on w
itself, which stays finite where s vanishes. They are functions ``(context, mu, s2) -> (w, grad u(y))``, differentiable
through every step: a density needs that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bnnflow.transport.coordinates import Context

__all__ = ["Displacement", "Drive", "GaussNewton", "GradientSteps"]


class Drive(NamedTuple):
    """The pull of the data at one point of the path; ``(batch, dim)`` each."""

    w: Tensor  # displacement over s^2
    grad: Tensor  # gradient of u at the displaced point


class Displacement(Protocol):
    """``(context, mu (batch, dim), s2 (batch, 1)) -> Drive``."""

    def __call__(self, context: Context, mu: Tensor, s2: Tensor) -> Drive:
        """Return the drive."""
        ...


_PROBE = 0.05  # length of the finite difference, in prior standard deviations: float32 needs it this long


@dataclass(frozen=True)
class GradientSteps:
    """Climb u(y) - |y - mu|^2 / (2 s^2) by gradient steps scaled to the curvature along them.

    Each step is s^2 / (1 + s^2 lambda) times the residual, with lambda the positive part of the Rayleigh quotient of
    -u'' along it, by a finite difference. Costs 2 ``steps`` + 1 gradients.

    Args:
        steps: number of steps.
        max_norm: bound on the length of one step, in prior standard deviations.
    """

    steps: int = 3
    max_norm: float = 2.0

    def __call__(self, context: Context, mu: Tensor, s2: Tensor) -> Drive:
        """Return the drive."""
        w = torch.zeros_like(mu)
        grad = context.grad(mu)
        for _ in range(self.steps):
            y = mu + s2 * w
            residual = grad - w
            norm = ((residual * residual).sum(-1, keepdim=True) + 1e-12).sqrt()
            direction = residual / norm
            change = (grad - context.grad(y + _PROBE * direction)) * direction
            curvature = s2 * change.sum(-1, keepdim=True) / _PROBE
            # Smooth stand-ins for max(0, curvature) and for min(step, bound): a kink would spoil the solver's order.
            damping = 1 + 0.5 * (curvature + (curvature * curvature + 0.01 * s2 * s2 + 1e-12).sqrt())
            step = 1 / (damping * damping + (s2 * norm / self.max_norm) ** 2).sqrt()
            w = w + step * residual
            grad = context.grad(mu + s2 * w)
        return Drive(w, grad)


@dataclass(frozen=True)
class GaussNewton:
    """Solve the same problem with the likelihood linearised, (I + s^2 A^T A) w = grad + s^2 A^T A w_previous.

    Exact where the outputs are linear in the weights and the likelihood Gaussian. Each step costs a Jacobian and a
    Cholesky factorisation of the smaller of dim and the number of rows times outputs.

    Args:
        steps: number of steps.
        max_norm: bound on the change of y in one step, in prior standard deviations.
    """

    steps: int = 1
    max_norm: float = 3.0

    def __call__(self, context: Context, mu: Tensor, s2: Tensor) -> Drive:
        """Return the drive; ``grad`` is the one before the last step, which costs nothing more."""
        w = torch.zeros_like(mu)
        grad = w
        for step in range(self.steps):
            grad, factor = context.gauss_newton(mu + s2 * w)
            target = grad
            if step > 0:
                projected = (factor @ w.unsqueeze(-1)).squeeze(-1)
                target = grad + s2 * (factor.mT @ projected.unsqueeze(-1)).squeeze(-1)
            change = _solve(factor, s2, target) - w
            length2 = (s2 * s2) * (change * change).sum(-1, keepdim=True)
            w = w + change / (1 + length2 / self.max_norm**2).sqrt()
        return Drive(w, grad)


def _solve(factor: Tensor, s2: Tensor, target: Tensor) -> Tensor:
    """Return (I + s^2 A^T A)^-1 target, by the smaller of the two equivalent systems."""
    rows, dim = factor.shape[-2:]
    eye = torch.eye(min(rows, dim), dtype=factor.dtype, device=factor.device)
    right = target.unsqueeze(-1)
    variance = s2.unsqueeze(-1)
    if dim <= rows:
        system = eye + variance * (factor.mT @ factor)
        return torch.cholesky_solve(right, torch.linalg.cholesky(system)).squeeze(-1)
    system = eye + variance * (factor @ factor.mT)
    inner = torch.cholesky_solve(factor @ right, torch.linalg.cholesky(system))
    return target - s2 * (factor.mT @ inner).squeeze(-1)
