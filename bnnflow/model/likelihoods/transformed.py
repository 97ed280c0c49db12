"""Likelihoods of targets in other units: of standardised ones, and of logarithms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bnnflow.arguments import numbers, shown
from bnnflow.model.likelihood import Kind, Likelihood, Score
from bnnflow.model.likelihoods.based import Based
from bnnflow.model.likelihoods.counts import Levels
from bnnflow.model.likelihoods.real import Gaussian, HeteroscedasticGaussian
from bnnflow.model.likelihoods.shared import positive_targets
from bnnflow.model.likelihoods.weighted import Weighted

__all__ = ["LogNormal", "Reduced", "Standardised", "Transformed", "reduced"]


_MEMBERS = ("kind", "parameters", "validate", "log_prob", "mean")


class Transformed(Based):
    """y = g(z) with z of another likelihood, for an increasing g that acts on every target alone.

    Targets are kept in float64 whatever the model computes in, so that they may be far from zero.
    """

    wide_targets = True

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """Return y = g(z), ``(..., n, targets)``."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """Return z with g(z) = y, ``(..., n, targets)``."""

    @abstractmethod
    def log_slope(self, y: Tensor) -> Tensor:
        """Return log dz/dy summed over the targets, ``(..., n, targets) -> (..., n)``."""

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, targets)``."""
        y = y.double().unsqueeze(-1) if y.dim() == 1 else y.double()
        return y.reshape(self.base.validate(self.inverse(y), n_outputs).shape)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``: the log density of z, and the logarithm of dz/dy."""
        log_prob = self.base.log_prob(outputs, self._z(outputs, y), parameters)
        return log_prob + self.log_slope(y).to(outputs.dtype)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the base's gradients at z."""
        return self.base.score(outputs, self._z(outputs, y), parameters)

    @property
    def has_variance(self) -> bool:
        """Whether the base has one."""
        return self.base.has_variance

    @property
    def has_sample(self) -> bool:
        """Whether the base has one."""
        return self.base.has_sample

    @property
    def has_cdf(self) -> bool:
        """Whether the base has one."""
        return self.base.has_cdf

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the base's, which no change of units of y changes."""
        return self.base.fisher_factor(outputs, parameters)

    def whitened_score(
        self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]
    ) -> Tensor:
        """Return the base's at z."""
        return self.base.whitened_score(outputs, self._z(outputs, y), parameters)

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, targets)``."""
        return self.base.cdf(outputs, self._z(outputs, y), parameters)

    def cdfs(
        self, outputs: Tensor, values: Tensor, parameters: dict[str, Tensor]
    ) -> Iterator[Tensor]:
        """Yield the `cdf` at each of several values of y, ``(k, n, targets)``."""
        return self.base.cdfs(outputs, self._z(outputs, values), parameters)

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, targets)``."""
        return self.forward(self.base.sample(outputs, parameters, generator))

    def _z(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self.inverse(y).to(outputs.dtype)


@dataclass(frozen=True)
class Standardised(Transformed):
    """(y - loc) / scale is of another likelihood, whose outputs and noise are then near one.

    So that a model of raw targets has priors as for standardised ones, and predicts in units of y.

    Args:
        base: the likelihood of standardised targets, for regression.
        loc: a number for all targets, or one for each.
        scale: the same, positive.

    Raises:
        ValueError: if scale is not positive, or base is for classes or counts.

    Example:
        >>> import torch
        >>> y = torch.tensor([[1990.0], [2020.0]])
        >>> ages = Standardised(Gaussian(1.0), loc=2000.0, scale=10.0)
        >>> ages.mean(torch.tensor([[-1.0], [2.0]]), {}).flatten()
        tensor([1990., 2020.])
    """

    base: Likelihood
    loc: tuple[float, ...] | float = 0.0
    scale: tuple[float, ...] | float = 1.0
    kind: Kind = field(default="regression", init=False)

    def __post_init__(self) -> None:
        _settle_base(self)
        object.__setattr__(self, "loc", numbers("loc", self.loc))
        object.__setattr__(self, "scale", numbers("scale", self.scale, above=0))

    def forward(self, z: Tensor) -> Tensor:
        """Return loc + scale * z."""
        return z * self._of(self.scale, z) + self._of(self.loc, z)

    def inverse(self, y: Tensor) -> Tensor:
        """Return (y - loc) / scale."""
        return (y - self._of(self.loc, y)) / self._of(self.scale, y)

    def log_slope(self, y: Tensor) -> Tensor:
        """Return minus the sum of log scale, ``(..., n)``."""
        return -self._of(self.scale, y).log().expand(y.shape).sum(-1)

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, targets)``."""
        targets = y.shape[1] if y.dim() == 2 else 1
        for name in ("loc", "scale"):
            if (found := len(getattr(self, name))) not in (1, targets):
                raise ValueError(f"{name} has {found} values, and y {targets} targets")
        return super().validate(y, n_outputs)

    def mean(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the mean of y, ``(..., n, targets)``."""
        return self.forward(self.base.mean(outputs, parameters))

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, targets)``."""
        variance = self.base.variance(outputs, parameters)
        return variance * self._of(self.scale, variance).square()

    @staticmethod
    def _of(values: float | tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class LogNormal(Transformed):
    """log y is normal: positive targets whose spread grows with their size.

    Args:
        base: the likelihood of log y, one with normal noise: `Gaussian`, `HeteroscedasticGaussian`,
            or one of these `Standardised`.

    Raises:
        ValueError: if base is not normal, or a target not positive.
    """

    base: Likelihood
    kind: Kind = field(default="regression", init=False)

    def __post_init__(self) -> None:
        _settle_base(self)
        inner = self.base
        while isinstance(inner, Standardised):
            inner = inner.base
        if not isinstance(inner, Gaussian | HeteroscedasticGaussian):
            raise ValueError(f"base must have normal noise, got {inner!r}")

    def forward(self, z: Tensor) -> Tensor:
        """Return exp(z)."""
        return z.exp()

    def inverse(self, y: Tensor) -> Tensor:
        """Return log y, minus infinity below zero."""
        return y.clamp(min=0).log()

    def log_slope(self, y: Tensor) -> Tensor:
        """Return minus the sum of log y, ``(..., n)``."""
        return -y.log().sum(-1)

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, targets)``."""
        return positive_targets(super().validate(y, n_outputs))

    def mean(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the mean of y, exp(m + s^2 / 2), ``(..., n, targets)``."""
        variance = self.base.variance(outputs, parameters)
        return (self.base.mean(outputs, parameters) + 0.5 * variance).exp()

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, targets)``."""
        mean = self.mean(outputs, parameters)
        return self.base.variance(outputs, parameters).expm1() * mean.square()


def _settle_base(transformed: Transformed) -> None:
    given = transformed.base
    if isinstance(given, type) or not all(hasattr(given, name) for name in _MEMBERS):
        raise TypeError(
            f"base must be a likelihood, such as Gaussian(), got {shown(given)}"
        )
    base = Likelihood.of(given)
    if base.kind != "regression" or base.discrete:
        raise ValueError(f"base must be for continuous targets, got {base!r}")
    object.__setattr__(transformed, "base", base)


class Reduced(NamedTuple):
    """A density of data as that of other targets under a simpler likelihood."""

    likelihood: Likelihood
    y: Tensor
    log_slope: float  # what the log density of all rows has beside that
    row_weights: Tensor | None  # how often each counts, (n,)


def reduced(likelihood: Likelihood, y: Tensor) -> Reduced:
    """Take weights of rows and all transformations off a likelihood, and the numbers off levels:
    gradients are the same at the transformed targets.
    """
    log_slope, row_weights = 0.0, None
    if isinstance(likelihood, Weighted):
        likelihood, (y, row_weights) = likelihood.base, likelihood.parts(y, y)
    while isinstance(likelihood, Transformed):
        slopes = likelihood.log_slope(y)
        log_slope += float((slopes if row_weights is None else slopes * row_weights).sum())
        likelihood, y = likelihood.base, likelihood.inverse(y)
    if isinstance(likelihood, Levels):
        likelihood, y = likelihood.classes, likelihood.labels(y)
    return Reduced(likelihood, y, log_slope, row_weights)
