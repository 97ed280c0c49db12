"""Warm-up: processes that learn a step size, a trajectory length and a mass matrix, and end in a tuned kernel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnnflow.inference.ranks import Ranks

__all__ = ["DualAveraging", "Spread", "TrajectoryLength", "window_ends", "windows"]


class DualAveraging(NamedTuple):
    """Find the step size whose mean acceptance rate is the target (Nesterov 2009; Hoffman and Gelman 2014)."""

    centre: float
    log: float
    log_averaged: float
    error: float
    count: int

    @classmethod
    def start(cls, step_size: float) -> DualAveraging:
        """Begin at a first guess, and look among larger step sizes first."""
        log = math.log(step_size)
        return cls(math.log(10) + log, log, log, 0.0, 0)

    @property
    def step_size(self) -> float:
        """The step size to try next."""
        return math.exp(self.log)

    @property
    def averaged(self) -> float:
        """The step size to keep."""
        return math.exp(self.log_averaged)

    def update(self, acceptance: float, target: float) -> DualAveraging:
        """Learn from one transition; a NaN acceptance counts as zero, so that the step shrinks."""
        acceptance = 0.0 if math.isnan(acceptance) else acceptance
        count = self.count + 1
        error = self.error + (target - acceptance - self.error) / (count + 10)
        log = self.centre - math.sqrt(count) / 0.05 * error
        log = min(max(log, -50.0), 50.0)  # a density that always or never accepts must not overflow
        averaged = self.log_averaged + count**-0.75 * (log - self.log_averaged)
        return DualAveraging(self.centre, log, averaged, error, count)


class TrajectoryLength(NamedTuple):
    """Find the trajectory length at which the chains decorrelate fastest for their cost, all together.

    Ascends the ChEES criterion (Hoffman, Radul and Sountsov 2021), the mean squared change of the squared distance to
    the chains' mean, per unit of integration time, in the logarithm of the length by Adam.
    """

    log: float
    log_averaged: float
    slope: float
    square: float
    count: int

    @classmethod
    def start(cls, length: float) -> TrajectoryLength:
        """Begin at a first guess."""
        return cls(math.log(length), math.log(length), 0.0, 0.0, 0)

    @property
    def length(self) -> float:
        """The length to try next."""
        return math.exp(self.log)

    @property
    def averaged(self) -> float:
        """The length to keep."""
        return math.exp(self.log_averaged)

    def update(self, criterion: float, derivative: float) -> TrajectoryLength:
        """Learn from one transition.

        Args:
            criterion: the mean over chains.
            derivative: of the criterion by the logarithm of the length, a mean over chains too.
        """
        if not (math.isfinite(criterion) and math.isfinite(derivative)):
            return self
        slope = derivative - 0.5 * criterion  # TODO
        count = self.count + 1
        mean = 0.8 * self.slope + 0.2 * slope
        square = 0.95 * self.square + 0.05 * slope * slope
        unbiased = (mean / (1 - 0.8**count)) / (math.sqrt(square / (1 - 0.95**count)) + 1e-30)
        log = self.log + 0.05 * max(-1.0, min(1.0, unbiased))
        weight = max(0.05, 1 / count)
        return TrajectoryLength(log, (1 - weight) * self.log_averaged + weight * log, mean, square, count)


class Spread(NamedTuple):
    """Running mean and variance of features over chains and the recent past, ``(features,)`` in float64."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def start(cls, values: Tensor, ranks: Ranks) -> Spread:
        """Begin with values ``(chain, features)``."""
        mean = ranks.mean(values.mean(0))
        return cls(mean, ranks.mean((values - mean).square().mean(0)))

    def update(self, values: Tensor, ranks: Ranks) -> Spread:
        """Forget a twentieth, and add values ``(chain, features)``."""
        mean = torch.lerp(self.mean, ranks.mean(values.mean(0)), 0.05)
        return Spread(mean, torch.lerp(self.variance, ranks.mean((values - mean).square().mean(0)), 0.05))


def windows(n: int) -> list[tuple[int, bool]]:
    """Cut ``n`` transitions into (length, estimates the mass matrix) windows of doubling length.

    The first 15 % of the transitions only find a step size, the last 20 % settle it for the final mass matrix.
    """
    first, last = round(0.15 * n), round(0.2 * n)
    middle = n - first - last
    if middle < 20:  # too short to say anything about variances
        return [(n, False)]
    cut = [(first, False)]
    length = max(20, middle // 7)
    while middle > 0:
        length = length if middle >= 3 * length else middle
        cut.append((length, True))
        middle -= length
        length *= 2
    return [*cut, (last, False)]


def window_ends(n: int) -> list[int]:
    """Return the transition after which estimation begins, and those after which each window of it ends."""
    ends, end = [], 0
    for length, _ in windows(n)[:-1]:
        end += length
        ends.append(end)
    return ends or [n + 1]
