"""Paths of pairs: where a pair is at time t, and how velocity, score and the estimates of its ends
are converted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnnflow.arguments import NonNegative, checked
from bnnflow.types import Schedule

__all__ = ["AffinePath", "Coefficients", "ProbabilityPath"]


class ProbabilityPath(ABC):
    """How a pair travels."""

    @abstractmethod
    def point(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return where each pair is at its time and its velocity there, ``(batch, dim)`` both, for
        t ``(batch,)``.
        """

    def loss_weight(self, t: Tensor) -> Tensor | None:
        """Return what squared errors at t count in training, in the shape of ``t``.

        None: the field decides.
        """
        return None


class Coefficients(NamedTuple):
    """x_t = a x0 + b x1, and the derivatives by t; each in the shape of t."""

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor

    @property
    def q(self) -> Tensor:
        """Variance of x_t when both ends are standard normal and independent."""
        return self.a * self.a + self.b * self.b

    @property
    def wronskian(self) -> Tensor:
        """The determinant a b' - a' b, which is nowhere zero."""
        return self.a * self.db - self.da * self.b

    @property
    def drift(self) -> Tensor:
        """The field of independent standard normal ends is ``drift * x``."""
        return (self.a * self.da + self.b * self.db) / self.q

    @property
    def score_gain(self) -> Tensor:
        """With x1 ~ N(0, I) exp(u) the marginal field is
        ``drift * x + score_gain * E[grad u(x1) | x_t]``.
        """
        return self.a * self.wronskian / self.q


@checked
@dataclass(frozen=True)
class AffinePath(ProbabilityPath):
    """x_t = a(t) x0 + b(t) x1 + sigma * noise, from t = 0 to t = 1.

    All conversions are for a source x0 ~ N(0, I) that is independent of x1, and ``sigma`` = 0
    (Lipman et al. 2023; Albergo, Boffi and Vanden-Eijnden 2023).

    Args:
        schedule: ``"linear"``, a = 1 - t and b = t: straight pairs at constant speed.
            ``"variance_preserving"``, a = cos(pi t / 2) and b = sin(pi t / 2): the path of a
            diffusion (Nichol and Dhariwal 2021), on which standard normal ends give a standard
            normal x_t.
        sigma: standard deviation of noise on the path. It blurs *both* ends: the law at t = 0 is
            then no longer the source and that at t = 1 not the target, so that a density which
            starts from the source is wrong by it.

    Raises:
        ValueError: for an unknown schedule or a negative sigma.
    """

    schedule: Schedule = "linear"
    sigma: NonNegative = 0.0

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients at times of any shape."""
        if self.schedule == "linear":
            one = torch.ones_like(t)
            return Coefficients(1 - t, t, -one, one)
        angle = 0.5 * math.pi * t
        a, b = angle.cos(), angle.sin()
        return Coefficients(a, b, -0.5 * math.pi * b, 0.5 * math.pi * a)

    def point(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return where each pair is at its time and its velocity there, ``(batch, dim)`` both, for
        t ``(batch,)``.
        """
        a, b, da, db = self.coefficients(t.unsqueeze(-1))
        x = a * x0 + b * x1
        if self.sigma:
            x = x + self.sigma * torch.randn(
                x.shape, generator=generator, device=x.device, dtype=x.dtype
            )
        return x, da * x0 + db * x1

    def ends(self, t: Tensor, x: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[x0 | x_t] and E[x1 | x_t] of the marginal field, finite at all times."""
        c = self.coefficients(_column(t))
        return (c.db * x - c.b * velocity) / c.wronskian, (
            c.a * velocity - c.da * x
        ) / c.wronskian

    def velocity_of_x1(self, t: Tensor, x: Tensor, x1: Tensor) -> Tensor:
        """Return the marginal field of E[x1 | x_t].

        (x1 - x) / (1 - t) on the linear path, singular at t = 1.
        """
        c = self.coefficients(_column(t))
        return (c.da * x + c.wronskian * x1) / c.a

    def score(self, t: Tensor, x: Tensor, velocity: Tensor) -> Tensor:
        """Return grad log p_t of the marginal field; -E[x0 | x_t] / a, singular at t = 1."""
        c = self.coefficients(_column(t))
        return (c.b * velocity - c.db * x) / (c.a * c.wronskian)

    def velocity_of_score(self, t: Tensor, x: Tensor, score: Tensor) -> Tensor:
        """Return the marginal field of grad log p_t.

        Singular at t = 0, where the score tells nothing of the target.
        """
        c = self.coefficients(_column(t))
        return (c.a * c.wronskian * score + c.db * x) / c.b

    def describe(self) -> dict[str, Any]:
        """Return plain values from which the path is rebuilt."""
        return {"schedule": self.schedule, "sigma": self.sigma}


def _column(t: Tensor) -> Tensor:
    return t if t.dim() == 0 else t.unsqueeze(-1)
