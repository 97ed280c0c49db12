"""The posterior in the coordinates in which the source is N(0, I): where every flow lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnnflow.model import BayesianModel
from bnnflow.transport.source import Source

__all__ = ["Context"]


class Context:
    """What a likelihood-informed velocity may ask of a model, in the coordinates x of a source.

    With theta = from_normal(x), u(x) = log posterior(x) - log N(x; 0, I) up to a constant. From the prior, at
    temperature 1, that is the log likelihood, since the prior's density and the Jacobian of the coordinates cancel.

    Args:
        model: the posterior.
        source: the law at t = 0; the prior if None.
        rows: use only these rows of the data, int64 ``(m,)``, with their likelihood scaled to that of all.

    Raises:
        ValueError: if the prior has no such coordinates.
    """

    def __init__(self, model: BayesianModel, source: Source | None = None, rows: Tensor | None = None) -> None:
        self.model, self.rows = model, rows
        self.source = Source(model.flat_prior) if source is None else source
        self.dim = model.dim
        self.kept: tuple[Tensor, Tensor, Any] | None = None  # where it was linearised last, see `linearised`
        self._prior = model.flat_prior
        self._inverse_temperature = 1 / model.temperature

    def grad(self, x: Tensor) -> Tensor:
        """Return the gradient of u, ``(batch, dim) -> (batch, dim)``; differentiable again."""
        z = self.source.to_prior(x)
        theta = self._prior.from_normal(z)
        return self._finish(x, z, theta, self.model.log_likelihood_grad(theta, self.rows))

    def gauss_newton(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of u and a factor A, ``(batch, rows, dim)``: -u'' ~ A^T A + ``source.excess``."""
        z = self.source.to_prior(x)
        theta = self._prior.from_normal(z)
        grad, factor = self.model.gauss_newton(theta, self.rows)
        factor = self._prior.pull(z.unsqueeze(-2), factor) * self._inverse_temperature**0.5
        return self._finish(x, z, theta, grad), self.source.pull(factor)

    def gauss_newton_product(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the gradient of u and the function v -> H v, ``(batch, dim)``, of the same matrix, never formed."""
        z = self.source.to_prior(x)
        theta = self._prior.from_normal(z)
        grad, product = self.model.gauss_newton_product(theta, self.rows)
        source, prior = self.source, self._prior

        def times(v: Tensor) -> Tensor:
            pulled = source.pull(v)
            by_theta = product(prior.push(z, pulled)) * self._inverse_temperature
            image = source.pull(prior.pull(z, by_theta))
            return image if source.is_prior else image + source.pull(pulled) - v  # H + root^2 - I

        return self._finish(x, z, theta, grad), times

    def _finish(self, x: Tensor, z: Tensor, theta: Tensor, grad: Tensor) -> Tensor:
        """Turn the gradient of the log likelihood by theta into that of u by x."""
        grad = grad * self._inverse_temperature
        if self._inverse_temperature != 1:
            grad = grad + (self._inverse_temperature - 1) * self._prior.log_prob_and_grad(theta)[1]
        grad = self._prior.pull(z, grad)
        return grad if self.source.is_prior else self.source.pull(grad - z) + x

    def batch(self, size: int, generator: torch.Generator) -> Context:
        """Return the context with a random part of the data in place of all of them."""
        return self.on_rows(self.model.random_rows((), generator, size))

    def on_rows(self, rows: Tensor) -> Context:
        """Return the context with these rows of the data, ``(m,)`` or ``(batch, m)`` with a choice for each point."""
        return Context(self.model, self.source, rows)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Context:
        """Return the same context elsewhere."""
        rows = None if self.rows is None else self.rows.to(device)
        return Context(self.model.to(device, dtype), self.source.to(device, dtype), rows)
