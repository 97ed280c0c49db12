"""The types that travel between packages: protocols and literals, no logic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = [
    "AdaptiveRule",
    "Architecture",
    "CorrectionMethod",
    "FixedRule",
    "Kernel",
    "LikelihoodMembers",
    "LogDensity",
    "LogDensityAndGrad",
    "Noise",
    "Optimiser",
    "Parametrisation",
    "Posterior",
    "Rule",
    "Schedule",
    "Seed",
    "StochasticRule",
    "Trace",
]

LogDensity = Callable[[Tensor], Tensor]
"""``(..., dim) -> (...)``, float64."""

LogDensityAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``(..., dim) -> (...), (..., dim)``."""

Seed = int | torch.Generator

Trace = Literal["exact", "hutchinson", "hutch++"]
Noise = Literal["rademacher", "gaussian"]
FixedRule = Literal["euler", "midpoint", "rk4"]
AdaptiveRule = Literal["dopri5", "dopri8", "bosh3", "adaptive_heun"]
Rule = FixedRule | AdaptiveRule
StochasticRule = Literal["euler", "midpoint"]
Parametrisation = Literal["velocity", "x1"]
Architecture = Literal["dws", "signed", "graph"]
Optimiser = Literal["muon", "adamw"]
Schedule = Literal["linear", "variance_preserving"]
CorrectionMethod = Literal[
    "auto", "importance", "defensive", "resample", "refine", "smc", "metropolis", "neutra"
]


class Kernel(NamedTuple):
    """A Markov kernel over batches of chains.

    ``init(theta, generator) -> state`` and ``step(state, generator) -> (state, info)``; every field
    of a state and of an info has the chains as its leading axis.
    """

    init: Callable[[Tensor, torch.Generator], Any]
    step: Callable[[Any, torch.Generator], tuple[Any, Any]]


class Posterior(Protocol):
    """A normalised distribution over weight space."""

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw ``(n, dim)``."""
        ...

    def log_prob(self, theta: Tensor) -> Tensor:
        """Evaluate the normalised log density, ``(..., dim) -> (...)``."""
        ...


class LikelihoodMembers(Protocol):
    """What an object must have to be taken for a likelihood: see
    `bnnflow.likelihoods.Likelihood`.
    """

    @property
    def kind(self) -> Literal["regression", "classification"]:
        """Whether targets are numbers or classes."""
        ...

    @property
    def parameters(self) -> dict[str, Distribution]:
        """Return the prior of every learned parameter.

        Its batch shape is the parameter's, ``(1,)`` for a scalar.
        """
        ...

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        """Return ``y`` in the shape and dtype that ``log_prob`` wants, or raise ``ValueError``."""
        ...

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the log density of every row, ``(..., n, out) -> (..., n)``.

        ``y`` is what ``validate`` returned, or has an axis in front when every network has a
        mini-batch of its own; parameters are ``(..., *shape)``.
        """
        ...

    def mean(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Return the predictive mean given the weights; for classes, their probabilities."""
        ...
