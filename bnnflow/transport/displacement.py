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

from bnnflow.model.fused import plain
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
    -u'' along it, by a finite difference: 2 ``steps`` + 1 gradients. The nearer to the top, the less is left for a
    network to learn. With ``secant`` the quotient is that along the step before (Barzilai and Borwein 1988), which
    costs nothing: ``steps`` + 2 gradients, each worth about two of the others from a dozen steps on. But the way there
    is erratic, and a field made of it too rough for a density.

    Args:
        steps: number of steps.
        max_norm: bound on the length of one step, in standard deviations of the source.
        secant: take the curvature from the step before; for draws without densities.
    """

    steps: int = 8
    max_norm: float = 2.0
    secant: bool = False

    def __call__(self, context: Task, mu: Tensor, s2: Tensor) -> Drive:
        """Return the drive."""
        w = torch.zeros_like(mu)
        grad = context.grad(mu)
        curvature = w
        for step in range(self.steps):
            residual = grad - w
            norm2 = _square(residual)
            if step == 0 or not self.secant:
                direction = residual / norm2.sqrt()
                change = (grad - context.grad(mu + s2 * w + _PROBE * direction)) * direction
                curvature = s2 * change.sum(-1, keepdim=True) / _PROBE  # s^2 lambda
            # Smooth stand-ins for max(0, curvature) and for min(step, bound): a kink would spoil the solver's order.
            damping = 1 + 0.5 * (curvature + (curvature * curvature + 0.01 * s2 * s2 + 1e-12).sqrt())
            change = residual / (damping * damping + s2 * s2 * norm2 / self.max_norm**2).sqrt()
            w = w + change
            before, grad = grad, context.grad(mu + s2 * w)
            if self.secant:
                curvature = ((before - grad) * change).sum(-1, keepdim=True) / _square(change)
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
                linear = linearised(context, mu if step == 0 else mu + s2 * w, s2)
            else:
                linear = _MatrixFree(*context.gauss_newton_product(mu + s2 * w), s2, self.iterations)
            grad = linear.grad
            target = grad if step == 0 else grad + s2 * linear.times(w)
            change = linear.solve(target, w) - w
            length2 = (s2 * s2) * (change * change).sum(-1, keepdim=True)
            w = w + change / (1 + length2 / self.max_norm**2).sqrt()
        return Drive(w, grad)


class Linearised:
    """The likelihood linearised at a point: its gradient, and H = A^T A + E with E None, a number or ``(dim, dim)``.

    Args:
        context: the posterior.
        x: the point, ``(batch, dim)``.
        s2: variances, ``(batch, 1)``.
    """

    def __init__(self, context: Context, x: Tensor, s2: Tensor) -> None:
        self.grad, self._factor = context.gauss_newton(x)
        factor, self._excess = self._factor, context.source.excess
        self._scale: Tensor | None = None
        excess, rows, dim = self._excess, *self._factor.shape[-2:]
        dense = excess is not None and excess.dim() > 0
        if excess is not None and not dense:  # I + s^2 E is a number
            self._scale = 1 + s2 * excess
            s2 = s2 / self._scale
        variance = s2.unsqueeze(-1)
        eye = torch.eye(dim if dense else min(rows, dim), dtype=factor.dtype, device=factor.device)
        self._variance, self._by_weights = variance, dense or dim <= rows
        gram = factor.mT @ factor if self._by_weights else factor @ factor.mT
        system = eye + variance * (gram + excess if dense else gram)  # type: ignore[operator]
        self._root = torch.linalg.cholesky(system)

    def times(self, v: Tensor) -> Tensor:
        """Return H v, ``(batch, dim)``."""
        product = _times(self._factor.mT, _times(self._factor, v))
        excess = self._excess
        if excess is None:
            return product
        return product + (excess * v if excess.dim() == 0 else v @ excess)

    def solve(self, target: Tensor, start: Tensor | None = None) -> Tensor:
        """Return (I + s^2 H)^-1 target, by the smaller of the two equivalent systems; ``start`` plays no part."""
        if self._scale is not None:
            target = target / self._scale
        if self._by_weights:
            return torch.cholesky_solve(target.unsqueeze(-1), self._root).squeeze(-1)
        inner = torch.cholesky_solve(self._factor @ target.unsqueeze(-1), self._root).squeeze(-1)
        return target - self._variance.squeeze(-1) * _times(self._factor.mT, inner)


def linearised(context: Context, x: Tensor, s2: Tensor) -> Linearised:
    """Return the linearisation at a point; that of the last one is kept, as target and field of a step share it."""
    if not plain(x, s2):
        return Linearised(context, x, s2)
    kept = context.kept
    if kept is None or kept[0].shape != x.shape or not (torch.equal(kept[0], x) and torch.equal(kept[1], s2)):
        context.kept = kept = (x, s2, Linearised(context, x, s2))
    return kept[2]


@dataclass(frozen=True)
class _MatrixFree:
    """H by its products alone."""

    grad: Tensor
    times: Callable[[Tensor], Tensor]
    s2: Tensor
    iterations: int

    def solve(self, target: Tensor, start: Tensor) -> Tensor:
        """Approximate (I + s^2 H)^-1 target by conjugate gradients; differentiable through every iteration."""
        s2, solution = self.s2, start
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


def _square(v: Tensor) -> Tensor:
    return (v * v).sum(-1, keepdim=True) + 1e-12


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)
