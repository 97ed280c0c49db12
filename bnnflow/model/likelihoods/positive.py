"""Likelihoods of positive numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from bnnflow.arguments import number, settle
from bnnflow.model.likelihood import Kind, Likelihood, Score, real_targets
from bnnflow.model.likelihoods.shared import (
    Parameters,
    check_owners,
    dispersion_of,
    half_normal,
    over_rows,
    positive_targets,
)
from bnnflow.seeding import isolated

__all__ = ["Gamma"]


@dataclass(frozen=True)
class Gamma(Likelihood):
    """Positive targets with mean m = exp(outputs) and variance dispersion * m^2.

    y is Gamma(a, a / m) with a = 1 / dispersion (McCullagh and Nelder 1989).

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

    def __post_init__(self) -> None:
        settle(self, number, "dispersion", above=0)

    @property
    def parameters(self) -> dict[str, Distribution]:
        """The dispersion, if it is learned."""
        return {} if self.dispersion is not None else {"dispersion": self.dispersion_prior}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return y as ``(n, out)``."""
        check_owners(self.parameters, n_outputs)
        return positive_targets(real_targets(y, n_outputs))

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return ``(..., n)``, summed over targets."""
        # Differences of large terms as the dispersion vanishes: they want float64.
        a = 1 / dispersion_of(self.dispersion, outputs, parameters).double()
        y64, log_mean = y.double(), outputs.double()
        log_ratio = y64.log() - log_mean
        log_prob = a * (a.log() + log_ratio - log_ratio.exp()) - torch.lgamma(a) - y64.log()
        return log_prob.sum(-1).to(outputs.dtype)

    def score(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Score:
        """Return the gradient by the outputs and by log dispersion (summed over rows)."""
        dispersion = dispersion_of(self.dispersion, outputs, parameters)
        a, log_ratio = 1 / dispersion.double(), y.double().log() - outputs.double()
        excess = torch.expm1(log_ratio)  # y / m - 1
        by_outputs = (a * excess).to(outputs.dtype)
        if self.dispersion is not None:
            return by_outputs, {}
        by_log = a * (excess - log_ratio - a.log() + torch.digamma(a))
        return by_outputs, {"dispersion": over_rows(by_log, dispersion).to(outputs.dtype)}

    def fisher_factor(
        self, outputs: Tensor, parameters: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R with R R^T the Fisher information of a row's outputs, and that of log dispersion
        over all rows.
        """
        dispersion = dispersion_of(self.dispersion, outputs, parameters)
        factor = torch.diag_embed(dispersion.rsqrt().expand_as(outputs))
        if self.dispersion is not None:
            return factor, {}
        a = 1 / dispersion.double()
        each = a * (a * torch.polygamma(1, a) - 1)  # (..., 1, 1 or out)
        total = over_rows(each.expand(outputs.shape), dispersion)
        return factor, {"dispersion": total.to(outputs.dtype)}

    def mean(self, outputs: Tensor, parameters: Parameters = None) -> Tensor:
        """Return the mean of y, ``(..., n, out)``."""
        return outputs.exp()

    def variance(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the variance of y given the weights, ``(..., n, out)``."""
        return dispersion_of(self.dispersion, outputs, parameters) * (2 * outputs).exp()

    def cdf(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return P(target <= y) given the weights, ``(..., n, out)``; not differentiable."""
        a = (1 / dispersion_of(self.dispersion, outputs, parameters)).expand_as(outputs)
        return torch.special.gammainc(a, a * y.clamp(min=0) / outputs.exp())

    def sample(
        self, outputs: Tensor, parameters: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Draw y given the weights, ``(..., n, out)``."""
        a = (1 / dispersion_of(self.dispersion, outputs, parameters)).expand_as(outputs)
        with isolated(generator):
            return outputs.exp() * td.Gamma(a, a).sample()
