"""The posterior in the coordinates in which its prior is N(0, I): where every flow lives."""

from __future__ import annotations

import torch
from torch import Tensor

from bnnflow.model import BayesianModel

__all__ = ["Context"]


class Context:
    """What a likelihood-informed velocity may ask of a model, in standard normal coordinates z of the prior.

    With theta = from_normal(z), u(z) = log posterior(z) - log N(z; 0, I) up to a constant: the log likelihood at
    temperature 1, since the prior's density and the Jacobian of the coordinates cancel.

    Args:
        model: the posterior.

    Raises:
        ValueError: if the prior has no such coordinates.
    """

    def __init__(self, model: BayesianModel) -> None:
        model.flat_prior.require_coordinates()
        self.model = model
        self.dim = model.dim
        self._prior = model.flat_prior
        self._inverse_temperature = 1 / model.temperature

    def grad(self, z: Tensor) -> Tensor:
        """Return the gradient of u, ``(batch, dim) -> (batch, dim)``; differentiable again."""
        theta = self._prior.from_normal(z)
        grad = self.model.log_likelihood_grad(theta) * self._inverse_temperature
        if self._inverse_temperature != 1:
            grad = grad + (self._inverse_temperature - 1) * self._prior.log_prob_and_grad(theta)[1]
        return grad * self._prior.derivative(z)

    def gauss_newton(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of u and a factor A, ``(batch, rows, dim)``, of the likelihood's part of -u'' ~ A^T A."""
        theta = self._prior.from_normal(z)
        derivative = self._prior.derivative(z)
        grad, factor = self.model.gauss_newton(theta)
        grad = grad * self._inverse_temperature
        if self._inverse_temperature != 1:
            grad = grad + (self._inverse_temperature - 1) * self._prior.log_prob_and_grad(theta)[1]
        return grad * derivative, factor * (derivative.unsqueeze(-2) * self._inverse_temperature**0.5)

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Context:
        """Return the same context elsewhere."""
        return Context(self.model.to(device, dtype))
