"""Warm-up: processes that learn a step size, a trajectory length and a mass matrix, and end in a
tuned kernel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DualAveraging", "TrajectoryLength", "followed", "window_ends", "windows"]


def followed(
    step_size: float, acceptance: float, target: float, gain: float = 1.0
) -> float:
    """Return a step size that follows the mean acceptance rate of many chains towards its target.

    With hundreds of chains one transition tells the rate, and no average over time is needed.
    """
    return step_size * math.exp(gain * (acceptance - target))


class DualAveraging(NamedTuple):
    """Find the step size whose mean acceptance rate is the target (Nesterov 2009; Hoffman and
    Gelman 2014).
    """

    centre: float
    log: float
    log_averaged: float
    error: float
    updates: int

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
        count = self.updates + 1
        error = self.error + (target - acceptance - self.error) / (count + 10)
        log = self.centre - math.sqrt(count) / 0.05 * error
        # a density that always or never accepts must not overflow
        log = min(max(log, -50.0), 50.0)
        averaged = self.log_averaged + count**-0.75 * (log - self.log_averaged)
        return DualAveraging(self.centre, log, averaged, error, count)


class TrajectoryLength(NamedTuple):
    """Find the trajectory length with which the chains move farthest for its cost, all together.

    Tries neighbours of the best length so far, on a grid of factors sqrt(2) that begins at the
    first guess, and compares the mean squared jumps of some features, their geometric mean, divided
    by the square root of the length: half-way between most movement a transition and most movement
    a gradient. ChEES (Hoffman, Radul and Sountsov 2021) instead follows the derivative of a
    criterion along the trajectory, whose noise grows with the frequencies of a stiff posterior.
    Lengths below the guess are not tried: jumps tell nothing of what is so slow that it hardly
    moves.
    """

    shortest: float
    best: int
    tried: Tensor  # (lengths,), transitions, of which old ones count less
    jump: Tensor  # (lengths, features), sums over them of the mean squared jump

    @classmethod
    def start(cls, length: float, features: Tensor) -> TrajectoryLength:
        """Begin at a first guess; ``features`` ``(chain, features)`` are those that will jump."""
        nothing = torch.zeros(_LENGTHS, dtype=torch.float64, device=features.device)
        return cls(length, 0, nothing, nothing.unsqueeze(1).repeat(1, features.shape[1]))

    @property
    def length(self) -> float:
        """The length to keep."""
        return self._of(self.best)

    def _of(self, number: int) -> float:
        return self.shortest * 2 ** (0.5 * number)

    def candidate(self, longest: float, generator: torch.Generator) -> tuple[int, float]:
        """Return the number and the length of what to try next, no longer than ``longest`` if there
        is a choice.
        """
        number = self.best + int(
            torch.randint(-1, 2, (), generator=generator, device=generator.device)
        )
        number = min(max(number, 0), _LENGTHS - 1)
        while number > 0 and self._of(number) > longest:
            number -= 1
        return number, self._of(number)

    def update(self, number: int, jump: Tensor) -> TrajectoryLength:
        """Learn from one transition: the mean squared jump of every feature at the length of that
        number.
        """
        tried, total = 0.99 * self.tried, 0.99 * self.jump
        tried[number] += 1
        total[number] += jump
        # A length is judged once it has been tried a few times; until then the best stays.
        judged = (tried > 2.5) & (total > 0).all(1)
        gain = (total / tried[:, None]).log().mean(1) - 0.25 * math.log(2) * torch.arange(
            _LENGTHS
        ).to(tried)
        best = (
            int(torch.where(judged, gain, -math.inf).argmax())
            if bool(judged.any())
            else self.best
        )
        return TrajectoryLength(self.shortest, best, tried, total)


_LENGTHS = 9  # up to sixteen times the first guess


def windows(n: int) -> list[tuple[int, bool]]:
    """Cut ``n`` transitions into (length, estimates the mass matrix) windows of doubling length.

    The first 15% of the transitions only find a step size, the last 20% settle it for the final
    mass matrix.
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
    """Return the transition after which estimation begins, and those after which each window of it
    ends.
    """
    ends, end = [], 0
    for length, _ in windows(n)[:-1]:
        end += length
        ends.append(end)
    return ends or [n + 1]
