"""The map of a flow from normal points to weights, as the prior of a model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bnnflow.transport.field import Field
from bnnflow.transport.solvers import step
from bnnflow.transport.source import Source
from bnnflow.types import FixedRule
from bnnflow.weights import NO_SYMMETRY, Symmetries, WeightSpec

__all__ = ["Pushforward"]


@dataclass(frozen=True, eq=False)
class Pushforward:
    """weights = T(z): a field followed in fixed steps, so that T is one smooth map of each point.

    Nothing is learned, and what is not finite stays so, as in a trajectory that diverges. See
    `BayesianModel.transported`.

    Attributes:
        velocity: the field, in evaluation mode, its parameters constant.
        source: the law at t = 0.
        spec: the meaning of the weights.
        times: of the steps, ``(steps + 1,)``.
        rule: of a step.
    """

    velocity: Field
    source: Source
    spec: WeightSpec
    times: Tensor
    rule: FixedRule

    @classmethod
    def of(
        cls,
        velocity: Field,
        source: Source,
        spec: WeightSpec,
        times: Tensor,
        rule: FixedRule,
    ) -> Pushforward:
        """Copy a field and make it constant.

        Raises:
            ValueError: if it looks at data.
        """
        if velocity.informed:
            raise ValueError(
                "flow looks at the data of a posterior, which a prior must not: fit one with a "
                "WeightsVelocity"
            )
        constant = copy.deepcopy(velocity).requires_grad_(False).eval()
        return cls(constant, source, spec, times, rule)

    @property
    def symmetries(self) -> Symmetries:
        """The symmetries that the map is equivariant to, as far as they are known."""
        known = self.velocity.symmetries if self.source.exchangeable else None
        return NO_SYMMETRY if known is None else known

    @property
    def identity(self) -> Any:
        """What tells the map from others."""
        source = (self.source.prior.identity(), self.source.loc, self.source.root)
        return self.velocity, source, self.times, self.rule

    def forward(self, z: Tensor) -> Tensor:
        """Carry points ``(n, dim)`` to weights; differentiable."""
        state = (z,)
        for start, stop in pairwise(self.times):
            state = step(self._slope, start, stop - start, state, self.rule)
        return self.source.from_normal(state[0])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Pushforward:
        """Return the same map on another device or in another floating-point type."""
        return replace(
            self,
            velocity=copy.deepcopy(self.velocity).to(device, dtype),
            source=self.source.to(device, dtype),
            times=self.times.to(device),
        )

    def _slope(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.velocity(t, state[0]),)
