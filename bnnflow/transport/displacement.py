"""Where the data pull an unfinished sample: approximations of the drive E[grad u(x1) | x_t].

With x0 ~ N(0, I), x_t = a x0 + b x1 and q = a^2 + b^2, the posterior of x1 given x_t is
N(x1; mu, s^2 I) exp(u(x1)) with mu = b x_t / q and s^2 = a^2 / q. Its mean is mu + s^2 w with
w = E[grad u(x1) | x_t] (Stein's identity). Both classes follow the mode y = mu + s^2 w instead, by iterating on w
itself, which stays finite where s vanishes. They are functions ``(context, mu, s2) -> (w, grad u(y))``, differentiable
through every step: a density needs that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bnnflow.transport.coordinates import Context

__all__ = ["Displacement", "Drive", "GaussNewton", "GradientSteps", "Task"]


class Drive(NamedTuple):
    """The pull of the data at one point of the path; ``(batch, dim)`` each."""

    w: Tensor  # displacement over s^2
    grad: Tensor  # gradient of u at the displaced point


class Displacement(Protocol):
    """``(context, mu (batch, dim), s2 (batch, 1)) -> Drive``."""

    def __call__(self, context: Context, mu: Tensor, s2: Tensor) -> Drive:
        """Return the drive."""
        ...


class Task(Protocol):
    """Anything with a gradient ``(batch, dim) -> (batch, dim)``, differentiable again."""

    def grad(self, x: Tensor) -> Tensor:
        """Return the gradient of u."""
        ...


_PROBE = 0.05  # length of the finite difference, in standard deviations of the source: float32 needs it this long


@dataclass(frozen=True)
class GradientSteps:
    """Climb u(y) - |y - mu|^2 / (2 s^2) by gradient steps scaled to the curvature along them.

    Each step is s^2 / (1 + s^2 lambda) times the residual, with lambda the positive part of the Rayleigh quotient of
    -u'' along it, by a finite difference. Costs 2 ``steps`` + 1 gradients.

    Args:
        steps: number of steps.
        max_norm: bound on the length of one step, in standard deviations of the source.
    """

    steps: int = 3
    max_norm: float = 2.0

    def __call__(self, context: Task, mu: Tensor, s2: Tensor) -> Drive:
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
    """Solve the same problem with the likelihood linearised, (I + s^2 H) w = grad + s^2 H w_previous, H ~ -u''.

    H is the generalised Gauss-Newton matrix. Exact where the outputs are linear in the weights and the likelihood
    Gaussian. A dense step costs a Jacobian and a Cholesky factorisation of the smaller of dim and the number of rows
    times outputs; a matrix-free one about two gradients for each iteration of conjugate gradients, whatever the size.

    Args:
        steps: number of steps.
        max_norm: bound on the change of y in one step, in standard deviations of the source.
        iterations: of conjugate gradients in a step, starting from the gradient; None for a dense solution.
    """

    steps: int = 1
    max_norm: float = 3.0
    iterations: int | None = None

    def __call__(self, context: Context, mu: Tensor, s2: Tensor) -> Drive:
        """Return the drive; ``grad`` is the one before the last step, which costs nothing more."""
        w = torch.zeros_like(mu)
        grad = w
        for step in range(self.steps):
            if self.iterations is None:
                grad, factor = context.gauss_newton(mu + s2 * w)
                curvature = _Dense(factor, context.source.excess)
            else:
                grad, product = context.gauss_newton_product(mu + s2 * w)
                curvature = _MatrixFree(product, self.iterations)
            target = grad if step == 0 else grad + s2 * curvature.times(w)
            change = curvature.solve(s2, target, w) - w
            length2 = (s2 * s2) * (change * change).sum(-1, keepdim=True)
            w = w + change / (1 + length2 / self.max_norm**2).sqrt()
        return Drive(w, grad)


def solve_linearised(context: Context, mu: Tensor, s2: Tensor, target: Tensor) -> Tensor:
    """Return (I + s^2 H)^-1 target, ``(batch, dim)``, with the Gauss-Newton matrix H at ``mu``."""
    _, factor = context.gauss_newton(mu)
    return _Dense(factor, context.source.excess).solve(s2, target, mu)


@dataclass(frozen=True)
class _Dense:
    """H = A^T A + E, with E None, a number or ``(dim, dim)``."""

    factor: Tensor  # A, (batch, rows, dim)
    excess: Tensor | None

    def times(self, v: Tensor) -> Tensor:
        product = _times(self.factor.mT, _times(self.factor, v))
        if self.excess is None:
            return product
        return product + (self.excess * v if self.excess.dim() == 0 else v @ self.excess)

    def solve(self, s2: Tensor, target: Tensor, _: Tensor) -> Tensor:
        """Return (I + s^2 H)^-1 target, by the smaller of the two equivalent systems."""
        factor, excess = self.factor, self.excess
        rows, dim = factor.shape[-2:]
        variance = s2.unsqueeze(-1)
        dense = excess is not None and excess.dim() > 0
        if excess is not None and not dense:  # I + s^2 E is a number
            scale = 1 + s2 * excess
            target, variance = target / scale, variance / scale.unsqueeze(-1)
        eye = torch.eye(dim if dense else min(rows, dim), dtype=factor.dtype, device=factor.device)
        if dense or dim <= rows:
            system = eye + variance * (factor.mT @ factor + (excess if dense else 0.0))  # type: ignore[operator]
            return torch.cholesky_solve(target.unsqueeze(-1), torch.linalg.cholesky(system)).squeeze(-1)
        system = eye + variance * (factor @ factor.mT)
        inner = torch.cholesky_solve(factor @ target.unsqueeze(-1), torch.linalg.cholesky(system)).squeeze(-1)
        return target - variance.squeeze(-1) * _times(factor.mT, inner)


@dataclass(frozen=True)
class _MatrixFree:
    """H by its products alone."""

    times: Callable[[Tensor], Tensor]
    iterations: int

    def solve(self, s2: Tensor, target: Tensor, start: Tensor) -> Tensor:
        """Approximate (I + s^2 H)^-1 target by conjugate gradients; differentiable through every iteration."""
        solution = start
        residual = target - start - s2 * self.times(start)
        direction, size = residual, (residual * residual).sum(-1, keepdim=True)
        for _ in range(self.iterations):
            image = direction + s2 * self.times(direction)
            step = size / ((direction * image).sum(-1, keepdim=True) + 1e-30)
            solution = solution + step * direction
            residual = residual - step * image
            smaller = (residual * residual).sum(-1, keepdim=True)
            direction, size = residual + smaller / (size + 1e-30) * direction, smaller
        return solution


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)
