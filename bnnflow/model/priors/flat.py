"""The density that a model makes of its priors, along the flat vector ``theta``.

First the weights, then the parameters of the prior, then those of the likelihood. The coordinate of
a positive parameter is its logarithm (with the Jacobian). Also the map to standard normal
coordinates, in which the transport works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor

from bnnflow.forward_mode import jvp
from bnnflow.model.arrowhead import Arrowhead, Bend
from bnnflow.model.priors.conditional import ConditionalWeights
from bnnflow.model.priors.hyperparameters import Hyperparameter
from bnnflow.model.priors.marginals import (
    LOG_2PI,
    Marginal,
    elementwise,
    has_quantiles,
    merged,
    parameters_of,
    rebuild,
)
from bnnflow.model.priors.prior import Prior
from bnnflow.seeding import as_generator, isolated
from bnnflow.types import Seed
from bnnflow.weights import WeightSpec

__all__ = ["FlatPrior", "Placed"]


class FlatPrior:
    """The prior density along the flat weight vector.

    Args:
        marginals: independent stretches, in the order of ``theta``; with ``weights``, of what
            follows them.
        weights: the weights given the prior's parameters, which come first in the marginals.
    """

    def __init__(
        self, marginals: Sequence[Marginal], weights: ConditionalWeights | None = None
    ) -> None:
        self.dim = marginals[-1].where.stop
        self._blocks = marginals
        self._weights = weights

    @classmethod
    def of(
        cls, prior: Prior, spec: WeightSpec, parameters: Sequence[Hyperparameter]
    ) -> FlatPrior:
        """Lay out a prior and the priors of all inferred parameters.

        Args:
            prior: the prior over the weights.
            spec: the layout of ``theta``.
            parameters: those of the prior, then those of the likelihood.

        Raises:
            ValueError: if a distribution does not fit its tensor, is not elementwise, or has the
                wrong support.
        """
        own = [each for each in parameters if each.owner == "prior"]
        distributions = {each.name: each.distribution for each in parameters}
        weights = None
        if not prior.has_parameters:
            distributions |= prior.distributions(spec.network)
        elif own:
            weights = ConditionalWeights(prior, spec.network, own)
        else:
            raise ValueError(
                f"{prior.name} has no parameters to infer; give it distributions(spec) instead"
            )
        positive = {each.name for each in parameters if each.positive}
        marginals = []
        for name, where in spec.slices.items():
            if weights is None or name in spec.extras:
                each = elementwise(
                    name, distributions[name], spec.shapes[name], name in positive
                )
                each = rebuild(each, lambda v: v.reshape(-1))
                marginals.append(Marginal(where, each, name in positive))
        return cls(merged(marginals), weights)

    @classmethod
    def standard_normal(cls, dim: int) -> FlatPrior:
        """Return N(0, I)."""
        law = td.Normal(torch.zeros(dim), torch.ones(dim))
        return cls([Marginal(slice(0, dim), law, False)])

    @property
    def _normal(self) -> td.Normal | None:
        """The whole prior as one normal distribution, if it is one: the usual case, and the fast
        one.
        """
        first = self._blocks[0].distribution
        alone = len(self._blocks) == 1 and self._weights is None
        return first if alone and isinstance(first, td.Normal) else None

    @property
    def scale(self) -> Tensor | None:
        """The standard deviations ``(dim,)``, if the whole prior is normal: what its coordinates
        are scaled by.
        """
        normal = self._normal
        return None if normal is None else normal.scale

    def scale_of(self, count: int) -> Tensor | None:
        """Return the standard deviations of the first coordinates ``(count,)``, if these are normal
        whatever others.
        """
        first = self._blocks[0]
        normal, alone = first.distribution, self._weights is None
        if alone and isinstance(normal, td.Normal) and first.where.stop >= count:
            return normal.scale[:count]
        return None

    @property
    def marginals(self) -> Sequence[Marginal]:
        """Independent stretches: all of the prior, or what follows the `weights`."""
        return self._blocks

    @property
    def weights(self) -> ConditionalWeights | None:
        """The weights given the prior's parameters, if it has any."""
        return self._weights

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self._first.dtype

    @property
    def _first(self) -> Tensor:
        return next(iter(parameters_of(self._blocks[0].distribution).values()))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> FlatPrior:
        """Return the same prior with its parameters elsewhere."""
        weights = None if self._weights is None else self._weights.to(device)
        return FlatPrior([block.to(device, dtype) for block in self._blocks], weights)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log density, ``(..., dim) -> (...)`` in float64."""
        normal = self._normal
        if normal is not None:
            z = (theta - normal.loc) / normal.scale
            constant = normal.scale.double().log().sum() + 0.5 * self.dim * LOG_2PI
            return -0.5 * (z * z).sum(-1, dtype=torch.float64) - constant
        parts = [
            block.log_prob(theta[..., block.where]).sum(-1, dtype=torch.float64)
            for block in self._blocks
        ]
        if self._weights is not None:
            parts.append(self._weights.log_prob(theta[..., : self._weights.spec.dim]))
        return torch.stack(parts).sum(0)

    def log_prob_and_grad(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density and its gradient, differentiable again."""
        normal = self._normal
        if normal is not None:
            return self.log_prob(theta), (normal.loc - theta) / normal.scale**2
        pairs = [block.log_prob_and_grad(theta[..., block.where]) for block in self._blocks]
        parts = [value.sum(-1, dtype=torch.float64) for value, _ in pairs]
        grad = torch.cat([grad for _, grad in pairs], -1)
        if self._weights is not None:
            inner, start = self._weights.spec.dim, self._weights.network.dim
            value, by_all = self._weights.log_prob_and_grad(theta[..., :inner])
            parts.append(value)
            own, rest = grad[..., : inner - start], grad[..., inner - start :]
            grad = torch.cat([by_all[..., :start], by_all[..., start:] + own, rest], -1)
        return torch.stack(parts).sum(0), grad

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw ``(n, dim)``."""
        generator = as_generator(seed, self.device)
        parts = []
        for block in self._blocks:
            d = block.distribution
            if isinstance(d, td.Normal):
                noise = torch.randn(
                    n,
                    *d.loc.shape,
                    generator=generator,
                    device=self.device,
                    dtype=self.dtype,
                )
                value = d.loc + d.scale * noise
            else:
                with isolated(generator):
                    value = d.sample((n,))
            parts.append(value.log() if block.log else value)
        theta = torch.cat(parts, -1)  # (n, dim), or without the weights
        if self._weights is not None:
            count = self._weights.spec.dim - self._weights.network.dim
            theta = torch.cat(
                [self._weights.sample(theta[:, :count], generator), theta], -1
            )
        return theta

    @cached_property
    def median(self) -> Tensor:
        """The median of every coordinate, ``(dim,)``, in 1001 draws."""
        return self.sample(1001, 0).median(0).values

    @cached_property
    def interquartile_range(self) -> Tensor:
        """The distance of the quartiles of every coordinate, ``(dim,)``, in 1001 draws."""
        quarters = torch.tensor([0.25, 0.75], dtype=self.dtype, device=self.device)
        low, high = self.sample(1001, 0).quantile(quarters, dim=0)
        return high - low

    def at_mode(self, theta: Tensor) -> Tensor:
        """Move the prior's parameters to the mode of their density given the weights,
        ``(dim,) -> (dim,)``.

        The modes of log parameters are sought within exp(-5) and exp(5): a tensor of zeros has
        none.
        """
        if self._weights is None:
            return theta
        prior, start, stop = (
            self.to(theta.device, torch.float64),
            self._weights.network.dim,
            self._weights.spec.dim,
        )
        bounded = torch.cat([
            torch.full((math.prod(each.shape),), each.positive, device=theta.device)
            for each in self._weights.hyperparameters
        ])  # fmt: skip
        before, after = theta[:start].double(), theta[stop:].double()
        free = torch.zeros(
            stop - start, dtype=torch.float64, device=theta.device, requires_grad=True
        )

        def coordinates() -> Tensor:
            return torch.where(bounded, 5 * torch.tanh(free / 5), free)

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = -prior.log_prob(torch.cat([before, coordinates(), after]))
            value.backward()
            return value

        optimiser = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe")
        with torch.enable_grad():
            optimiser.step(loss)  # type: ignore[arg-type]
        found = coordinates().detach()
        found = found if bool(found.isfinite().all()) else torch.zeros_like(found)
        return torch.cat([theta[:start], found.to(theta), theta[stop:]])

    # ---------------------------------------- standard normal coordinates

    def require_coordinates(self) -> None:
        """Raise ``ValueError`` if a distribution has no cdf and inverse cdf to make normal
        coordinates from.
        """
        families = [block.distribution for block in self._blocks if block.table is None]
        if self._weights is not None:
            families += self._weights.families()
        for distribution in families:
            if not has_quantiles(distribution):
                name = type(distribution).__name__
                raise ValueError(
                    f"a transport from a {name} prior needs its cdf and inverse cdf, which "
                    "torch does not have; use a Normal, Laplace, Cauchy or another prior with both"
                )

    def to_normal(self, theta: Tensor) -> Tensor:
        """Map ``theta`` to coordinates in which the prior is N(0, I).

        Elementwise and increasing; weights with inferred prior parameters are mapped given the
        parameters.
        """
        parts = [block.to_normal(theta[..., block.where]) for block in self._blocks]
        if self._weights is not None:
            parts.insert(0, self._weights.to_normal(theta[..., : self._weights.spec.dim]))
        return torch.cat(parts, -1)

    def from_normal(self, z: Tensor) -> Tensor:
        """Map standard normal coordinates back to ``theta``."""
        parts = [block.from_normal(z[..., block.where]) for block in self._blocks]
        if self._weights is not None:
            start, stop = self._weights.network.dim, self._weights.spec.dim
            given = torch.cat(parts, -1)[..., : stop - start]
            parts.insert(0, self._weights.from_normal(z[..., :start], given))
        return torch.cat(parts, -1)

    def log_jacobian(self, theta: Tensor) -> Tensor:
        """Return log |d to_normal / d theta|, ``(..., dim) -> (...)`` in float64: prior over
        standard normal.
        """
        normal = self._normal
        if normal is not None:
            return -normal.scale.double().log().sum().expand(theta.shape[:-1])
        z = self.to_normal(theta)
        return (
            self.log_prob(theta)
            + 0.5 * (z * z).sum(-1, dtype=torch.float64)
            + 0.5 * self.dim * LOG_2PI
        )

    def at(self, z: Tensor) -> Placed:
        """Return the point ``(..., dim)`` of standard normal coordinates, where the map and its
        derivatives are.
        """
        return Placed(self, z)

    def vjp(self, z: Tensor, vectors: Tensor) -> Tensor:
        """Turn gradients by theta ``(..., dim)`` into gradients by z.

        More leading axes of vectors are allowed.
        """
        return self.at(z).vjp(vectors)

    def jvp(self, z: Tensor, vectors: Tensor) -> Tensor:
        """Turn directions in z ``(..., dim)`` into directions in theta."""
        return self.at(z).jvp(vectors)

    def bend_of(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Bend:
        """Return the derivative of a gradient by z ``(batch, dim)``, by automatic differentiation.

        Of a function in which weights meet no other weights: one forward derivative for all of
        them, and one for each parameter of the prior.
        """
        along, *each = self._partials(function, z).unbind(0)
        if not each:
            return Bend(Arrowhead(along, None), None)
        start, stop = self._given
        columns = torch.stack(each, -1)  # (batch, dim, parameters)
        diagonal = torch.cat(
            [along[:, :start], torch.zeros_like(along[:, start:stop]), along[:, stop:]], 1
        )
        return Bend(Arrowhead(diagonal, columns[:, :start]), columns[:, start:stop])

    def _arrowhead(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Arrowhead:
        """Return the derivative of a function that mixes coordinates as `from_normal` does, by the
        same derivatives.
        """
        arrow, block = self.bend_of(function, z)
        assert block is not None
        start, stop = self._given
        own = block.diagonal(dim1=1, dim2=2)
        return arrow._replace(
            diagonal=torch.cat(
                [arrow.diagonal[:, :start], own, arrow.diagonal[:, stop:]], 1
            )
        )

    def _partials(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """Return derivatives along all coordinates but the prior's parameters, and along each of
        those.

        ``(1 + parameters, batch, dim)``.
        """
        start, stop = self._given
        along = torch.ones(1, self.dim, device=z.device, dtype=z.dtype)
        along[:, start:stop] = 0
        each = torch.eye(self.dim, device=z.device, dtype=z.dtype)[start:stop]

        def derivative(direction: Tensor) -> Tensor:
            return jvp(function, (z,), (direction.expand_as(z),))[1]

        if start == stop:
            return derivative(along[0]).unsqueeze(0)
        return torch.func.vmap(derivative)(torch.cat([along, each]))

    @property
    def _given(self) -> tuple[int, int]:
        """Where the parameters of the prior are, which the weights before them meet."""
        return (
            (0, 0)
            if self._weights is None
            else (self._weights.network.dim, self._weights.spec.dim)
        )

    def _derivative(self, z: Tensor) -> Tensor:
        """Return the first of the `_derivatives` alone."""
        parts = [block.derivative(z[..., block.where]) for block in self._blocks]
        if self._weights is not None:
            parts.insert(0, torch.ones_like(z[..., : self._weights.network.dim]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return both derivatives of `from_normal`.

        1 and 0 for weights that follow parameters of the prior.
        """
        pairs = [block.derivatives(z[..., block.where]) for block in self._blocks]
        if self._weights is not None:
            weights = z[..., : self._weights.network.dim]
            pairs.insert(0, (torch.ones_like(weights), torch.zeros_like(weights)))
        if len(pairs) == 1:
            return pairs[0]
        first, second = zip(*pairs, strict=True)
        return torch.cat(first, -1), torch.cat(second, -1)

    # ---------------------------------------- storage

    def describe(self) -> list[dict[str, Any]]:
        """Return the blocks as plain values from which ``from_description`` rebuilds a prior
        without parameters.
        """
        weights = [] if self._weights is None else self._weights.describe()
        return weights + [
            {
                "start": block.where.start,
                "stop": block.where.stop,
                "log": block.log,
                "family": type(block.distribution).__name__,
                "parameters": {
                    k: v.tolist() for k, v in parameters_of(block.distribution).items()
                },
            }
            for block in self._blocks
        ]

    def identity(self) -> list[Any]:
        """Return what tells priors apart, as plain values and tensors."""
        weights = [] if self._weights is None else self._weights.describe()
        blocks = [
            (
                b.where.start,
                b.where.stop,
                b.log,
                type(b.distribution).__name__,
                parameters_of(b.distribution),
            )
            for b in self._blocks
        ]
        return [weights, blocks]

    @classmethod
    def from_description(
        cls, blocks: list[dict[str, Any]], dtype: torch.dtype
    ) -> FlatPrior:
        """Rebuild a prior from ``describe``.

        Only families of ``torch.distributions`` are accepted.
        """
        marginals = []
        for block in blocks:
            if block["family"] not in td.__all__:
                raise ValueError(
                    f"no distribution {block['family']!r} in torch.distributions"
                )
            family = getattr(td, block["family"])
            parameters = {
                k: torch.tensor(v, dtype=dtype) for k, v in block["parameters"].items()
            }
            where = slice(block["start"], block["stop"])
            marginals.append(Marginal(where, family(**parameters), block["log"]))
        return cls(marginals)


class Placed:
    """The map from standard normal coordinates z to theta at one point: each part is computed once.

    Args:
        prior: whose map.
        z: the point, ``(..., dim)``; ``(batch, dim)`` for matrices.
    """

    def __init__(self, prior: FlatPrior, z: Tensor) -> None:
        self.z = z
        self._prior, self._weights = prior, prior._weights

    @cached_property
    def theta(self) -> Tensor:
        """What z stands for."""
        return self._prior.from_normal(self.z)

    @cached_property
    def _derivative(self) -> Tensor:
        return self._prior._derivative(self.z)

    @cached_property
    def _derivatives(self) -> tuple[Tensor, Tensor]:
        return self._prior._derivatives(self.z)

    def vjp(self, vectors: Tensor) -> Tensor:
        """Turn gradients by theta ``(..., dim)`` into gradients by z.

        More leading axes of vectors are allowed.
        """
        if self._weights is None:
            return vectors * self._derivative
        if self._weights.closed:
            return self._weights.vjp(self.theta, vectors, self._derivative)
        z = self.z.expand_as(vectors)
        return torch.func.vjp(self._prior.from_normal, z)[1](vectors)[0]  # type: ignore[misc]

    def jvp(self, vectors: Tensor) -> Tensor:
        """Turn directions in z ``(..., dim)`` into directions in theta."""
        if self._weights is None:
            return vectors * self._derivative
        return jvp(self._prior.from_normal, (self.z,), (vectors,))[1]

    @cached_property
    def slope(self) -> Arrowhead:
        """The derivative of theta by z; differentiable again."""
        if self._weights is None:
            return Arrowhead(self._derivative, None)
        if self._weights.closed:
            return self._weights.slope(self.theta, self._derivative)
        return self._prior._arrowhead(self._prior.from_normal, self.z)

    def turn(self, v: Tensor) -> Arrowhead:
        """Return the derivative by z of ``slope`` v, v ``(batch, dim)`` fixed."""
        if self._weights is None:
            return Arrowhead(self._derivatives[1] * v, None)
        if self._weights.closed:
            return self._weights.turn(self.theta, v, *self._derivatives)
        return self._prior._arrowhead(lambda z: self._prior.jvp(z, v), self.z)

    def bend(self, grad: Tensor) -> Bend:
        """Return the derivative by z of ``pull(grad)``, ``grad`` ``(batch, dim)`` fixed."""
        if self._weights is None:
            return Bend(Arrowhead(self._derivatives[1] * grad, None), None)
        if self._weights.closed:
            return self._weights.bend(self.theta, grad, *self._derivatives)
        return self._prior.bend_of(lambda z: self._prior.vjp(z, grad), self.z)
