"""Priors over weights, and the flat density that a model makes of them.

A prior names one elementwise distribution per tensor. ``FlatPrior`` lays them out along ``theta``, together with the
priors of positive likelihood parameters, whose coordinate in ``theta`` is the logarithm (with its Jacobian). It also
knows the map to standard normal coordinates, in which the transport works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution, constraints

from bnnflow.seeding import as_generator, isolated
from bnnflow.types import Prior, Seed
from bnnflow.weights import WeightSpec, unwrapped

__all__ = ["FanIn", "FlatPrior", "Independent", "Laplace", "Normal", "PerTensor", "StudentT", "as_prior"]

_LOG_2PI = math.log(2 * math.pi)


def _exact(value: float) -> Tensor:
    """Keep a setting in double precision; a model rounds it to its own."""
    return torch.tensor(float(value), dtype=torch.float64)


@dataclass(frozen=True)
class Independent:
    """One distribution for every weight, independently.

    Args:
        distribution: any scalar torch or Pyro distribution on the real line.
    """

    distribution: Distribution

    def distributions(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return the same distribution for every tensor."""
        return dict.fromkeys(spec.names, self.distribution)


def Normal(scale: float = 1.0, loc: float = 0.0) -> Independent:
    """Return independent normal weights with standard deviation ``scale``."""
    return Independent(td.Normal(_exact(loc), _exact(scale)))


def Laplace(scale: float = 1.0, loc: float = 0.0) -> Independent:
    """Return independent Laplace weights."""
    return Independent(td.Laplace(_exact(loc), _exact(scale)))


def StudentT(df: float = 4.0, scale: float = 1.0, loc: float = 0.0) -> Independent:
    """Return independent Student-t weights."""
    return Independent(td.StudentT(_exact(df), _exact(loc), _exact(scale)))


@dataclass(frozen=True)
class FanIn:
    """Normal weights with variance ``scale**2 / fan_in``, biases with standard deviation ``bias_scale``.

    Keeps the prior over functions of the same size at every width (Neal, 1996).
    """

    scale: float = 1.0
    bias_scale: float = 1.0

    def distributions(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return a normal distribution per tensor."""
        fan_in = {name: math.prod(shape[1:]) for name, shape in spec.shapes.items()}
        return {
            name: td.Normal(
                _exact(0.0),
                _exact(self.scale / math.sqrt(fan_in[name]) if len(shape) > 1 else self.bias_scale),
            )
            for name, shape in spec.shapes.items()
        }


@dataclass(frozen=True)
class PerTensor:
    """A distribution for each tensor by name, and one for the rest.

    Args:
        by_name: distributions that broadcast to the shape of their tensor.
        default: for every tensor that is not named; without it every tensor must be.
    """

    by_name: Mapping[str, Distribution]
    default: Distribution | None = None

    def distributions(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return a distribution per tensor; raise ``ValueError`` for unknown or missing names."""
        unknown = set(self.by_name) - set(spec.names)
        missing = set(spec.names) - set(self.by_name)
        if unknown:
            raise ValueError(f"prior names {sorted(unknown)}, but the network's tensors are {list(spec.names)}")
        if missing and self.default is None:
            raise ValueError(f"prior has no distribution for {sorted(missing)} and no default")
        return {name: self.by_name.get(name, self.default) for name in spec.names}  # type: ignore[misc]


def as_prior(prior: Prior | Distribution | Mapping[str, Distribution]) -> Prior:
    """Accept a prior, one distribution for every weight, or a dict of them per tensor."""
    if isinstance(prior, Distribution):
        return Independent(prior)
    if isinstance(prior, Mapping):
        return PerTensor(prior)
    if not hasattr(prior, "distributions"):
        raise ValueError(f"prior must be a Prior, a Distribution or a dict of them, got {type(prior).__name__}")
    return prior


@dataclass(frozen=True)
class _Block:
    """A stretch of ``theta`` with one distribution; ``log`` says that theta is the logarithm of its variable."""

    where: slice
    distribution: Distribution  # of shape (size,)
    log: bool = False

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the elementwise log density in the coordinate ``theta`` ``(..., size)``."""
        if self.log:
            return self.distribution.log_prob(theta.exp()) + theta
        return self.distribution.log_prob(theta)


class FlatPrior:
    """The prior density along the flat weight vector.

    Args:
        spec: the layout of ``theta``, extras included.
        distributions: one per tensor, broadcasting to its shape.
        positive: names of the tensors whose coordinate is the logarithm of their variable.

    Raises:
        ValueError: if a distribution does not fit its tensor, is not elementwise, or has the wrong support.
    """

    def __init__(self, spec: WeightSpec, distributions: Mapping[str, Distribution], positive: frozenset[str]) -> None:
        self.dim = spec.dim
        blocks = []
        for name, where in spec.slices.items():
            distribution = elementwise(name, distributions[name], spec.shapes[name], name in positive)
            blocks.append(_Block(where, rebuild(distribution, lambda v: v.reshape(-1)), name in positive))
        self._blocks = _merge_normals(blocks)

    @property
    def _normal(self) -> td.Normal | None:
        """The whole prior as one normal distribution, if it is one: the usual case, and the fast one."""
        first = self._blocks[0].distribution
        return first if len(self._blocks) == 1 and isinstance(first, td.Normal) else None

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
        return next(iter(_parameters(self._blocks[0].distribution).values()))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> FlatPrior:
        """Return the same prior with its parameters elsewhere."""
        moved = object.__new__(FlatPrior)
        moved.dim = self.dim
        moved._blocks = [
            _Block(b.where, rebuild(b.distribution, lambda v: v.to(device, dtype)), b.log) for b in self._blocks
        ]
        return moved

    def log_prob(self, theta: Tensor) -> Tensor:
        """Return the log density, ``(..., dim) -> (...)`` in float64."""
        normal = self._normal
        if normal is not None:
            z = (theta - normal.loc) / normal.scale
            constant = normal.scale.double().log().sum() + 0.5 * self.dim * _LOG_2PI
            return -0.5 * (z * z).sum(-1, dtype=torch.float64) - constant
        parts = [block.log_prob(theta[..., block.where]).sum(-1, dtype=torch.float64) for block in self._blocks]
        return torch.stack(parts).sum(0)

    def log_prob_and_grad(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density and its gradient, differentiable again."""
        normal = self._normal
        if normal is not None:
            return self.log_prob(theta), (normal.loc - theta) / normal.scale**2
        value, vjp, *_ = torch.func.vjp(self.log_prob, theta)
        return value, vjp(torch.ones_like(value))[0]

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw ``(n, dim)``."""
        generator = as_generator(seed, self.device)
        parts = []
        for block in self._blocks:
            d = block.distribution
            if isinstance(d, td.Normal):
                noise = torch.randn(n, *d.loc.shape, generator=generator, device=self.device, dtype=self.dtype)
                value = d.loc + d.scale * noise
            else:
                with isolated(generator):
                    value = d.sample((n,))
            parts.append(value.log() if block.log else value)
        return torch.cat(parts, -1)  # (n, dim)

    # ------------------------------------------------ standard normal coordinates

    def require_coordinates(self) -> None:
        """Raise ``ValueError`` if a distribution has no cdf and inverse cdf to make normal coordinates from."""
        for block in self._blocks:
            if not isinstance(block.distribution, td.Normal):
                try:
                    block.distribution.icdf(block.distribution.cdf(torch.ones(1, device=self.device)))
                except NotImplementedError as error:
                    name = type(block.distribution).__name__
                    raise ValueError(
                        f"a transport from a {name} prior needs its cdf and inverse cdf, which torch does not have; "
                        "use a Normal, Laplace, Cauchy or another prior with both"
                    ) from error

    def to_normal(self, theta: Tensor) -> Tensor:
        """Map ``theta`` to coordinates in which the prior is N(0, I); elementwise and increasing."""
        return torch.cat([self._block_to_normal(block, theta[..., block.where]) for block in self._blocks], -1)

    def from_normal(self, z: Tensor) -> Tensor:
        """Map standard normal coordinates back to ``theta``."""
        return torch.cat([self._block_from_normal(block, z[..., block.where]) for block in self._blocks], -1)

    def log_jacobian(self, theta: Tensor) -> Tensor:
        """Return log |d to_normal / d theta|, ``(..., dim) -> (...)`` in float64: prior over standard normal."""
        normal = self._normal
        if normal is not None:
            return -normal.scale.double().log().sum().expand(theta.shape[:-1])
        z = self.to_normal(theta)
        return self.log_prob(theta) + 0.5 * (z * z).sum(-1, dtype=torch.float64) + 0.5 * self.dim * _LOG_2PI

    def derivative(self, z: Tensor) -> Tensor:
        """Return d theta / d z elementwise, ``(..., dim)``; differentiable again."""
        normal = self._normal
        if normal is not None:
            return normal.scale.expand_as(z)
        return torch.func.jvp(self.from_normal, (z,), (torch.ones_like(z),))[1]

    @staticmethod
    def _block_to_normal(block: _Block, theta: Tensor) -> Tensor:
        d = block.distribution
        if isinstance(d, td.Normal):
            return (theta - d.loc) / d.scale
        d = rebuild(d, lambda v: v.double())
        value = theta.double().exp() if block.log else theta.double()
        # Neither tail may round to probability zero or one: z is kept between -37 and 8.
        p = d.cdf(value).clamp(_TINY, 1 - _EPSILON)
        return torch.special.ndtri(p).to(theta.dtype)

    @staticmethod
    def _block_from_normal(block: _Block, z: Tensor) -> Tensor:
        d = block.distribution
        if isinstance(d, td.Normal):
            return d.loc + d.scale * z
        d = rebuild(d, lambda v: v.double())
        value = d.icdf(torch.special.ndtr(z.double()).clamp(_TINY, 1 - _EPSILON))
        return (value.log() if block.log else value).to(z.dtype)

    # ------------------------------------------------ storage

    def describe(self) -> list[dict[str, Any]]:
        """Return the blocks as plain values from which ``from_description`` rebuilds the prior."""
        return [
            {
                "start": block.where.start,
                "stop": block.where.stop,
                "log": block.log,
                "family": type(block.distribution).__name__,
                "parameters": {k: v.tolist() for k, v in _parameters(block.distribution).items()},
            }
            for block in self._blocks
        ]

    @classmethod
    def from_description(cls, blocks: list[dict[str, Any]], dtype: torch.dtype) -> FlatPrior:
        """Rebuild a prior from ``describe``; only families of ``torch.distributions`` are accepted."""
        prior = object.__new__(cls)
        prior._blocks = []
        for block in blocks:
            if block["family"] not in td.__all__:
                raise ValueError(f"no distribution {block['family']!r} in torch.distributions")
            family = getattr(td, block["family"])
            parameters = {k: torch.tensor(v, dtype=dtype) for k, v in block["parameters"].items()}
            prior._blocks.append(_Block(slice(block["start"], block["stop"]), family(**parameters), block["log"]))
        prior.dim = prior._blocks[-1].where.stop
        return prior


_TINY = 1e-300
_EPSILON = 1e-16


def _parameters(distribution: Distribution) -> dict[str, Tensor]:
    """Return the tensors that define a distribution; redundant ones (probs beside logits) are left out."""
    names = [name for name in distribution.arg_constraints if name in distribution.__dict__]
    if not names:  # transformed families (HalfNormal, LogNormal) keep theirs behind properties
        names = list(distribution.arg_constraints)
    return {name: torch.as_tensor(getattr(distribution, name)) for name in names}


def rebuild(distribution: Distribution, change: Callable[[Tensor], Tensor]) -> Distribution:
    """Return the same family with ``change`` applied to every parameter."""
    family = getattr(td, type(distribution).__name__)
    return family(**{name: change(value) for name, value in _parameters(distribution).items()}, validate_args=False)


def elementwise(name: str, distribution: Distribution, shape: tuple[int, ...], positive: bool) -> Distribution:
    """Check one tensor's distribution and expand it to the tensor's shape, without event axes."""
    distribution = unwrapped(distribution)
    family = type(distribution).__name__
    if distribution.event_shape:
        raise ValueError(f"prior of {name!r}: {family} is not elementwise")
    if family not in td.__all__ or not distribution.arg_constraints:
        raise ValueError(
            f"prior of {name!r}: {family} is not a family of torch.distributions with parameters of its own"
        )
    support = distribution.support
    half_line = isinstance(support, (type(constraints.positive), type(constraints.nonnegative)))
    if positive and not (half_line and bool(torch.as_tensor(support.lower_bound).eq(0).all())):
        raise ValueError(f"prior of {name!r} must have positive support, {family} has {support}")
    if not positive and not isinstance(support, type(constraints.real)):
        raise ValueError(f"prior of {name!r} must have the real line as support, {family} has {support}")
    try:
        torch.broadcast_shapes(distribution.batch_shape, shape)
        fits = len(distribution.batch_shape) <= len(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"prior of {name!r} has shape {tuple(distribution.batch_shape)}, the tensor {shape}")
    return rebuild(distribution, lambda v: v.detach().expand(shape))


def _merge_normals(blocks: list[_Block]) -> list[_Block]:
    """Join neighbouring normal stretches, so that the usual prior is a handful of flat operations."""
    merged: list[_Block] = []
    for block in blocks:
        last = merged[-1] if merged else None
        if last and isinstance(last.distribution, td.Normal) and isinstance(block.distribution, td.Normal):
            normal = td.Normal(
                torch.cat([last.distribution.loc, block.distribution.loc]),
                torch.cat([last.distribution.scale, block.distribution.scale]),
                validate_args=False,
            )
            merged[-1] = _Block(slice(last.where.start, block.where.stop), normal)
        else:
            merged.append(block)
    return merged
