"""Parameters of the prior and of the likelihood, which are inferred beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor
from torch.distributions import Distribution

from bnnflow.model.priors.marginals import on_half_line, unwrapped
from bnnflow.model.priors.prior import Prior
from bnnflow.weights import WeightSpec

__all__ = ["Hyperparameter"]


class Hyperparameter(NamedTuple):
    """A parameter of the prior or of the likelihood: one tensor of ``theta`` after the weights."""

    owner: Literal["prior", "likelihood"]
    key: str  # to its owner: "scale"
    distribution: Distribution
    positive: bool  # the coordinate in theta is the logarithm

    @classmethod
    def of_prior(cls, prior: Prior, spec: WeightSpec) -> list[Hyperparameter]:
        """Return the inferred parameters of a prior; none for one that fixes everything."""
        return [
            cls("prior", key, distribution, on_half_line(unwrapped(distribution)))
            for key, distribution in prior.parameters(spec).items()
        ]

    @classmethod
    def of_likelihood(cls, parameters: Mapping[str, Distribution]) -> list[Hyperparameter]:
        """Return the learned parameters of a likelihood."""
        return [cls("likelihood", key, each, True) for key, each in parameters.items()]

    @property
    def name(self) -> str:
        """The tensor of ``theta``: "likelihood.log_scale"."""
        return f"{self.owner}.log_{self.key}" if self.positive else self.site

    @property
    def site(self) -> str:
        """The variable itself, to Pyro: "likelihood.scale"."""
        return f"{self.owner}.{self.key}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, ``(1,)`` for a scalar."""
        return tuple(unwrapped(self.distribution).batch_shape) or (1,)

    def coordinate(self, value: Tensor) -> Tensor:
        """Return its coordinate in ``theta``."""
        return value.log() if self.positive else value

    def value(self, coordinate: Tensor) -> Tensor:
        """Return the parameter of its coordinate."""
        return coordinate.exp() if self.positive else coordinate
