"""Warm-up: functions that take a family of kernels and return a tuned one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bnnflow.types import Kernel

__all__ = ["DualAveraging", "Tuned", "warm_up"]


class Tuned(NamedTuple):
    """A kernel ready to sample, the state that warm-up left, and what was found."""

    kernel: Kernel
    state: object
    step_size: float
    n_leapfrog: int
    inverse_mass_matrix: Tensor
    gradients: int


class DualAveraging:
    """Find the step size whose mean acceptance rate is the target (Nesterov 2009; Hoffman and Gelman 2014)."""

    def __init__(self, step_size: float, target: float) -> None:
        self._target = target
        self._centre = math.log(10 * step_size)
        self._log = self._averaged = math.log(step_size)
        self._error, self._count = 0.0, 0

    @property
    def step_size(self) -> float:
        """The step size to try next."""
        return math.exp(self._log)

    @property
    def averaged(self) -> float:
        """The step size to keep."""
        return math.exp(self._averaged)

    def update(self, acceptance: float) -> None:
        """Learn from one transition; a NaN acceptance counts as zero, so that the step shrinks."""
        acceptance = 0.0 if math.isnan(acceptance) else acceptance
        self._count += 1
        gain = 1 / (self._count + 10)
        self._error += gain * (self._target - acceptance - self._error)
        log = self._centre - math.sqrt(self._count) / 0.05 * self._error
        self._log = min(max(log, -50.0), 50.0)  # a density that always or never accepts must not overflow
        weight = self._count**-0.75
        self._averaged += weight * (self._log - self._averaged)


def warm_up(
    family: Callable[[float, int, Tensor], Kernel],
    theta: Tensor,
    n: int,
    generator: torch.Generator,
    bar: tqdm,
    *,
    target_acceptance: float,
    trajectory_length: float,
    max_leapfrog: int,
    step_size: float,
) -> Tuned:
    """Tune step size, number of steps and a pooled diagonal mass matrix in windows of doubling length.

    The first 15 % of the transitions only find a step size, the last 20 % settle it for the final mass matrix; the
    windows between re-estimate the variances within chains, pooled over all of them, and shrink their logarithms
    a little towards the mean, so that no scale is favoured.

    Args:
        family: ``(step_size, n_leapfrog, inverse_mass_matrix) -> Kernel``.
        theta: starting points, ``(chain, dim)``.
        n: number of transitions; 0 returns the untuned kernel.
        generator: the source of randomness.
        bar: is advanced by one for each transition.
        target_acceptance: see `HMC`.
        trajectory_length: see `HMC`.
        max_leapfrog: see `HMC`.
        step_size: first guess.
    """
    mass = torch.ones(theta.shape[-1], dtype=theta.dtype, device=theta.device)

    def n_leapfrog(step_size: float) -> int:
        # The mean of the jittered number of steps is three quarters of the largest.
        return max(1, min(max_leapfrog, round(trajectory_length / (0.75 * step_size))))

    state = family(step_size, 1, mass).init(theta, generator)
    adapt = DualAveraging(step_size, target_acceptance)
    gradients = 1
    for length, estimates_mass in _windows(n):
        total = torch.zeros_like(theta, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for _ in range(length):
            kernel = family(adapt.step_size, n_leapfrog(adapt.step_size), mass)
            state, info = kernel.step(state, generator)
            adapt.update(float(info.acceptance_rate.mean()))
            gradients += int(info.n_steps[0])
            if estimates_mass:
                total += state.theta
                squares += state.theta.double() ** 2
            bar.update()
            if not bar.disable:
                bar.set_postfix(warmup="", step_size=f"{adapt.step_size:.2e}")
        if estimates_mass:
            variance = (squares / length - (total / length) ** 2).mean(0)  # within chains, pooled
            if variance.max() > 0:  # else nothing moved, and nothing was learned
                count, log_variance = length * theta.shape[0], variance.clamp(min=1e-12).log()
                mass = ((count * log_variance + 5 * log_variance.mean()) / (count + 5)).exp().to(theta.dtype)
            adapt = DualAveraging(adapt.averaged, target_acceptance)
    step_size = adapt.averaged if n else step_size
    steps = n_leapfrog(step_size)
    return Tuned(family(step_size, steps, mass), state, step_size, steps, mass, gradients)


def _windows(n: int) -> list[tuple[int, bool]]:
    """Cut ``n`` transitions into (length, estimates the mass matrix) windows."""
    first, last = round(0.15 * n), round(0.2 * n)
    middle = n - first - last
    if middle < 20:  # too short to say anything about variances
        return [(n, False)]
    windows = [(first, False)]
    length = max(20, middle // 7)
    while middle > 0:
        length = length if middle >= 3 * length else middle
        windows.append((length, True))
        middle -= length
        length *= 2
    return [*windows, (last, False)]
