"""Corrections by Markov chains: latent and Hamiltonian moves in turn, and HMC through the flow."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnnflow.gaussian import Gaussian, positive
from bnnflow.importance import kish_ess, psis
from bnnflow.inference.mcmc.hmc import hmc, rotation
from bnnflow.inference.mcmc.trajectories import ChainState, TrajectoryInfo, metropolis
from bnnflow.inference.mcmc.warmup import followed
from bnnflow.inference.particles.tempering import systematic
from bnnflow.progress import progress_bar
from bnnflow.transport.correction.importance import HeldOut, bridge, rhat_and_ess
from bnnflow.transport.correction.job import (
    LATENT,
    Job,
    features_of,
    shrunk_gaussian,
    starts,
)
from bnnflow.transport.correction.latent import Latent, Points, crank_nicolson, log_normal
from bnnflow.transport.correction.verdict import Outcome
from bnnflow.types import Kernel, LogDensityAndGrad

__all__ = ["latent_metropolis", "mixed", "neutra"]

_HAMILTONIAN = 0.8  # the same of Hamiltonian moves
_INDEPENDENT = 0.5  # share of independent proposals among the latent moves of chains
WARM_UP = 60  # sweeps or transitions of chains that are thrown away,
_SETTLE = 1  # or so many of very many chains, if these forget quickly where they were,
_SLOWLY = 0.5  # which a correlation of neighbouring draws above this denies
_CROWD = 512  # the most chains
_SHORTEST = 8  # draws of one
# time of a trajectory, in standard deviations: a quarter turn forgets where it began
_QUARTER = math.pi / 2
_LONGEST = 16  # the most steps of one


def _nearest(points: Points, generator: torch.Generator) -> Gaussian:
    """Return the latent law or the Gaussian of draws as the posterior weighs them, whichever is
    nearer to that.
    """
    weights, _ = psis(points.log_weight)
    drawn = points.at(systematic(weights.unsqueeze(0), generator)[0])
    latent = Gaussian(torch.zeros_like(drawn.x0[0]), torch.ones_like(drawn.x0[0]).diag())
    height = drawn.log_weight + log_normal(drawn.x0)
    guesses = (latent, shrunk_gaussian(drawn.x0, kish_ess(weights)))
    return min(guesses, key=lambda guess: float((height - guess.log_prob(drawn.x0)).var()))


class _Sweep(NamedTuple):
    """What a person wants to know of a sweep of `mixed`; ``(chain,)`` each."""

    acceptance_rate: Tensor  # of the latent move
    independent: Tensor  # whether its proposal was independent
    hmc_acceptance_rate: Tensor
    n_steps: Tensor


def mixed(
    latent: Latent,
    log_joint_and_grad: LogDensityAndGrad,
    beta: float,
    independent_share: float,
    step_size: float,
    n_leapfrog: int,
    inverse_mass_matrix: Tensor,
    halfway: Callable[[Points], None] = lambda points: None,
    trajectory_jitter: float = 0.5,
) -> Kernel:
    """Build the kernel that makes a latent move, then a Hamiltonian transition over weights.

    The first, `crank_nicolson`, can jump between modes; the second knows the gradient. Each leaves
    the posterior invariant. A transition to where the flow has no density is rejected.

    Args:
        latent: the posterior in latent space.
        log_joint_and_grad: the same over weights.
        beta: of the latent move.
        independent_share: of the proposals.
        step_size: see `hmc`.
        n_leapfrog: see `hmc`.
        inverse_mass_matrix: see `hmc`.
        halfway: is told where the chains are after the first move.
        trajectory_jitter: see `hmc`.
    """
    jump = crank_nicolson(latent, beta, independent_share=independent_share)
    walk = hmc(
        log_joint_and_grad,
        step_size,
        n_leapfrog,
        inverse_mass_matrix,
        trajectory_jitter=trajectory_jitter,
    )

    def step(points: Points, generator: torch.Generator) -> tuple[Points, _Sweep]:
        points, move = jump.step(points, generator)
        halfway(points)
        theta = points.theta.to(inverse_mass_matrix)
        state, info = walk.step(walk.init(theta, generator), generator)
        rows = (state.theta != theta).any(1).nonzero().squeeze(1)
        if len(rows):
            moved = latent.inverse(state.theta[rows].to(points.theta))
            found = ~moved.lost
            points = Points(
                *(
                    old.index_put((rows[found],), new[found])
                    for old, new in zip(points, moved, strict=True)
                )
            )
        return points, _Sweep(
            move.acceptance_rate, move.independent, info.acceptance_rate, info.n_steps + 1
        )

    return Kernel(jump.init, step)


class _Chains:
    """How many chains run, and for how long: many short ones if they forget quickly, else few long
    ones.

    One evaluation of a flow of few weights costs hardly more for hundreds of points than for a few.
    So hundreds of chains begin; after a short warm-up the correlation of neighbouring draws tells
    how long a chain has to be for R-hat to see that it converged. If that is very long, the first
    few of them go on, after a longer warm-up.

    Args:
        job: what is wanted.
        most: bound on the number of chains that are few.

    Attributes:
        count: number of chains.
        many: whether these are very many.
        warm_up: moves that are thrown away.
        draws: of each chain.
    """

    def __init__(self, job: Job, most: int) -> None:
        self._n, self._few = job.n, min(most, max(4, job.n // 50))
        self.count = max(self._few, min(_CROWD, job.n // _SHORTEST, job.latent.wide))
        self.many = self.count > self._few
        self.warm_up = _SETTLE if self.many else WARM_UP
        self.draws = math.ceil(job.n / self.count)

    def settle(self, before: Tensor, after: Tensor, *rates: Tensor) -> None:
        """Look at many chains after their short warm-up.

        Args:
            before: where they were before the last move, ``(chain, dim)``.
            after: where they are.
            rates: of acceptance, ``(chain,)`` each.
        """
        memory = max(_memory(before, after), *(1 - float(rate.mean()) for rate in rates))
        if memory > _SLOWLY:
            self.count, self.many, self.warm_up = self._few, False, WARM_UP
        else:  # R-hat exceeds 1 by about memory / (1 - memory) over half the draws of a chain
            longest = max(_SHORTEST, math.ceil(40 * memory / (1 - memory)))
            self.count = max(self._few, min(self.count, self._n // longest))
            self.warm_up += round(3 * memory / (1 - memory))
        self.draws = math.ceil(self._n / self.count)


def _memory(before: Tensor, after: Tensor) -> float:
    """Return the mean correlation of coordinates ``(chain, dim)`` before and after a move, of those
    that vary.
    """
    pair = torch.stack([before, after]).double()
    pair = pair - pair.mean(1, keepdim=True)
    size = pair.square().sum(1).sqrt().prod(0)
    return float(((pair[0] * pair[1]).sum(0) / size)[size > 0].mean().nan_to_num(1.0))


class _Walk(abc.ABC):
    """Chains on their way: a warm-up that tunes the kernel, then draws.

    Attributes:
        state: of all chains.
        tuned: what warm-up tunes of the kernel; from its end on what its second half used on
            average.
        drawn: states that were kept.
        infos: of the transitions that gave them.
        gradients: of all chains together.
    """

    name: str
    unit: str
    state: Any
    tuned: tuple[float, ...]

    def __init__(self, job: Job, points: Points, most: int) -> None:
        self.job, self.chains = job, _Chains(job, most)
        self.rows = starts(points, self.chains.count, job.generator)
        self.history: list[tuple[float, ...]] = []
        self.drawn: list[Any] = []
        self.infos: list[Any] = []
        self.gradients = 0.0

    @abc.abstractmethod
    def kernel(self) -> Kernel:
        """Return the kernel of the next transition."""

    @abc.abstractmethod
    def tune(self, info: Any) -> None:
        """Adapt what is tuned to the acceptance of a transition."""

    @abc.abstractmethod
    def rates(self, info: Any) -> list[Tensor]:
        """Return acceptance rates ``(chain,)`` that tell how long chains have to be."""

    @abc.abstractmethod
    def first(self, count: int) -> Any:
        """Return the state of so many chains, the first ones."""

    def keep(self, info: Any) -> None:
        """Keep what a transition has drawn."""
        self.drawn.append(self.state)
        self.infos.append(info)

    def run(self) -> None:
        """Warm up and draw, until all is drawn or Ctrl-C."""
        chains, job = self.chains, self.job
        total = chains.warm_up + chains.draws
        with progress_bar(total, self.name, job.progress, self.unit) as bar:
            try:
                while len(self.drawn) < chains.draws:
                    self.transition()
                    bar.update()
            except KeyboardInterrupt:
                if not self.drawn:
                    raise
                found = f"after {len(self.drawn)} of {chains.draws} draws of each chain"
                job.findings.stopped(found)
        del self.drawn[chains.draws :]

    def transition(self) -> None:
        """Move all chains once."""
        before, chains = self.state, self.chains
        self.state, info = self.kernel().step(before, self.job.generator)
        self.gradients += float(info.n_steps.sum())
        if len(self.history) >= chains.warm_up:
            self.keep(info)
            return
        self.tune(info)
        self.history.append(self.tuned)
        if chains.many and len(self.history) == _SETTLE:
            chains.settle(before.theta, self.state.theta, *self.rates(info))
            self.state = self.first(chains.count)
        if len(self.history) == chains.warm_up:
            half = torch.tensor(self.history[len(self.history) // 2 :])
            self.tuned = tuple(half.log().mean(0).exp().tolist())

    def stats(self) -> dict[str, Tensor]:
        """Return what each transition says of itself, ``(chain, transition)``."""
        return {
            name: torch.stack([getattr(info, name) for info in self.infos], 1)
            for name in self.infos[0]._fields
        }


class _Mixed(_Walk):
    """Chains of `mixed` over points of the flow; beta and a step size are tuned."""

    name, unit = "metropolis", "sweep"
    state: Points

    def __init__(self, job: Job, points: Points) -> None:
        super().__init__(job, points, most=64)
        model = job.model
        self.target: LogDensityAndGrad = torch.no_grad()(model.log_joint_and_grad)
        self.state = points.at(self.rows)
        variance = points.theta[points.theta.isfinite().all(1)].double().var(0)
        self.mass = positive(variance).to(model.device, model.dtype)
        self.tuned = 1.0 if self.chains.many else 0.5, 0.5 * model.dim**-0.25
        self.halfway: list[Points] = []  # of one sweep

    def kernel(self) -> Kernel:
        beta, step_size = self.tuned
        # of few, none is the best
        lengths = (_leapfrogs(step_size), 1.0) if self.chains.many else (_LONGEST, 0.5)
        self.halfway.clear()
        return mixed(
            self.job.latent,
            self.target,
            beta,
            _INDEPENDENT,
            step_size,
            lengths[0],
            self.mass,
            self.halfway.append,
            lengths[1],
        )

    def tune(self, info: _Sweep) -> None:
        beta, step_size = self.tuned
        nearby = info.acceptance_rate[~info.independent]
        if len(nearby):
            beta = min(1.0, followed(beta, float(nearby.mean()), LATENT, gain=0.5))
        rate = float(info.hmc_acceptance_rate.mean())
        self.tuned = beta, followed(step_size, rate, _HAMILTONIAN)

    def rates(self, info: _Sweep) -> list[Tensor]:
        return [info.acceptance_rate, info.hmc_acceptance_rate]

    def first(self, count: int) -> Points:
        return self.state.at(torch.arange(count))

    def keep(self, info: _Sweep) -> None:
        if self.chains.many:  # two draws a sweep
            self.drawn += self.halfway
        super().keep(info)


class _Latent(_Walk):
    """Chains of HMC over latent points; a step size is tuned."""

    name, unit = "neutra", "transition"
    state: ChainState

    def __init__(self, job: Job, points: Points) -> None:
        super().__init__(job, points, most=16)
        self.target = job.latent.log_density_and_grad
        around = _nearest(points, job.generator)
        self.trajectory, self.unit_mass = (
            rotation(self.target, around),
            torch.ones_like(around.loc),
        )
        self.tuned, self.n_leapfrog = (_QUARTER,), 1
        x0 = points.x0[self.rows]
        self.state = ChainState(x0, *self.target(x0))
        self.gradients = float(self.chains.count)

    def kernel(self) -> Kernel:
        (step_size,) = self.tuned
        # few chains vary how far they turn: so they change modes
        jitter = 1.0 if self.chains.many else 0.75
        self.n_leapfrog = _leapfrogs(jitter * step_size)
        return metropolis(
            self.target,
            self.trajectory,
            step_size,
            self.n_leapfrog,
            self.unit_mass,
            trajectory_jitter=jitter,
        )

    def tune(self, info: TrajectoryInfo) -> None:
        rate = float(info.acceptance_rate.mean())
        self.tuned = (min(_QUARTER, followed(self.tuned[0], rate, _HAMILTONIAN)),)

    def rates(self, info: TrajectoryInfo) -> list[Tensor]:
        return [info.acceptance_rate]

    def first(self, count: int) -> ChainState:
        return ChainState(*(part[:count] for part in self.state))


def latent_metropolis(job: Job, points: Points | None) -> Outcome:
    """Run chains of `mixed` from resampled draws of the flow."""
    assert points is not None
    walk = _Mixed(job, points)
    walk.run()
    stats = walk.stats()
    rate, anew = stats["acceptance_rate"], stats.pop("independent")
    beta, step_size = walk.tuned
    info = {
        "beta": beta,
        "step_size": step_size,
        "independent_acceptance_rate": float(rate[anew].mean())
        if bool(anew.any())
        else 0.0,
        "crank_nicolson_acceptance_rate": float(rate[~anew].mean())
        if bool((~anew).any())
        else 0.0,
        "hmc_acceptance_rate": float(stats["hmc_acceptance_rate"].double().mean()),
        "gradients_per_chain": round(walk.gradients / walk.chains.count),
    }
    if walk.chains.many:  # two draws a sweep
        count = len(walk.drawn)
        stats = {
            name: each.repeat_interleave(2, 1)[:, :count] for name, each in stats.items()
        }
    theta, log_joint, ratio = (
        torch.stack([getattr(each, name) for each in walk.drawn], 1)
        for name in ("theta", "log_joint", "log_weight")
    )
    return _chained(
        job,
        points,
        theta,
        log_joint,
        ratio,
        info,
        stats,
        info["independent_acceptance_rate"],
    )


def _leapfrogs(step_size: float) -> int:
    """Return how many steps a quarter turn takes."""
    return max(1, min(_LONGEST, round(_QUARTER / step_size)))


def neutra(job: Job, points: Points | None) -> Outcome:
    """Run HMC on the latent points of resampled draws of the flow."""
    assert points is not None
    latent, walk = job.latent, _Latent(job, points)
    walk.run()
    x0 = torch.stack([state.theta for state in walk.drawn], 1)  # (chain, draw, dim)
    theta = torch.cat(
        [
            latent.forward_without_density(rows)
            for rows in x0.flatten(0, 1).split(latent.chunk)
        ]
    )
    log_joint = latent.log_joint(theta).unflatten(0, x0.shape[:2])
    ratio = torch.stack([state.log_joint for state in walk.drawn], 1) - log_normal(x0)
    stats = walk.stats()
    info = {
        "step_size": walk.tuned[0],
        "n_leapfrog": walk.n_leapfrog,
        "hmc_acceptance_rate": float(stats["acceptance_rate"].double().mean()),
        "gradients_per_chain": round(walk.gradients / walk.chains.count),
    }
    return _chained(
        job, points, theta.unflatten(0, x0.shape[:2]), log_joint, ratio, info, stats, 1.0
    )


def _chained(
    job: Job,
    points: Points,
    theta: Tensor,
    log_joint: Tensor,
    ratio: Tensor,
    info: dict[str, Any],
    stats: dict[str, Tensor],
    acceptance: float,
) -> Outcome:
    """Judge chains, and bridge from the flow's draws to theirs."""
    seen = features_of(job.model, theta.flatten(0, 1)).unflatten(0, theta.shape[:2])
    r_hat, ess = rhat_and_ess(
        torch.cat([log_joint.unsqueeze(-1), ratio.unsqueeze(-1), seen], -1)
    )
    job.findings.chains(r_hat, ess, acceptance)
    own = HeldOut(theta.flatten(0, 1), (theta.shape[0], theta.shape[1]))
    evidence = bridge(points.log_weight, ratio.flatten(), own)
    return Outcome(
        theta,
        log_joint,
        ess,
        info | {"r_hat": r_hat},
        forward=points.log_weight,
        log_ratio=ratio,
        evidence=evidence,
        stats=stats,
    )
