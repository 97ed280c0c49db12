"""Priors under which the weights are independent, each with a fixed distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributions as td
from torch.distributions import Distribution

from bnnflow.arguments import checked, number, positive, settle
from bnnflow.model.priors.marginals import exact
from bnnflow.model.priors.prior import FixedPrior, HierarchicalPrior, Prior
from bnnflow.weights import WeightSpec

__all__ = ["FanIn", "Independent", "Laplace", "Normal", "PerTensor", "StudentT", "as_prior"]


@checked
@dataclass(frozen=True)
class Independent(Prior):
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
    return Independent(
        td.Normal(exact(number("loc", loc)), exact(positive("scale", scale)))
    )


def Laplace(scale: float = 1.0, loc: float = 0.0) -> Independent:
    """Return independent Laplace weights."""
    return Independent(
        td.Laplace(exact(number("loc", loc)), exact(positive("scale", scale)))
    )


def StudentT(df: float = 4.0, scale: float = 1.0, loc: float = 0.0) -> Independent:
    """Return independent Student-t weights."""
    df, loc, scale = positive("df", df), number("loc", loc), positive("scale", scale)
    return Independent(td.StudentT(exact(df), exact(loc), exact(scale)))


@dataclass(frozen=True)
class FanIn(Prior):
    """Normal weights with variance ``scale**2 / fan_in``, biases with standard deviation
    ``bias_scale``.

    Keeps the prior over functions of the same size at every width (Neal, 1996), whatever the layer;
    what fan in means for each, `WeightSpec.fan_in` says.
    """

    scale: float = 1.0
    bias_scale: float = 1.0

    def __post_init__(self) -> None:
        settle(self, number, "scale", "bias_scale", above=0)

    def distributions(self, spec: WeightSpec) -> dict[str, Distribution]:
        """Return a normal distribution per tensor."""
        scales = {}
        for name in spec.names:
            fan_in = spec.fan_in(name)
            scales[name] = (
                self.bias_scale if fan_in is None else self.scale / math.sqrt(fan_in)
            )
        return {name: td.Normal(exact(0.0), exact(scale)) for name, scale in scales.items()}


@checked
@dataclass(frozen=True)
class PerTensor(Prior):
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
            raise ValueError(
                f"prior names {sorted(unknown)}, but the network's tensors are {list(spec.names)}"
            )
        if missing and self.default is None:
            raise ValueError(
                f"prior has no distribution for {sorted(missing)} and no default"
            )
        return {name: self.by_name.get(name, self.default) for name in spec.names}  # type: ignore[misc]


def as_prior(
    prior: Prior
    | FixedPrior
    | HierarchicalPrior
    | Distribution
    | Mapping[str, Distribution],
) -> Prior:
    """Return a prior itself, or what one distribution, a dict of them or an object with a prior's
    methods says.

    Raises:
        ValueError: for a prior that has only one of ``parameters`` and ``conditional``.
    """
    if isinstance(prior, Distribution):
        return Independent(prior)
    return PerTensor(prior) if isinstance(prior, Mapping) else Prior.of(prior)
