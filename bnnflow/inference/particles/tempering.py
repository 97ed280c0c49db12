"""Particles that follow a path of densities: reweighted, resampled, moved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnnflow.gaussian import positive
from bnnflow.inference.mcmc.hmc import hmc
from bnnflow.inference.mcmc.warmup import followed
from bnnflow.inference.particles.paths import Path
from bnnflow.ranks import Ranks
from bnnflow.types import LogDensityAndGrad
from bnnflow.warn import warn

__all__ = [
    "Particles",
    "Tempering",
    "effective_families",
    "merging",
    "next_fraction",
    "next_step",
    "relative_variance",
    "systematic",
    "weighted_variance",
]

_FINE = 1e-13  # relative to a step of the temperature: how well it is found,
_BELOW_ONE = math.nextafter(1.0, 0.0)  # where there is a way left, however little
_HALVINGS = 1100  # if it is not smaller than all numbers


class Particles(NamedTuple):
    """Where the particles of every run are on their way; those of this process."""

    theta: Tensor  # (run, particle, dim)
    log_ratio: (
        Tensor  # (run, particle), log density of the last end - that of the first, float64
    )
    log_first: Tensor  # (run, particle), float64
    log_weights: Tensor  # (run, particle), normalised over the particles of all processes
    root: Tensor  # (run, particle), which of the first particles it descends from
    fraction: Tensor  # (run,), the inverse temperature, 0 to 1,
    remainder: (
        Tensor  # (run,), and what it lacks of 1: each keeps its digits where it is small
    )
    log_normaliser: Tensor  # (run,), of the density now over that of the first end
    merged: Tensor  # (run,), log of how much less apart families are for resampling alone
    least: Tensor  # (run,), smallest share of the particles that a temperature has left effective
    step_size: float
    acceptance: float
    gradients: float
    shared: Tensor  # state of the generator that all processes have in common


class Reweighted(NamedTuple):
    """Weights of all particles at the next temperature of every run."""

    log_weights: Tensor  # (run, particle), normalised
    fraction: Tensor  # (run,)
    remainder: Tensor  # (run,)
    last: Tensor  # (run,), whether it is the last temperature
    log_normaliser: Tensor  # (run,), of its density over that of the temperature before
    left: Tensor  # (run,), share of the particles that is effective


@dataclass(frozen=True)
class Tempering:
    """How particles go along a path; see `SMC` for the settings.

    Args:
        path: from the first density to the last.
        ess: fraction of effective particles that a step of the temperature leaves.
        moves: transitions at every temperature.
        trajectory_length: mean integration time of a transition, in units of the particles'
            standard deviations.
        max_leapfrog: bound on the leapfrog steps of a transition.
        target_acceptance: mean acceptance rate to aim at.
        ranks: the processes that share the particles.
        generator: randomness of this process.
        shared: randomness that all processes have in common; the same one if there is only this.
    """

    path: Path
    ess: float
    moves: int
    trajectory_length: float
    max_leapfrog: int
    target_acceptance: float
    ranks: Ranks
    generator: torch.Generator
    shared: torch.Generator

    def first(self, theta: Tensor) -> Particles:
        """Put particles of equal weight ``(run, particle, dim)``, those of this process, at the
        first end.
        """
        runs, mine, dim = theta.shape
        device, ranks = theta.device, self.ranks
        log_first, log_last = self.path(theta)
        zeros = torch.zeros(runs, dtype=torch.float64, device=device)
        root = torch.arange(mine, device=device) + mine * ranks.rank
        return Particles(
            theta=theta,
            log_ratio=log_last - log_first,
            log_first=log_first,
            log_weights=torch.full_like(log_last, -math.log(mine * ranks.size)),
            root=root.expand(runs, -1),
            fraction=zeros,
            remainder=torch.ones_like(zeros),
            log_normaliser=zeros,
            merged=zeros,
            least=torch.ones_like(zeros),
            step_size=0.5 * dim**-0.25,
            acceptance=0.0,
            gradients=1.0,
            shared=self.shared.get_state(),
        )

    def advance(self, state: Particles, bar: Any) -> Particles:
        """Go to the next temperature: reweight, resample, move."""
        ranks = self.ranks
        step = self._reweighted(
            state,
            ranks.gather(state.log_ratio, 1),
            ranks.gather(state.log_weights, 1),
            self.ess,
        )
        weights, last = step.log_weights, step.last[:, None]
        everyone = ranks.gather(state.theta, 1)  # (run, particle, dim)
        parents = systematic(weights, self.shared)
        unmoved = torch.arange(weights.shape[1], device=parents.device)
        parents = torch.where(last, unmoved, parents)
        roots = ranks.gather(state.root, 1)
        merged = merging(weights, roots)
        roots = roots.gather(1, parents)
        weights = torch.where(last, weights, -math.log(weights.shape[1]))
        everyone = everyone.gather(1, parents.unsqueeze(-1).expand_as(everyone))

        def own(values: Tensor) -> Tensor:
            if ranks.size == 1:
                return values
            return values.chunk(ranks.size, 1)[ranks.rank].clone()

        state = state._replace(
            theta=own(everyone),
            log_weights=own(weights),
            root=own(roots),
            fraction=step.fraction,
            remainder=step.remainder,
            log_normaliser=state.log_normaliser + step.log_normaliser,
            merged=state.merged + torch.where(step.last, 0.0, merged),
            least=_least(step.left, state.least),
        )
        return self.moved(state, bar)

    def moved(self, state: Particles, bar: Any) -> Particles:
        """Move all particles at the temperature that they are at."""
        everyone, weights = (
            self.ranks.gather(each, 1) for each in (state.theta, state.log_weights)
        )
        mass = weighted_variance(everyone, weights).to(everyone.dtype)  # (run, dim)
        count = state.theta.shape[1]
        target = self.path.tempered(
            state.fraction.repeat_interleave(count),
            state.remainder.repeat_interleave(count),
        )
        theta, step_size, acceptance, steps = self._move(target, state.theta, mass, state)
        log_first, log_last = self.path(theta)
        gradients = state.gradients + steps + 1
        bar.update()
        bar.set_postfix(
            at=f"{float(state.fraction.min()):.2e}",
            accept=f"{acceptance:.2f}",
            step=f"{step_size:.1e}",
            gradients=f"{gradients:.0f}",
        )
        return state._replace(
            theta=theta,
            log_ratio=log_last - log_first,
            log_first=log_first,
            step_size=step_size,
            acceptance=acceptance,
            gradients=gradients,
            shared=self.shared.get_state(),
        )

    def _reweighted(
        self, state: Particles, ratio: Tensor, log_weights: Tensor, ess: float
    ) -> Reweighted:
        """Choose the next temperature of every run, at which the fraction ``ess`` of the particles
        is effective, and weigh all particles ``(run, particle)`` for it.
        """
        usable = torch.where(ratio.isnan(), -math.inf, ratio)
        further = next_step(usable, log_weights, state.fraction, state.remainder, ess)
        last = further == state.remainder
        log_weights = log_weights + further[:, None] * usable
        total = log_weights.logsumexp(1)
        log_weights = log_weights - total[:, None]
        return Reweighted(
            log_weights=log_weights,
            fraction=torch.where(
                last, 1.0, (state.fraction + further).clamp(max=_BELOW_ONE)
            ),
            remainder=state.remainder - further,
            last=last,
            log_normaliser=total,
            left=(-(2 * log_weights).logsumexp(1)).exp() / log_weights.shape[1],
        )

    def _move(
        self,
        target: LogDensityAndGrad,
        theta: Tensor,
        mass: Tensor,
        state: Particles,
    ) -> tuple[Tensor, float, float, float]:
        """Move all particles by jittered Hamiltonian transitions.

        Return them, the step size, acceptance, gradients.
        """
        runs, mine, _ = theta.shape
        step_size, acceptance, steps = state.step_size, 0.0, 0.0
        flat, scales = theta.flatten(0, 1), mass.repeat_interleave(mine, 0)
        chain: Any = None
        for _ in range(self.moves):
            n_leapfrog = max(
                1,
                min(self.max_leapfrog, round(self.trajectory_length / (0.75 * step_size))),
            )
            kernel = hmc(target, step_size, n_leapfrog, scales)
            chain = kernel.init(flat, self.generator) if chain is None else chain
            chain, info = kernel.step(chain, self.generator)
            acceptance = float(self.ranks.mean(info.acceptance_rate.mean()))
            step_size = followed(step_size, acceptance, self.target_acceptance)
            steps += float(info.n_steps[0])
        return chain.theta.unflatten(0, (runs, mine)), step_size, acceptance, steps + 1

    def weighed(self, state: Particles) -> Particles:
        """Weigh the particles for the last density, wherever they are."""
        step = self._reweighted(state, state.log_ratio, state.log_weights, ess=0.0)
        return state._replace(
            log_weights=step.log_weights,
            log_normaliser=state.log_normaliser + step.log_normaliser,
            fraction=step.fraction,
            remainder=step.remainder,
            least=_least(step.left, state.least),
        )

    def broken_off(self, state: Particles) -> Particles:
        """Weigh the particles for the last density, and say what that leaves."""
        ended = self.weighed(state)
        left = (-(2 * ended.log_weights).logsumexp(1)).exp() / ended.log_weights.shape[1]
        warn(
            f"interrupted at {float(state.fraction.min()):.2g} of the way: the particles are "
            f"weighed for the posterior, which leaves {float(left.min()):.1%} of them effective"
        )
        return ended


def next_fraction(
    ratio: Tensor, log_weights: Tensor, fraction: Tensor, ess: float
) -> Tensor:
    """Return the largest inverse temperatures ``(run,)`` that leave at least ``ess`` of the
    particles effective.
    """
    remainder = 1 - fraction
    step = next_step(ratio, log_weights, fraction, remainder, ess)
    return torch.where(step == remainder, 1.0, fraction + step)


def next_step(
    ratio: Tensor, log_weights: Tensor, fraction: Tensor, remainder: Tensor, ess: float
) -> Tensor:
    """Return the same as steps from ``fraction``, of which ``remainder`` is the longest."""

    def remaining(step: Tensor) -> Tensor:
        weights = log_weights + step[:, None] * ratio
        weights = weights - weights.logsumexp(1, keepdim=True)
        return (-(2 * weights).logsumexp(1)).exp() / weights.shape[1]

    # Bisection of the step itself, whose digits do not end: noise of 1e-6 of the data wants a first
    # one of 1e-13.
    low, high = torch.zeros_like(remainder), remainder
    whole = remaining(remainder) >= ess
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        enough = remaining(middle) >= ess
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        if not bool((high - low > _FINE * high).any()):
            break
    # Never stand still, however steep the density: the weights then say what it cost.
    least = torch.minimum(_spacing(fraction), _spacing(remainder))
    return torch.where(
        whole, remainder, torch.minimum(torch.maximum(low, least), remainder)
    )


def _least(left: Tensor, before: Tensor) -> Tensor:
    """Return the smaller of two shares; NaN is the smallest."""
    return torch.where(left >= before, before, left)


def _spacing(values: Tensor) -> Tensor:
    """Return how far the next larger numbers are."""
    return torch.nextafter(values, torch.full_like(values, torch.inf)) - values


def systematic(
    log_weights: Tensor, generator: torch.Generator, count: int | None = None
) -> Tensor:
    """Draw the parents of the next particles, ``(run, count)``, by systematic resampling; as many
    as there are if count is None.
    """
    runs, most = log_weights.shape
    n = most if count is None else count
    offset = torch.rand(
        runs, 1, generator=generator, device=generator.device, dtype=torch.float64
    )
    points = (
        torch.arange(n, device=log_weights.device) + offset.to(log_weights.device)
    ) / n
    heights = log_weights.exp().cumsum(1)
    return torch.searchsorted(heights / heights[:, -1:], points).clamp(max=most - 1)


def weighted_variance(theta: Tensor, log_weights: Tensor) -> Tensor:
    """Return the weighted variance of the particles of each run, ``(run, dim)`` in float64."""
    weights, theta = log_weights.exp().unsqueeze(-1), theta.double()
    mean = (weights * theta).sum(1, keepdim=True)
    variance = (weights * (theta - mean).square()).sum(1)
    return positive(variance)


def _shares(log_weights: Tensor, root: Tensor) -> Tensor:
    """Return the weight of every family, the descendants of one of the first particles,
    ``(run, make_kernel)``.
    """
    return torch.zeros_like(log_weights).scatter_add_(1, root, log_weights.exp())


def effective_families(log_weights: Tensor, root: Tensor) -> Tensor:
    """Return how many families of equal weight would differ as often as those alive, ``(run,)``."""
    return 1 / _shares(log_weights, root).square().sum(1)


def merging(log_weights: Tensor, root: Tensor, count: int | None = None) -> Tensor:
    """Return minus the log of what systematic resampling leaves, on average, of the chance that
    families differ; of ``count`` particles, as many as there are if it is None.

    Siblings lie side by side, so that a family's number of children is its expectation rounded up
    or down.
    """
    n = log_weights.shape[1] if count is None else count
    shares = _shares(log_weights, root)
    part = (n * shares).frac()
    apart = (1 - shares.square().sum(1)).clamp(min=1 / n)
    return -torch.log1p(-(part * (1 - part)).sum(1) / n**2 / apart)


def relative_variance(log_weights: Tensor, root: Tensor, merged: Tensor) -> Tensor:
    """Estimate the relative variance of each run's evidence from the families alive (after Lee and
    Whiteley 2018).

    Two draws of the particles belong to different families less often than independent ones would.
    Their factor n / (n - 1) for every multinomial resampling is that of systematic resampling here.
    """
    n = log_weights.shape[1]
    apart = 1 - _shares(log_weights, root).square().sum(1)
    return (1 - n / (n - 1) * merged.exp() * apart).clamp(min=0.0)
