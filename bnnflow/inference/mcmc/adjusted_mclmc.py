"""Microcanonical trajectories with a Metropolis correction: exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bnnflow.draws import Draws
from bnnflow.dynamics import Point, Scheme, Target, random_directions
from bnnflow.inference.mcmc.trajectories import (
    ChainState,
    Proposal,
    Trajectories,
    Trajectory,
    metropolis,
)
from bnnflow.method import Run
from bnnflow.model import BayesianModel
from bnnflow.types import Kernel, LogDensityAndGrad

__all__ = ["AdjustedMCLMC", "adjusted_mclmc", "microcanonical"]


def microcanonical(log_joint_and_grad: LogDensityAndGrad) -> Trajectory:
    """Return leapfrog trajectories of dx/dt = u, du/dt = (I - u u^T) grad log_joint / (dim - 1),
    |u| = 1.

    They keep exp(log_joint) times the uniform law of directions: what the energy lacks is the
    change of volume.
    """
    target = Target.of(log_joint_and_grad)

    def trajectory(
        state: ChainState,
        step_size: Tensor,
        scale: Tensor,
        n_steps: int | Tensor,
        generator: torch.Generator,
    ) -> Proposal:
        direction = random_directions(state.theta, generator)
        start = Point(state.theta, direction, state.log_joint, state.grad)
        end, error = target.microcanonical(
            start, step_size, scale, Scheme.leapfrog(n_steps)
        )
        moved = ChainState(end.theta, end.log_joint, end.grad)
        return Proposal(moved, end.velocity, -state.log_joint, error - state.log_joint)

    return trajectory


def adjusted_mclmc(
    log_joint_and_grad: LogDensityAndGrad,
    step_size: float,
    n_leapfrog: int,
    inverse_mass_matrix: Tensor,
    *,
    step_jitter: float = 0.2,
    trajectory_jitter: float = 0.5,
) -> Kernel:
    """Build the Metropolis-adjusted microcanonical kernel (Robnik, Cohn-Gordon and Seljak 2025).

    Draws a direction uniformly, takes ``n_leapfrog`` microcanonical leapfrog steps and accepts
    their end with probability min(1, exp(-energy error)), the volume's change included. Leaves
    exp(log_joint) invariant exactly.

    Args:
        log_joint_and_grad: ``(chain, dim) -> (chain,), (chain, dim)``.
        step_size: distance of a step in coordinates scaled by the square root of
            ``inverse_mass_matrix``; about sqrt(dim) times that of Hamiltonian Monte Carlo, whose
            velocities have that length.
        n_leapfrog: the largest number of steps.
        inverse_mass_matrix: a diagonal ``(dim,)`` or ``(chain, dim)``, ideally the posterior
            variances.
        step_jitter: step sizes are uniform within this fraction of ``step_size``, per chain.
        trajectory_jitter: numbers of steps are uniform between this fraction of ``n_leapfrog`` and
            all of it.
    """
    return metropolis(
        log_joint_and_grad,
        microcanonical(log_joint_and_grad),
        step_size,
        n_leapfrog,
        inverse_mass_matrix,
        step_jitter=step_jitter,
        trajectory_jitter=trajectory_jitter,
    )


@dataclass(frozen=True)
class AdjustedMCLMC(Trajectories):
    """Sample with Metropolis-adjusted microcanonical trajectories, tuned during warm-up.

    Leaves the posterior invariant exactly once warm-up has ended; see `adjusted_mclmc` and
    `trajectory_warm_up`.

    Args:
        target_acceptance: the mean acceptance rate that warm-up aims at.
        trajectory_length: mean distance of a transition, in units of the posterior's standard
            deviations; None lets the chains find together what makes their predictions decorrelate
            fastest.
        max_leapfrog: bound on the steps of one transition, whatever the step size.
        step_size: first guess; None for a tenth of sqrt(dim).
    """

    target_acceptance: float = 0.9

    name: ClassVar[str] = "adjusted MCLMC"

    def trajectory(self, log_joint_and_grad: LogDensityAndGrad) -> Trajectory:
        """Return microcanonical trajectories."""
        return microcanonical(log_joint_and_grad)

    def unit(self, dim: int) -> float:
        """Return sqrt(dim): a particle of unit speed takes so long to cross the posterior."""
        return math.sqrt(dim)

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Run the chains; see `bnnflow.sample`."""
        if model.dim < 2:
            raise ValueError(
                "AdjustedMCLMC turns directions, and needs a model of at least two dimensions"
            )
        return super().draw(model, run)
