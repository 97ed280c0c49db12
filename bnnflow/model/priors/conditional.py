"""The weights given the parameters of their prior: density, draws and normal coordinates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from bnnflow.model.arrowhead import Arrowhead, Bend
from bnnflow.model.priors.hyperparameters import Hyperparameter
from bnnflow.model.priors.log_scales import Curved, Shared
from bnnflow.model.priors.marginals import (
    EPSILON,
    LOG_2PI,
    TINY,
    broadcasts,
    has_quantiles,
    parameters_of,
    unvalidated,
    unwrapped,
)
from bnnflow.model.priors.prior import Prior
from bnnflow.seeding import isolated
from bnnflow.weights import WeightSpec

__all__ = ["ConditionalWeights", "Seen"]

Seen = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""``(value, grad, temperature)`` of a log density of theta, tempered -> those in other
coordinates."""


class ConditionalWeights:
    """The weights given the parameters of their prior.

    In closed form for the priors of this module, by automatic differentiation for others.
    """

    def __init__(
        self, prior: Prior, network: WeightSpec, parameters: Sequence[Hyperparameter]
    ) -> None:
        self.prior = prior
        self.network = network
        self.hyperparameters = parameters
        self.spec = network.extend({each.name: each.shape for each in parameters})
        self.closed_scales = prior.log_scales(self.spec)
        self._check()

    def to(self, device: torch.device | str) -> ConditionalWeights:
        """Return the same on another device.

        A user's own constants are scalars, which go anywhere.
        """
        moved = copy.copy(self)
        moved.closed_scales = (
            None if self.closed_scales is None else self.closed_scales.to(device)
        )
        return moved

    def distributions(self, values: dict[str, Tensor]) -> dict[str, Distribution]:
        """Return the elementwise distribution of every tensor, given coordinates ``(..., *shape)``
        by name in theta.
        """
        given = {each.key: each.value(values[each.name]) for each in self.hyperparameters}
        with unvalidated():
            return {
                name: unwrapped(d)
                for name, d in self.prior.conditional(self.network, given).items()
            }

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return log p(weights | parameters), ``(..., weights and parameters) -> (...)`` in
        float64.
        """
        return (
            self._by_torch(theta) if self.closed_scales is None else self._normal(theta)[0]
        )

    def log_prob_and_grad(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return it with its gradient by weights and parameters; differentiable again."""
        if self.closed_scales is not None:
            return self._normal(theta)
        value, vjp, *_ = torch.func.vjp(self._by_torch, theta)
        return value, vjp(torch.ones_like(value))[0]

    def _by_torch(self, theta: Tensor) -> Tensor:
        values = self.spec.unflatten(theta)
        total = torch.zeros(theta.shape[:-1], dtype=torch.float64, device=theta.device)
        for name, distribution in self.distributions(values).items():
            with unvalidated():
                terms = distribution.log_prob(values[name])
            total = total + terms.flatten(theta.dim() - 1).sum(-1, dtype=torch.float64)
        return total

    def _normal(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density of w ~ N(0, s^2) and its gradient: -w / s^2, and w^2 / s^2 - 1 by
        log s.
        """
        assert self.closed_scales is not None
        log_scales, vjp = self.closed_scales(theta)
        inverse = (-log_scales).exp()
        z = theta[..., : self.network.dim] * inverse
        value = (
            -(0.5 * z * z + log_scales).sum(-1, dtype=torch.float64)
            - 0.5 * self.network.dim * LOG_2PI
        )
        return value, torch.cat([-z * inverse, vjp(z * z - 1)], -1)

    def sample(self, coordinates: Tensor, generator: torch.Generator) -> Tensor:
        """Draw weights ``(n, network dim)`` given the parameters' coordinates
        ``(n, parameters)``.
        """
        n = len(coordinates)
        values = self.spec.unflatten(
            torch.cat([coordinates.new_zeros(n, self.network.dim), coordinates], -1)
        )
        distributions = self.distributions(values)
        with isolated(generator):
            drawn = {
                name: distributions[name]
                .expand(torch.Size((n, *self.network.shapes[name])))
                .sample()
                .to(coordinates)
                for name in self.network.names
            }
        return self.network.flatten(drawn)

    def families(self) -> list[Distribution]:
        """Return the distribution of every tensor at some value of the parameters."""
        values = self.spec.unflatten(torch.zeros(self.spec.dim, dtype=torch.float64))
        return list(self.distributions(values).values())

    def to_normal(self, theta: Tensor) -> Tensor:
        """Map weights and parameters to normal coordinates of the weights,
        ``(..., network dim)``.
        """
        if self.closed_scales is not None:
            return theta[..., : self.network.dim] * (-self.closed_scales(theta)[0]).exp()
        values = self.spec.unflatten(theta)
        with unvalidated():
            parts = {
                name: torch.special.ndtri(
                    d.cdf(values[name].double()).clamp(TINY, 1 - EPSILON)
                )
                for name, d in self.distributions(
                    {n: v.double() for n, v in values.items()}
                ).items()
            }
        return self.network.flatten(parts).to(theta.dtype)

    def from_normal(self, z: Tensor, parameters: Tensor) -> Tensor:
        """Map normal coordinates ``(..., network dim)`` to weights, given the parameters'
        coordinates in theta.
        """
        theta = torch.cat([z, parameters], -1)
        if self.closed_scales is not None:
            return z * self.closed_scales(theta)[0].exp()
        values = {
            name: value.double() for name, value in self.spec.unflatten(theta).items()
        }
        with unvalidated():
            parts = {
                name: d.icdf(torch.special.ndtr(values[name]).clamp(TINY, 1 - EPSILON))
                for name, d in self.distributions(values).items()
            }
        return self.network.flatten(parts).to(theta.dtype)

    # ---------------------------------------- non-centred coordinates: those of `to_normal`
    # for the weights, and theta for all that follows them

    @property
    def has_quantiles(self) -> bool:
        """Whether all weights have normal coordinates."""
        return all(map(has_quantiles, self.families()))

    def non_centred(self, theta: Tensor) -> Tensor:
        """Map theta ``(..., dim)`` to non-centred coordinates."""
        z = self.to_normal(theta[..., : self.spec.dim])
        return torch.cat([z, theta[..., self.network.dim :]], -1)

    def centred(self, z: Tensor) -> tuple[Tensor, Seen]:
        """Return theta at non-centred coordinates ``(n, dim)``, and how its density is seen
        there.
        """
        start, stop = self.network.dim, self.spec.dim
        normal = z[..., :start]
        if self.closed_scales is None:
            theta, vjp = torch.func.vjp(self._centred_by_torch, z)  # type: ignore[misc]
            return theta, partial(self._seen_by_torch, z, theta, vjp)
        log_scales, of_parameters = self.closed_scales(z[..., :stop])
        scales = log_scales.exp()

        def seen(value: Tensor, grad: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
            by_normal = grad[..., :start] * scales
            by_scales = of_parameters(by_normal * normal + 1 / temperature)
            own = grad[..., start:stop] + by_scales
            volume = log_scales.sum(-1, dtype=torch.float64) / temperature
            return value + volume, torch.cat([by_normal, own, grad[..., stop:]], -1)

        return torch.cat([normal * scales, z[..., start:]], -1), seen

    def _centred_by_torch(self, z: Tensor) -> Tensor:
        start, stop = self.network.dim, self.spec.dim
        weights = self.from_normal(z[..., :start], z[..., start:stop])
        return torch.cat([weights, z[..., start:]], -1)

    def _seen_by_torch(
        self,
        z: Tensor,
        theta: Tensor,
        vjp: Callable[[Tensor], tuple[Tensor]],
        value: Tensor,
        grad: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        # log |d theta / d z| = log N(z) - log p(weights | parameters)
        given, by_given = self.log_prob_and_grad(theta[..., : self.spec.dim])
        beyond = torch.zeros_like(z[..., self.spec.dim :])
        left = grad - torch.cat([by_given, beyond], -1) / temperature
        normal = torch.cat(
            [z[..., : self.network.dim], torch.zeros_like(z[..., self.network.dim :])], -1
        )
        log_normal = -0.5 * normal.square().sum(-1, dtype=torch.float64)
        value = (
            value + (log_normal - 0.5 * self.network.dim * LOG_2PI - given) / temperature
        )
        return value, vjp(left)[0] - normal / temperature

    # ---------------------------------------- derivatives
    # What follows takes theta ``(batch, dim)`` of a whole prior, and both derivatives of the
    # parameters' coordinates. For the priors of this module alone: weights are z times the
    # exponential of a log scale.

    @property
    def shared(self) -> Shared | None:
        """The scales of the weights, as far as they are known to be shared."""
        return None if self.closed_scales is None else self.closed_scales.shared

    @property
    def closed(self) -> bool:
        """Whether the derivatives of the weights are known."""
        return self.closed_scales is not None

    def vjp(self, theta: Tensor, vectors: Tensor, first: Tensor) -> Tensor:
        """Turn gradients by theta, of more leading axes if need be, into those by z."""
        assert self.closed_scales is not None
        start, stop = self.network.dim, self.spec.dim
        log_scales, of_parameters = self.closed_scales(theta[..., :stop])
        by_weights = vectors[..., :start]
        own = vectors[..., start:stop] + of_parameters(by_weights * theta[..., :start])
        return (
            torch.cat([by_weights * log_scales.exp(), own, vectors[..., stop:]], -1) * first
        )

    def slope(self, theta: Tensor, first: Tensor) -> Arrowhead:
        """Return d theta / d z."""
        weights, curved, _ = self._curved(theta)
        columns = weights.unsqueeze(-1) * curved.slope * self._own(first).unsqueeze(-2)
        assert self.closed_scales is not None
        return Arrowhead(
            self._joined(curved.log_scales.exp(), first), columns, self.closed_scales.own
        )

    def turn(self, theta: Tensor, v: Tensor, first: Tensor, second: Tensor) -> Arrowhead:
        """Return the derivative by z of the slope times v, v fixed."""
        weights, curved, own = self._curved(theta)
        scales, step = curved.log_scales.exp(), self._own(v).unsqueeze(-1)
        slope, along = (
            part * self._own(first).unsqueeze(-2) for part in (curved.slope, curved.along)
        )
        moved = (slope @ step).squeeze(-1)  # log scales along v
        columns = slope * (v[:, : own.start] * scales + weights * moved).unsqueeze(-1)
        columns = columns + along * (
            weights * curved.bend * (along @ step).squeeze(-1)
        ).unsqueeze(-1)
        columns = columns + weights.unsqueeze(-1) * curved.slope * (
            self._own(second) * self._own(v)
        ).unsqueeze(-2)
        return Arrowhead(self._joined(scales * moved, second * v), columns)

    def bend(self, theta: Tensor, grad: Tensor, first: Tensor, second: Tensor) -> Bend:
        """Return the derivative by z of the gradient pulled back to z, ``grad`` fixed."""
        weights, curved, own = self._curved(theta)
        by_weights = grad[:, : own.start]
        slope, along = (
            part * self._own(first).unsqueeze(-2) for part in (curved.slope, curved.along)
        )
        by_scales = weights * by_weights
        block = (slope * by_scales.unsqueeze(-1)).mT @ slope
        block = block + (along * (by_scales * curved.bend).unsqueeze(-1)).mT @ along
        by_own = self._own(grad) + (by_scales.unsqueeze(-2) @ curved.slope).squeeze(-2)
        block = block + torch.diag_embed(by_own * self._own(second))
        columns = slope * (by_weights * curved.log_scales.exp()).unsqueeze(-1)
        diagonal = torch.cat(
            [torch.zeros_like(theta[:, : own.stop]), (second * grad)[:, own.stop :]], 1
        )
        return Bend(Arrowhead(diagonal, columns), block)

    def _curved(self, theta: Tensor) -> tuple[Tensor, Curved, slice]:
        """Return the weights, their log scales, and where in theta the parameters are."""
        assert self.closed_scales is not None
        start, stop = self.network.dim, self.spec.dim
        return (
            theta[:, :start],
            self.closed_scales.curved(theta[:, :stop]),
            slice(start, stop),
        )

    def _own(self, values: Tensor) -> Tensor:
        return values[:, self.network.dim : self.spec.dim]

    def _joined(self, of_weights: Tensor, values: Tensor) -> Tensor:
        return torch.cat([of_weights, values[:, self.network.dim :]], 1)

    def describe(self) -> list[dict[str, Any]]:
        """Say what the distributions are at two settings of the parameters."""
        count = self.spec.dim - self.network.dim
        described = []
        for reach in (0.3, 0.7):
            coordinates = torch.cat(
                [torch.zeros(self.network.dim), reach * torch.arange(count).cos()]
            ).double()
            for name, d in self.distributions(self.spec.unflatten(coordinates)).items():
                parameters = {k: v.double().tolist() for k, v in parameters_of(d).items()}
                described.append(
                    {"name": name, "family": type(d).__name__, "parameters": parameters}
                )
        return described

    def _check(self) -> None:
        """Raise ``ValueError`` unless the prior says what a prior with parameters must say."""
        values = self.spec.unflatten(torch.zeros(2, self.spec.dim, dtype=torch.float64))
        distributions = self.distributions(values)
        if set(distributions) != set(self.network.names):
            odd = sorted(set(distributions) ^ set(self.network.names))
            raise ValueError(
                "the prior's conditional must name exactly the network's tensors; "
                f"{odd} are not both"
            )
        for name, d in distributions.items():
            shape = (2, *self.network.shapes[name])
            if d.event_shape or not isinstance(d.support, type(constraints.real)):
                raise ValueError(
                    f"prior of {name!r}: {type(d).__name__} is not elementwise on the real line"
                )
            if not broadcasts(d.batch_shape, shape):
                raise ValueError(
                    f"prior of {name!r} given two values of the parameters has shape "
                    f"{tuple(d.batch_shape)}, which does not broadcast to {shape}; the parameters "
                    "have leading axes"
                )
