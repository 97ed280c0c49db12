"""A model's posterior, or one tempered between it and the prior, as chains move in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bnnflow.compiled import key_of
from bnnflow.dynamics import MINIMAL_NORM, Point, Scheme, Target
from bnnflow.model.fused import FusedDensity, weights_of

if TYPE_CHECKING:
    from bnnflow.model.log_joint import LogJoint

__all__ = ["PosteriorTarget"]

# Multiplications between two looks for an interrupt: about a tenth of a second.
_UNBROKEN = 1_000_000_000


class PosteriorTarget(Target):
    """A weighted sum of a model's log likelihood and log prior, with compiled steps where there
    are such; nothing follows derivatives.

    Args:
        density: the model's.
        likelihood_weight: one for all chains, or ``(chain,)``.
        prior_weight: likewise.
    """

    def __init__(
        self,
        density: LogJoint,
        likelihood_weight: float | Tensor,
        prior_weight: float | Tensor,
    ) -> None:
        self._density = density
        if isinstance(likelihood_weight, Tensor) or isinstance(prior_weight, Tensor):
            both = (likelihood_weight, prior_weight)
            columns = [torch.as_tensor(each, dtype=torch.float64) for each in both]
            self._weights = torch.stack(torch.broadcast_tensors(*columns), 1)
        else:
            self._weights = weights_of(float(likelihood_weight), float(prior_weight))

    @torch.no_grad()
    def __call__(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum and its gradient at ``(chain, dim)``."""
        return self._density.weighted_and_grad(theta, self._weights)

    def of_chains(self, some: Tensor) -> PosteriorTarget:
        """Return the target of some of the chains, with their own weights."""
        if len(self._weights) == 1:
            return self
        return PosteriorTarget(self._density, *self._weights[some].unbind(1))

    def hamiltonian(
        self, point: Point, time: Tensor, scale: Tensor, scheme: Scheme
    ) -> Point:
        """Follow Hamiltonian dynamics; see `Target.hamiltonian`."""
        fused = self._compiled(point, time, scale)
        if fused is None:
            with torch.no_grad():
                return super().hamiltonian(point, time, scale, scheme)
        for part in _parts(scheme, self._most(point)):
            point, _ = fused.follow(point, time, scale, part, self._weights)
        return point

    def microcanonical(
        self, point: Point, time: Tensor, scale: Tensor, scheme: Scheme
    ) -> tuple[Point, Tensor]:
        """Follow microcanonical dynamics; see `Target.microcanonical`."""
        fused = self._compiled(point, time, scale)
        if fused is None:
            with torch.no_grad():
                return super().microcanonical(point, time, scale, scheme)
        errors = []
        for part in _parts(scheme, self._most(point)):
            point, error = fused.follow(
                point, time, scale, part, self._weights, microcanonical=True
            )
            errors.append(error[0])
        return point, torch.stack(errors).sum(0)

    def langevin(
        self,
        point: Point,
        time: Tensor,
        scale: Tensor,
        share: float,
        steps: int,
        generator: torch.Generator,
    ) -> tuple[Point, Tensor]:
        """Make steps of microcanonical Langevin dynamics; see `Target.langevin`."""
        fused = self._compiled(point, time, scale)
        if fused is None:
            with torch.no_grad():
                return super().langevin(point, time, scale, share, steps, generator)
        keys, errors = [key_of(generator) for _ in range(steps)], []
        most = max(1, self._most(point) // MINIMAL_NORM.drift.shape[-1])
        for start in range(0, steps, most):
            point, error = fused.follow(
                point, time, scale, MINIMAL_NORM, self._weights,
                microcanonical=True, keys=keys[start : start + most], share=share,
            )  # fmt: skip
            errors.append(error)
        return point, torch.cat(errors)

    def _compiled(self, point: Point, time: Tensor, scale: Tensor) -> FusedDensity | None:
        """Return the compiled density if it does all that is asked."""
        with torch.no_grad():
            fused = self._density.compiled(point.theta, None)
        if fused is None or fused.added_prior is not None:
            return None
        ours = all(
            each.dtype == self._density.dtype for each in (point.velocity, point.grad)
        )
        ours = ours and scale.dtype == self._density.dtype and scale.is_cpu and time.is_cpu
        return fused if ours else None

    def _most(self, point: Point) -> int:
        """Return how many gradients may be computed between two looks for an interrupt."""
        each = point.theta.numel() * len(self._density.x)
        return max(1, _UNBROKEN // max(1, each))


def _parts(scheme: Scheme, most: int) -> list[Scheme]:
    """Cut a scheme into such of at most so many drifts; the kick between two belongs to the first
    of them.
    """
    kick, drift = scheme
    parts = [scheme]
    if drift.shape[-1] > most:
        ends = zip(kick[..., 1:].split(most, -1), drift.split(most, -1), strict=True)
        none = torch.zeros_like(kick[..., :1])
        parts = [Scheme(torch.cat([none, kicks], -1), drifts) for kicks, drifts in ends]
        parts[0].kick[..., 0] = kick[..., 0]
    return parts
