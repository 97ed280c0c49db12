"""A model in the coordinates of a transport whose push-forward is its prior."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from bnnflow.compiled import is_tracked
from bnnflow.model.fused import FusedDensity
from bnnflow.model.hessian import ChainHessian
from bnnflow.model.log_joint import LogJoint
from bnnflow.model.priors import FlatPrior
from bnnflow.types import LogDensityAndGrad
from bnnflow.weights import Symmetries, WeightSpec

__all__ = ["HasPushforward", "Transport", "TransportedLogJoint"]

_ROWS = 512  # points that travel together


class HasPushforward(Protocol):
    """A flow, or what else makes weights of standard normal points."""

    def pushforward(self) -> Transport:
        """Return the map, or raise ``ValueError`` if it is none of each point alone."""
        ...


class Transport(Protocol):
    """A map of standard normal points to weights."""

    @property
    def spec(self) -> WeightSpec:
        """The meaning of the weights."""
        ...

    @property
    def symmetries(self) -> Symmetries:
        """The symmetries that it is equivariant to: moved points land on equally moved weights."""
        ...

    @property
    def identity(self) -> Any:
        """What tells it from others; see `bnnflow.identity`."""
        ...

    def forward(self, z: Tensor) -> Tensor:
        """Carry ``(n, dim)``; differentiable."""
        ...

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Return the same map on another device or in another floating-point type."""
        ...


class TransportedLogJoint(LogJoint):
    """log N(z; 0, I) + log p(y | net(x; theta(z))): what a model says of latent points.

    Args:
        inner: the density over weights, whose prior does not count.
        transport: theta(z).
        prior: N(0, I) along z.
    """

    def __init__(self, inner: LogJoint, transport: Transport, prior: FlatPrior) -> None:
        super().__init__(
            inner.spec,
            inner.network,
            inner.likelihood,
            prior,
            inner.x,
            inner.y,
            inner.temperature,
            inner.n_outputs,
        )
        self.inner, self.transport = inner, transport

    @property
    def over_weights(self) -> LogJoint:
        """What says the same of networks, but for its prior."""
        return self.inner

    # ---------------------------------------- what the composition has not

    @cached_property
    def fused(self) -> FusedDensity | None:
        """None: of the composition there is no compiled density."""
        return None

    @cached_property
    def hessian(self) -> ChainHessian | None:
        """None: no closed form of the second derivatives is known."""
        return None

    def of_rows(self, x: Tensor, y: Tensor) -> LogJoint:
        """Return the same of other data."""
        return TransportedLogJoint(self.inner.of_rows(x, y), self.transport, self.prior)

    # ---------------------------------------- values

    def carried(self, z: Tensor) -> Tensor:
        """Return the weights of latent points, ``(..., dim) -> (..., dim)``."""
        z = self.checked(z)
        flat = z.reshape(-1, self.dim)
        if is_tracked(z):
            return self.transport.forward(flat).reshape(z.shape)
        with torch.no_grad():
            parts = [self.transport.forward(rows) for rows in flat.split(_ROWS)]
        return torch.cat(parts).reshape(z.shape)

    def parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """Return the learned parameters of the likelihood at latent points."""
        if self.n_parameters == 0:
            return {}
        return self.inner.parameters(self.carried(theta))

    def outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        """Evaluate the networks of latent points, ``(..., dim) -> (..., n, out)``."""
        return self.inner.outputs(self.carried(theta), x)

    def log_likelihood(self, theta: Tensor) -> Tensor:
        """Return the log likelihood summed over the data, ``(..., dim) -> (...)``."""
        return self.inner.log_likelihood(self.carried(theta))

    def pointwise_log_likelihood(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the log likelihood of every row, ``(..., dim) -> (..., n)``."""
        return self.inner.pointwise_log_likelihood(self.carried(theta), x, y)

    # ---------------------------------------- gradients

    def log_likelihood_and_grad(
        self, theta: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what `BayesianModel.log_likelihood_and_grad` does: the gradient by the weights,
        compiled where that is so, is pulled back through the map.
        """
        return self.pulled_back(
            theta, lambda weights: self.inner.log_likelihood_and_grad(weights, rows)
        )

    def pulled_back(self, theta: Tensor, of: LogDensityAndGrad) -> tuple[Tensor, Tensor]:
        """Return a function of the weights and its gradient by latent points,
        ``(..., dim) -> (...), (..., dim)``, given the function and its gradient by the weights.
        """
        theta = self.checked(theta)
        tracked = is_tracked(theta)
        flat = theta.reshape(-1, self.dim)
        with torch.enable_grad():
            z = flat if tracked else flat.detach().requires_grad_()
            weights = self.transport.forward(z)
            at = weights if tracked else weights.detach()
            value, grad = of(at.reshape(theta.shape))
            (pulled,) = torch.autograd.grad(
                weights, z, grad.reshape(weights.shape), create_graph=tracked
            )
        return value, pulled.reshape(theta.shape)

    def log_likelihood_grad(self, theta: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the gradient of the log likelihood alone, ``(..., dim) -> (..., dim)``."""
        return self.log_likelihood_and_grad(theta, rows)[1]
