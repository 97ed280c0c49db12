"""Step sizes over time for stochastic-gradient samplers.

A schedule says for every step, counted from the first after warm-up, which fraction of the step
size it takes and whether the chain samples or explores. It knows steps only, never how many draws
were asked for, so that a finished run can be extended. The fraction is one of the learning rate:
Langevin methods multiply their step size by it, methods with momentum, whose step size is a square
root of a learning rate, by its square root.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from bnnflow.arguments import integer, number, settle

__all__ = ["Constant", "Cyclical", "Polynomial", "Schedule", "Stage"]


class Stage(NamedTuple):
    """What a schedule asks of one step."""

    scale: float
    """Fraction of the learning rate."""
    sampling: bool
    """Whether noise is added and draws may be kept.

    Otherwise the step goes downhill without noise.
    """


class Schedule(Protocol):
    """A function of the number of steps made so far; it must sample again and again."""

    @property
    def kept_scale(self) -> float:
        """Return the largest scale at which draws are kept."""
        ...

    def __call__(self, step: int) -> Stage:
        """Return what step number ``step``, from 0, is like."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same step size throughout: a stationary chain with a fixed bias."""

    kept_scale = 1.0

    def __call__(self, step: int) -> Stage:
        """Return the full scale."""
        return Stage(1.0, True)


@dataclass(frozen=True)
class Polynomial:
    """Decrease the learning rate as (1 + k / delay) ** -power, which is a (b + k) ** -gamma
    (Welling and Teh 2011).

    There b is ``delay``, gamma ``power`` and a the first step size times b ** gamma. For powers in
    (0, 1] the step sizes sum to infinity, and averages over draws converge to the posterior's, at
    best as K ** (-1 / 3) for power 1 / 3 (Teh, Thiery and Vollmer 2016). Draws count equally: for
    powers below 1 that is consistent too (Lamberton and Pages 2002), later draws having less bias
    and more correlation. The weights of Welling and Teh, for those who want them, are
    ``stats["step_size"]`` up to a constant.

    Args:
        delay: steps after which the decay sets in.
        power: of the decay, in (0, 1].
    """

    delay: float = 1000.0
    power: float = 1 / 3
    kept_scale = 1.0

    def __post_init__(self) -> None:
        settle(self, number, "delay", above=0)
        settle(self, number, "power", above=0, most=1)  # beyond 1 the chain comes to rest

    def __call__(self, step: int) -> Stage:
        """Return the decayed scale."""
        return Stage((1 + step / self.delay) ** -self.power, True)


@dataclass(frozen=True)
class Cyclical:
    """Restart the step size in cycles (Zhang et al. 2020), so that a chain visits several modes.

    Step k of a cycle has the scale (1 + cos(pi k / length)) / 2. The first ``exploration`` of a
    cycle descends without noise, in long steps, to another mode; the rest samples there. Draws are
    kept from sampling only: the transition that reaches a cycle's end makes the whole exploration
    of the next before it goes on, so that every draw, the first included, follows sampling steps.
    As in the paper modes are found, not weighted: how often each is visited is no estimate of its
    mass. Without noise a chain ends near a mode, and sampling must last long enough to warm it up
    again: draws of short cycles are too cold, which their ``configurational_temperature`` shows.

    Args:
        length: steps of a cycle.
        exploration: fraction of it without noise.
    """

    length: int = 5000
    exploration: float = 0.25

    def __post_init__(self) -> None:
        settle(self, integer, "length", least=1)
        settle(self, number, "exploration", least=0, below=1)
        if self._explored >= self.length:
            raise ValueError(
                f"no step of {self.length} is left to sample after exploration={self.exploration}"
            )

    @property
    def _explored(self) -> int:
        return round(self.exploration * self.length)

    @property
    def kept_scale(self) -> float:
        """Return the scale where sampling begins."""
        return self(self._explored).scale

    def __call__(self, step: int) -> Stage:
        """Return the scale on the cosine, and the stage."""
        k = step % self.length
        return Stage(0.5 * (1 + math.cos(math.pi * k / self.length)), k >= self._explored)
