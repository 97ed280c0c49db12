"""Likelihoods of counts and of other whole numbers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from bnnflow.arguments import number, numbers, settle
from bnnflow.model.likelihood import Kind, Likelihood, Score, real_targets
from bnnflow.model.likelihoods.classes import Bernoulli, Ordinal
from bnnflow.model.likelihoods.shared import (
    Parameters,
    by_scipy,
    check_owners,
    dispersion_of,
    half_normal,
    over_rows,
)
from bnnflow.seeding import isolated

__all__ = ["Levels", "NegativeBinomial", "Poisson"]


def _counts(y: Tensor, n_targets: int) -> Tensor:
    """Return counts as floating-point ``(n, targets)``, checked."""
    y = real_targets(y, n_targets)
    wrong = ((y < 0) | (y != y.floor())).any(-1).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        value = next(float(v) for v in y[row] if v < 0 or v != v.floor())
        raise ValueError(
            f"y in row {row} is {value:g}: counts are the whole numbers from 0"
        )
    return y


def _poisson(rate: Tensor, generator: torch.Generator) -> Tensor:
    """Draw counts; a rate that has no whole numbers beside it is its own count, where torch
    overflows.
    """
    most = 2.0**53
    counts = torch.poisson(rate.clamp(max=most), generator=generator)
    return torch.where(rate > most, rate, counts)


@dataclass(frozen=True)
class Poisson(Likelihood):
    """y ~ Poisson(exp(outputs)): counts whose variance is their mean."""

    kind: Kind = field(default="regression", init=False)
    discrete: bool = field(default=True, init=False)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """None are learned beside the network."""
        return {}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return the counts as ``(n, out)``."""
        return _counts(y, n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``, summed over targets."""
        return (y * outputs - outputs.exp() - torch.lgamma(y + 1)).sum(-1)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs."""
        return y - outputs.exp(), {}

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T the Fisher information of a row's outputs, their rates."""
        return torch.diag_embed((0.5 * outputs).exp()), {}

    def mean(self, outputs: Tensor, parameters: Parameters = None) -> Tensor:
        """Return the rates, ``(..., n, out)``."""
        return outputs.exp()

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, out)``."""
        return outputs.exp()

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, out)``."""
        inside = torch.special.gammaincc(y.floor().clamp(min=0) + 1, outputs.exp())
        return torch.where(y < 0, 0.0, inside)

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, out)``."""
        return _poisson(outputs.exp(), generator)


@dataclass(frozen=True)
class NegativeBinomial(Likelihood):
    """Counts with mean m = exp(outputs) and variance m + dispersion * m^2.

    Poisson where the dispersion vanishes.

    With r = 1 / dispersion, y is Poisson with a rate that is Gamma(r, r / m) (the "NB2" of Cameron
    & Trivedi 1986).

    Args:
        dispersion: None learns it.
        dispersion_prior: its prior when it is learned, any distribution on the positive numbers;
            one of shape ``(targets,)`` gives every target a dispersion of its own.

    Raises:
        ValueError: if the dispersion is not positive.
    """

    dispersion: float | None = None
    dispersion_prior: Distribution = field(default_factory=half_normal)
    kind: Kind = field(default="regression", init=False)
    discrete: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        settle(self, number, "dispersion", above=0)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """The dispersion, if it is learned."""
        return {} if self.dispersion is not None else {"dispersion": self.dispersion_prior}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return the counts as ``(n, out)``."""
        check_owners(self.parameters, n_outputs)
        return _counts(y, n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``, summed over targets."""
        dispersion = dispersion_of(self.dispersion, outputs, parameters)
        # Differences of large terms as the dispersion vanishes: they want float64.
        r, y64 = 1 / dispersion.double(), y.double()
        ways = torch.lgamma(y64 + r) - torch.lgamma(r) - torch.lgamma(y64 + 1)
        logit = (outputs + dispersion.log()).double()  # log(dispersion * mean)
        log_prob = ways - r * F.softplus(logit) + y64 * F.logsigmoid(logit)
        return log_prob.sum(-1).to(outputs.dtype)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs and by log dispersion (summed over rows)."""
        dispersion = dispersion_of(self.dispersion, outputs, parameters)
        r, y64 = 1 / dispersion.double(), y.double()
        logit = (outputs + dispersion.log()).double()
        by_outputs = y64 * torch.sigmoid(-logit) - r * torch.sigmoid(logit)
        if self.dispersion is not None:
            return by_outputs.to(outputs.dtype), {}
        ways = torch.digamma(y64 + r) - torch.digamma(r)
        by_log = by_outputs + r * (F.softplus(logit) - ways)  # (..., n, out)
        return by_outputs.to(outputs.dtype), {
            "dispersion": over_rows(by_log, dispersion).to(outputs.dtype)
        }

    @property
    def has_fisher_factor(self) -> bool:
        """Only for a fixed dispersion: the information on a learned one is an infinite sum without
        a closed form.
        """
        return self.dispersion is not None

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T the Fisher information of a row's outputs, for a fixed dispersion."""
        if self.dispersion is None:
            raise self._lack("fisher_factor")
        dispersion = dispersion_of(self.dispersion, outputs, parameters)
        # mean / (1 + dispersion * mean)
        information = torch.sigmoid(outputs + dispersion.log()) / dispersion
        return torch.diag_embed(information.sqrt()), {}

    def mean(self, outputs: Tensor, parameters: Parameters = None) -> Tensor:
        """Return the mean of y, ``(..., n, out)``."""
        return outputs.exp()

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, out)``."""
        mean = outputs.exp()
        return mean + dispersion_of(self.dispersion, outputs, parameters) * mean * mean

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, out)``; not differentiable."""
        dispersion = dispersion_of(self.dispersion, outputs, parameters)
        success = torch.sigmoid(-(outputs + dispersion.log()))
        inside = by_scipy(
            special.betainc, 1 / dispersion, y.floor().clamp(min=0) + 1, success
        )
        return torch.where(y < 0, 0.0, inside)

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, out)``."""
        r = (1 / dispersion_of(self.dispersion, outputs, parameters)).expand_as(outputs)
        with isolated(generator):
            rate = outputs.exp() * td.Gamma(r, r).sample()
        return _poisson(rate, generator)


@dataclass(frozen=True)
class Levels(Likelihood):
    """Whole numbers of which there are few, such as marks: a regression on `Ordinal` classes, or
    `Bernoulli` ones if there are two.

    Args:
        levels: the values that a target can take, whole numbers in ascending order.

    Raises:
        ValueError: if levels are not like that.
    """

    levels: tuple[float, ...]
    classes: Ordinal | Bernoulli = field(init=False, repr=False)
    kind: Kind = field(default="regression", init=False)
    discrete: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        levels = numbers("levels", self.levels)
        ascending = all(low < high for low, high in itertools.pairwise(levels))
        if len(levels) < 2 or not ascending or any(level != level // 1 for level in levels):
            raise ValueError(
                f"levels must be two or more whole numbers in ascending order, got {levels}"
            )
        object.__setattr__(self, "levels", levels)
        two = len(levels) == 2
        object.__setattr__(self, "classes", Bernoulli() if two else Ordinal(len(levels)))

    @property
    def parameters(self) -> dict[str, Distribution]:
        """The gaps between cutpoints, ``(levels - 2,)``."""
        return self.classes.parameters

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, 1)``."""
        if n_outputs != 1:
            raise ValueError(f"Levels needs a network with one output, got {n_outputs}")
        y = real_targets(y, 1)
        other = (y != self._values(y)).all(-1).nonzero().flatten()
        if len(other):
            row = int(other[0])
            raise ValueError(f"y in row {row} is {float(y[row]):g}, none of the levels")
        return y

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``."""
        return self.classes.log_prob(outputs, self.labels(y), parameters)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the output and by the log gaps (summed over rows)."""
        return self.classes.score(outputs, self.labels(y), parameters)

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return that of the classes."""
        return self.classes.fisher_factor(outputs, parameters)

    def mean(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the mean of y, ``(..., n, 1)``."""
        probs = self.classes.mean(outputs, parameters)
        return (probs * self._values(probs)).sum(-1, keepdim=True)

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, 1)``."""
        probs, mean = self.classes.mean(outputs, parameters), self.mean(outputs, parameters)
        return (probs * (self._values(probs) - mean).square()).sum(-1, keepdim=True)

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, 1)``."""
        probs = self.classes.mean(outputs, parameters)
        return (probs * (self._values(probs) <= y)).sum(-1, keepdim=True)

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, 1)``."""
        probs = self.classes.mean(outputs, parameters)
        index = torch.multinomial(probs.flatten(0, -2), 1, generator=generator)
        return self._values(probs)[index].reshape(outputs.shape)

    def labels(self, y: Tensor) -> Tensor:
        """Return which levels targets are, ``(..., n, 1) -> (..., n)``."""
        return torch.searchsorted(self._values(y), y.squeeze(-1).contiguous())

    def _values(self, like: Tensor) -> Tensor:
        return torch.tensor(self.levels, dtype=like.dtype, device=like.device)
