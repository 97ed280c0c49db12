"""Corrections by Markov chains: latent and Hamiltonian moves in turn, and HMC through the flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnnflow.gaussian import Gaussian, positive
from bnnflow.inference.mcmc.hmc import hmc, rotation
from bnnflow.inference.mcmc.trajectories import ChainState, metropolis
from bnnflow.inference.particles.smc import systematic
from bnnflow.progress import progress_bar
from bnnflow.transport.correction.importance import (
    HeldOut,
    bridge,
    kish_ess,
    psis,
    rhat_and_ess,
)
from bnnflow.transport.correction.job import LATENT, Job, features_of, shrunk_gaussian, starts
from bnnflow.transport.correction.latent import Latent, Points, crank_nicolson, log_normal
from bnnflow.transport.correction.verdict import Outcome
from bnnflow.types import Kernel, LogDensityAndGrad

__all__ = ["latent_metropolis", "mixed", "neutra"]

_HAMILTONIAN = 0.8  # the same of Hamiltonian moves
_INDEPENDENT = 0.5  # share of independent proposals among the latent moves of chains
_WARM_UP = 60  # sweeps or transitions of chains that are thrown away,
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
        self.warm_up = _SETTLE if self.many else _WARM_UP
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
            self.count, self.many, self.warm_up = self._few, False, _WARM_UP
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


def latent_metropolis(job: Job, points: Points | None) -> Outcome:
    """Run chains of `mixed` from resampled draws of the flow."""
    assert points is not None
    model, latent, generator = job.model, job.latent, job.generator
    target = torch.no_grad()(model.log_joint_and_grad)
    chains = _Chains(job, 64)
    state = points.at(starts(points, chains.count, generator))
    variance = points.theta[points.theta.isfinite().all(1)].double().var(0)
    mass = positive(variance).to(model.device, model.dtype)
    beta, step_size, history = 1.0 if chains.many else 0.5, 0.5 * model.dim**-0.25, []
    gradients = 0.0
    drawn: list[Points] = []
    halfway: list[Points] = []  # of one sweep
    infos: list[_Sweep] = []
    with progress_bar(chains.warm_up + chains.draws, "metropolis", job.progress, "sweep") as bar:
        try:
            while len(drawn) < chains.draws:
                before = state
                # of few, none is the best
                lengths = (_leapfrogs(step_size), 1.0) if chains.many else (_LONGEST, 0.5)
                halfway.clear()
                kernel = mixed(
                    latent,
                    target,
                    beta,
                    _INDEPENDENT,
                    step_size,
                    lengths[0],
                    mass,
                    halfway.append,
                    lengths[1],
                )
                state, info = kernel.step(before, generator)
                gradients += float(info.n_steps.sum())
                bar.update()
                if len(history) < chains.warm_up:
                    nearby = info.acceptance_rate[~info.independent]
                    if len(nearby):
                        beta = min(1.0, beta * math.exp(0.5 * (float(nearby.mean()) - LATENT)))
                    step_size *= math.exp(float(info.hmc_acceptance_rate.mean()) - _HAMILTONIAN)
                    history.append([beta, step_size])
                    if chains.many and len(history) == _SETTLE:
                        chains.settle(
                            before.theta,
                            state.theta,
                            info.acceptance_rate,
                            info.hmc_acceptance_rate,
                        )
                        state = state.at(torch.arange(chains.count))
                    # from here on what its second half used on average
                    if len(history) == chains.warm_up:
                        beta, step_size = (
                            torch.tensor(history[len(history) // 2 :]).log().mean(0).exp().tolist()
                        )
                else:
                    drawn += [*halfway, state] if chains.many else [state]
                    infos.append(info)
        except KeyboardInterrupt:
            if not drawn:
                raise
            job.findings.stopped(f"after {len(drawn)} of {chains.draws} draws of each chain")
    del drawn[chains.draws :]
    stats = {
        name: torch.stack([getattr(info, name) for info in infos], 1) for name in _Sweep._fields
    }
    rate, anew = stats["acceptance_rate"], stats.pop("independent")
    info = {
        "beta": beta,
        "step_size": step_size,
        "independent_acceptance_rate": float(rate[anew].mean()) if bool(anew.any()) else 0.0,
        "crank_nicolson_acceptance_rate": float(rate[~anew].mean()) if bool((~anew).any()) else 0.0,
        "hmc_acceptance_rate": float(stats["hmc_acceptance_rate"].double().mean()),
        "gradients_per_chain": round(gradients / chains.count),
    }
    if chains.many:  # two draws a sweep
        stats = {
            name: values.repeat_interleave(2, 1)[:, : len(drawn)] for name, values in stats.items()
        }
    theta, log_joint, ratio = (
        torch.stack([getattr(each, name) for each in drawn], 1)
        for name in ("theta", "log_joint", "log_weight")
    )
    return _chained(
        job, points, theta, log_joint, ratio, info, stats, info["independent_acceptance_rate"]
    )


def _leapfrogs(step_size: float) -> int:
    """Return how many steps a quarter turn takes."""
    return max(1, min(_LONGEST, round(_QUARTER / step_size)))


def neutra(job: Job, points: Points | None) -> Outcome:
    """Run HMC on the latent points of resampled draws of the flow."""
    assert points is not None
    generator, latent = job.generator, job.latent
    target = latent.log_density_and_grad
    chains = _Chains(job, 16)
    rows = starts(points, chains.count, generator)
    around = _nearest(points, generator)
    trajectory, unit = rotation(target, around), torch.ones_like(around.loc)
    step_size, n_steps, history = _QUARTER, 1, []
    state = ChainState(points.x0[rows], *target(points.x0[rows]))
    states, infos, gradients = [], [], float(chains.count)
    with progress_bar(chains.warm_up + chains.draws, "neutra", job.progress, "transition") as bar:
        try:
            while len(states) < chains.draws:
                before = state
                # few chains vary how far they turn: so they change modes
                jitter = 1.0 if chains.many else 0.75
                n_steps = _leapfrogs(jitter * step_size)
                kernel = metropolis(
                    target, trajectory, step_size, n_steps, unit, trajectory_jitter=jitter
                )
                state, info = kernel.step(before, generator)
                gradients += float(info.n_steps.sum())
                bar.update()
                if len(history) < chains.warm_up:
                    step_size = min(
                        _QUARTER,
                        step_size * math.exp(float(info.acceptance_rate.mean()) - _HAMILTONIAN),
                    )
                    history.append(step_size)
                    if chains.many and len(history) == _SETTLE:
                        chains.settle(before.theta, state.theta, info.acceptance_rate)
                        state = ChainState(*(part[: chains.count] for part in state))
                    if len(history) == chains.warm_up:
                        step_size = float(
                            torch.tensor(history[len(history) // 2 :]).log().mean().exp()
                        )
                else:
                    states.append(state)
                    infos.append(info)
        except KeyboardInterrupt:
            if not states:
                raise
            job.findings.stopped(f"after {len(states)} of {chains.draws} draws of each chain")
    x0 = torch.stack([state.theta for state in states], 1)  # (chain, draw, dim)
    theta = torch.cat(
        [latent.forward_without_density(rows) for rows in x0.flatten(0, 1).split(latent.chunk)]
    )
    log_joint = latent.log_joint(theta).unflatten(0, x0.shape[:2])
    ratio = torch.stack([state.log_joint for state in states], 1) - log_normal(x0)
    stats = {
        name: torch.stack([getattr(info, name) for info in infos], 1) for name in infos[0]._fields
    }
    info = {
        "step_size": step_size,
        "n_leapfrog": n_steps,
        "hmc_acceptance_rate": float(stats["acceptance_rate"].double().mean()),
        "gradients_per_chain": round(gradients / chains.count),
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
    r_hat, ess = rhat_and_ess(torch.cat([log_joint.unsqueeze(-1), ratio.unsqueeze(-1), seen], -1))
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
