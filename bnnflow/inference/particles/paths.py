"""Paths of densities: from the prior, or a start, to the posterior, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bnnflow.model import BayesianModel
from bnnflow.types import LogDensityAndGrad, Posterior

__all__ = ["Backwards", "Ends", "FromPrior", "FromStart", "Path"]

Ends = tuple[Tensor, Tensor, Tensor, Tensor]
"""Value ``(particle,)`` and gradient ``(particle, dim)`` of the log density at the first end, and
both at the last.
"""


class Path(ABC):
    """Between two densities, geometrically: first^(1 - b) last^b, for b from 0 to 1.

    Args:
        chunk_size: particles that are evaluated together, which bounds the memory.
    """

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    @property
    def cost(self) -> float:
        """Gradients of the last density that an evaluation costs."""
        return 1.0

    @abstractmethod
    def at(self, theta: Tensor) -> Ends:
        """Evaluate both ends at ``(particle, dim)``."""

    def ends(self, theta: Tensor) -> Ends:
        """Evaluate both ends at ``(particle, dim)``, in chunks."""
        parts = [self.at(rows) for rows in theta.split(self.chunk_size)]
        first, first_grad, last, last_grad = (
            torch.cat(values) for values in zip(*parts, strict=True)
        )
        return first, first_grad, last, last_grad

    def __call__(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log densities of both ends at ``(run, particle, dim)``, ``(run, particle)``
        each.
        """
        log_first, _, log_last, _ = self.ends(theta.flatten(0, 1))
        return log_first.reshape(theta.shape[:2]), log_last.reshape(theta.shape[:2])

    def tempered(self, fraction: Tensor, remainder: Tensor) -> LogDensityAndGrad:
        """Return the density at fractions ``(particle,)`` of the way, one of its own for every
        particle.

        ``remainder`` is one less the fraction, and known better near the end: the first density may
        be so steep that the last digits of that matter.
        """

        def target(theta: Tensor) -> tuple[Tensor, Tensor]:
            log_first, first_grad, log_last, last_grad = self.ends(theta)
            near, far = (
                part[:, None].to(last_grad.dtype) for part in (remainder, fraction)
            )
            return (
                remainder * log_first + fraction * log_last,
                near * first_grad + far * last_grad,
            )

        return target


class FromPrior(Path):
    """From the prior to the posterior."""

    def __init__(self, model: BayesianModel, chunk_size: int) -> None:
        super().__init__(chunk_size)
        self.model = model

    @torch.no_grad()
    def at(self, theta: Tensor) -> Ends:
        """Evaluate both ends at ``(particle, dim)``."""
        model = self.model
        prior, prior_grad = model.flat_prior.log_prob_and_grad(theta)
        likelihood, grad = model.log_likelihood_and_grad(theta)
        return (
            prior,
            prior_grad,
            (prior + likelihood) / model.temperature,
            (prior_grad + grad) / model.temperature,
        )


class FromStart(Path):
    """From a density of one's own to the posterior."""

    def __init__(self, model: BayesianModel, start: Posterior, chunk_size: int) -> None:
        super().__init__(chunk_size)
        self.model, self.start = model, start

    def at(self, theta: Tensor) -> Ends:
        """Evaluate both ends at ``(particle, dim)``."""
        with torch.no_grad():
            log_joint, grad = self.model.log_joint_and_grad(theta)
        with torch.enable_grad():
            at = theta.detach().requires_grad_()
            value = self.start.log_prob(at)
            (start_grad,) = torch.autograd.grad(value.sum(), at)
        return value.detach().double(), start_grad, log_joint, grad


class Backwards(Path):
    """A path the other way round."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.chunk_size)
        self.path = path

    def at(self, theta: Tensor) -> Ends:
        """Evaluate both ends at ``(particle, dim)``."""
        first, first_grad, last, last_grad = self.path.at(theta)
        return last, last_grad, first, first_grad
