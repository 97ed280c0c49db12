"""Microcanonical Langevin Monte Carlo over many chains at once: unadjusted, with its bias under
control.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow.arguments import integer, number, settle
from bnnflow.draws import Draws
from bnnflow.dynamics import DIVERGENCE, Point, Target, momentum_update, random_directions
from bnnflow.inference.loop import Tuned, WarmUp, run_chains
from bnnflow.inference.mcmc.mass import Moments
from bnnflow.inference.mcmc.warmup import window_ends
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.ranks import ALONE, Ranks
from bnnflow.types import Kernel, LogDensityAndGrad

__all__ = [
    "MCLMC",
    "MCLMCInfo",
    "MCLMCState",
    "mclmc",
    "mclmc_warm_up",
    "momentum_update",
    "random_directions",
]


class MCLMCState(NamedTuple):
    """Where every chain is and which way it goes."""

    theta: Tensor  # (chain, dim)
    direction: Tensor  # (chain, dim), of unit length
    log_joint: Tensor  # (chain,), float64
    grad: Tensor  # (chain, dim)


class MCLMCInfo(NamedTuple):
    """What a person wants to know of one step; ``(chain,)`` each."""

    energy_variance: Tensor  # squared energy error per dimension
    diverging: Tensor
    n_steps: Tensor


def mclmc(
    log_joint_and_grad: LogDensityAndGrad,
    step_size: float,
    L: float,
    inverse_mass_matrix: Tensor,
    steps: int = 1,
) -> Kernel:
    """Build the unadjusted microcanonical Langevin kernel (Robnik, De Luca, Silverstein and Seljak
    2023).

    In coordinates scaled by the root of the ``inverse_mass_matrix``, a particle of unit speed moves
    by dx/dt = u, du/dt = (I - u u^T) grad log_joint / (dim - 1) for a minimal-norm step, and
    its direction is then partly drawn anew, so that it is forgotten over the length
    ``L``. Approximates exp(log_joint) with a bias of order step_size**2 for each expectation; a
    step that is not finite is undone and goes another way.

    Args:
        log_joint_and_grad: ``(chain, dim) -> (chain,), (chain, dim)``.
        step_size: distance of one step, two gradients.
        L: distance after which the direction is forgotten.
        inverse_mass_matrix: a diagonal ``(dim,)`` or ``(chain, dim)``, ideally the posterior
            variances.
        steps: of a transition, whose statistics are their mean.
    """
    target, scale = Target.of(log_joint_and_grad), inverse_mass_matrix.sqrt()
    # Of the length that makes the correlation of directions a step apart exp(-step_size / L);
    # nothing is left of the old one at 80.
    share = math.sqrt(math.expm1(min(2 * step_size / L, 80.0)))

    def init(theta: Tensor, generator: torch.Generator) -> MCLMCState:
        return MCLMCState(theta, random_directions(theta, generator), *target(theta))

    def step(state: MCLMCState, generator: torch.Generator) -> tuple[MCLMCState, MCLMCInfo]:
        time, (chains, dim) = scale.new_full((1,), step_size), state.theta.shape
        end, error = target.langevin(Point(*state), time, scale, share, steps, generator)
        lost = ~(error.abs() < DIVERGENCE)  # NaN counts
        # A lost step counts like one whose error is of the size of the posterior: a wall must not
        # stop the tuning.
        variance = torch.where(lost, 1.0, error.square() / dim).mean(0)
        counts = torch.full((chains,), 2 * steps, device=error.device)
        return MCLMCState(*end), MCLMCInfo(variance, lost.any(0), counts)

    return Kernel(init, step)


class _Tuning(NamedTuple):
    """What warm-up has learned so far; see `mclmc_warm_up`."""

    chain: MCLMCState
    log_step: float
    log_factor: float  # of the energy error's variance, beside the sixth power of the step
    updates: int  # transitions since the mass matrix last changed
    inverse_mass_matrix: Tensor  # (chain, dim)
    L: float
    moments: Moments
    done: int


def mclmc_warm_up(
    log_joint_and_grad: LogDensityAndGrad,
    n: int,
    *,
    energy_variance: float,
    thinning: int,
    step_size: float,
    L: float | None = None,
    ranks: Ranks = ALONE,
) -> WarmUp:
    """Tune step size, diagonal mass matrix and L of `mclmc` in ``n`` transitions of ``thinning``
    steps.

    The step size is the one whose energy errors have the wanted variance per dimension, over all
    chains of all processes. Each chain has a mass matrix of its own, as for `trajectory_warm_up`,
    estimated in windows of doubling length. L is sqrt(dim), the root of the summed variances in the
    coordinates that the mass matrix scales: the second stage of the published tuning. Its third,
    which shortens L by the autocorrelation seen, is left out: it made the predictions of networks
    mix more slowly (docs/lab-notebook.md).

    Args:
        log_joint_and_grad: see `mclmc`.
        n: number of transitions.
        energy_variance: see `MCLMC`.
        thinning: see `MCLMC`.
        step_size: first guess.
        L: a fixed value, if there is one.
        ranks: the processes that share the chains.
    """
    ends = window_ends(n)

    def init(theta: Tensor, generator: torch.Generator) -> _Tuning:
        mass = torch.ones_like(theta)
        chain = mclmc(log_joint_and_grad, step_size, 1.0, mass).init(theta, generator)
        log = math.log(step_size)
        first_L = L or math.sqrt(theta.shape[1])
        return _Tuning(chain, log, 0.0, 0, mass, first_L, Moments.start(theta, mass), 0)

    def kernel(log_step: float, tuning: _Tuning) -> Kernel:
        mass, step = tuning.inverse_mass_matrix, math.exp(log_step)
        return mclmc(log_joint_and_grad, step, tuning.L, mass, thinning)

    def step(tuning: _Tuning, generator: torch.Generator) -> tuple[_Tuning, MCLMCInfo]:
        chain, info = kernel(tuning.log_step, tuning).step(tuning.chain, generator)
        count, done = tuning.updates + 1, tuning.done + 1
        # The variance is about a factor times the sixth power of the step. The factor's mean is
        # dominated by few large errors, which the median never sees; under a sixth root they do not
        # throw the step.
        error = max(float(ranks.mean(info.energy_variance.mean())), 1e-30)
        rate, log_factor = max(0.02, 1 / count), math.log(error) - 6 * tuning.log_step
        if count > 1:
            log_factor = float(
                np.logaddexp(
                    math.log1p(-rate) + tuning.log_factor, math.log(rate) + log_factor
                )
            )
        wanted = (math.log(energy_variance) - log_factor) / 6
        log_step = tuning.log_step + max(-0.3, min(0.1, wanted - tuning.log_step))
        tuning = tuning._replace(
            chain=chain, log_step=log_step, log_factor=log_factor, updates=count, done=done,
            moments=tuning.moments.update(chain.theta),
        )  # fmt: skip
        if done in ends[1:]:
            mass = tuning.moments.inverse_mass_matrix(tuning.inverse_mass_matrix, ranks)
            # The same step, in the new coordinates.
            shrunk = (mass.double() / tuning.inverse_mass_matrix).log().mean()
            log_step -= 0.5 * float(ranks.mean(shrunk))
            tuning = tuning._replace(inverse_mass_matrix=mass, log_step=log_step, updates=0)
        if done in ends:
            tuning = tuning._replace(
                moments=Moments.start(chain.theta, tuning.inverse_mass_matrix)
            )
        return tuning, info

    def tuned(tuning: _Tuning) -> Tuned:
        found = {
            "step_size": math.exp(tuning.log_step),
            "L": tuning.L,
            "exact": False,
            "energy_variance": energy_variance,
        }
        return Tuned(kernel(tuning.log_step, tuning), tuning.chain, found)

    return WarmUp(init, step, tuned)


@dataclass(frozen=True)
class MCLMC(Method):
    """Sample with unadjusted microcanonical Langevin dynamics, tuned during warm-up (Robnik et al.
    2023).

    The recipe of microcanonical Langevin ensembles for networks (Sommer et al. 2025): chains start
    at the members of an ensemble trained to the mode, and the energy errors decide the step size.
    Approximates the posterior, with a bias that grows with ``energy_variance``; see `mclmc` and
    `mclmc_warm_up`. `AdjustedMCLMC` has none.

    Args:
        energy_variance: variance of a step's energy error, per dimension, that warm-up aims at.
        thinning: steps, of two gradients each, between draws.
        L: distance after which a direction is forgotten; None lets warm-up choose it.
        step_size: first guess.
    """

    energy_variance: float = 0.005
    thinning: int = 10
    L: float | None = None
    step_size: float = 0.1

    def __post_init__(self) -> None:
        settle(self, number, "energy_variance", "L", "step_size", above=0)
        settle(self, integer, "thinning", least=1)

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Run the chains; see `bnnflow.sample`.

        A transition of warm-up has ``thinning`` steps as well.
        """
        if model.dim < 2:
            raise ValueError(
                "MCLMC turns directions, and needs a model of at least two dimensions"
            )
        chains, warmup, draws = (
            run.chains_or(16),
            500 if run.warmup is None else run.warmup,
            run.draws or 1000,
        )
        process = mclmc_warm_up(
            model.target,
            warmup,
            energy_variance=self.energy_variance,
            thinning=self.thinning,
            step_size=self.step_size,
            L=self.L,
            ranks=run.ranks,
        )
        return run_chains(
            model, run, process, chains=chains, warmup=warmup, draws=draws, name="MCLMC"
        )
