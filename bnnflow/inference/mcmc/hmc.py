"""Hamiltonian Monte Carlo over many chains at once, with a trajectory length that the chains find
together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bnnflow.compiled import normal_like
from bnnflow.dynamics import Point, Scheme, Target
from bnnflow.gaussian import Gaussian
from bnnflow.inference.mcmc.trajectories import (
    ChainState,
    Proposal,
    Trajectories,
    Trajectory,
    metropolis,
)
from bnnflow.types import Kernel, LogDensityAndGrad

__all__ = ["HMC", "hmc", "leapfrog", "rotation"]


def leapfrog(log_joint_and_grad: LogDensityAndGrad) -> Trajectory:
    """Return the leapfrog trajectories of H = p M^-1 p / 2 - log_joint from momenta p ~ N(0, M)."""
    target = Target.of(log_joint_and_grad)

    def energy(point: Point) -> Tensor:
        return 0.5 * point.velocity.square().sum(-1, dtype=torch.float64) - point.log_joint

    def trajectory(
        state: ChainState,
        step_size: Tensor,
        scale: Tensor,
        n_steps: int | Tensor,
        generator: torch.Generator,
    ) -> Proposal:
        # Momenta are kept in units of M^(1/2), so that their law is standard normal.
        momentum = normal_like(state.theta, generator)
        start = Point(state.theta, momentum, state.log_joint, state.grad)
        end = target.hamiltonian(start, step_size, scale, Scheme.leapfrog(n_steps))
        moved = ChainState(end.theta, end.log_joint, end.grad)
        return Proposal(moved, end.velocity, energy(start), energy(end))

    return trajectory


def rotation(log_joint_and_grad: LogDensityAndGrad, around: Gaussian) -> Trajectory:
    """Return trajectories that turn in a Gaussian as it turns, exactly, pushed by what else there
    is.

    In coordinates z in which ``around`` is N(0, I), steps of H = |p|^2 / 2 - log_joint are split
    into half a kick by the gradient of log_joint + |z|^2 / 2, a rotation of z and p by the step,
    and half a kick (Beskos et al. 2011). Where exp(log_joint) is ``around`` there is no error,
    however long the step: a quarter turn forgets everything.

    Args:
        log_joint_and_grad: ``(chain, dim) -> (chain,), (chain, dim)``.
        around: ideally near what is left invariant.
    """
    root, loc = around.scale_tril, around.loc

    def trajectory(
        state: ChainState,
        step_size: Tensor,
        scale: Tensor,
        n_steps: int | Tensor,
        generator: torch.Generator,
    ) -> Proposal:
        theta, log_joint, grad = state
        z = torch.linalg.solve_triangular(root, (theta - loc).T, upper=False).T
        p = normal_like(z, generator)
        start_energy = 0.5 * p.square().sum(-1, dtype=torch.float64) - log_joint
        cos, sin = step_size.cos(), step_size.sin()
        for _ in range(n_steps):
            p = p + 0.5 * step_size * (grad @ root + z)
            z, p = cos * z + sin * p, cos * p - sin * z
            theta = loc + z @ root.T
            log_joint, grad = log_joint_and_grad(theta)
            p = p + 0.5 * step_size * (grad @ root + z)
        end_energy = 0.5 * p.square().sum(-1, dtype=torch.float64) - log_joint
        return Proposal(ChainState(theta, log_joint, grad), p, start_energy, end_energy)

    return trajectory


def hmc(
    log_joint_and_grad: LogDensityAndGrad,
    step_size: float | Tensor,
    n_leapfrog: int | Tensor,
    inverse_mass_matrix: Tensor,
    *,
    step_jitter: float = 0.2,
    trajectory_jitter: float = 0.5,
) -> Kernel:
    """Build the Hamiltonian Monte Carlo kernel (Duane et al. 1987; Neal 2011).

    With M^-1 the ``inverse_mass_matrix``, momenta p ~ N(0, M) are drawn, ``n_leapfrog`` leapfrog
    steps taken and the end point accepted with probability min(1, exp(H - H')), H = p M^-1 p / 2 -
    log_joint. Leaves exp(log_joint) invariant exactly.

    Args:
        log_joint_and_grad: ``(chain, dim) -> (chain,), (chain, dim)``.
        step_size: leapfrog step in coordinates scaled by the root of ``inverse_mass_matrix``; one
            for all chains, or ``(chain, 1)``.
        n_leapfrog: the largest number of steps, for all chains or for every chain its own
            ``(chain,)``.
        inverse_mass_matrix: a diagonal ``(dim,)`` or ``(chain, dim)``, ideally the posterior
            variances.
        step_jitter: step sizes are uniform within this fraction of ``step_size``, per chain.
        trajectory_jitter: numbers of steps are uniform between this fraction of ``n_leapfrog`` and
            all of it.
    """
    return metropolis(
        log_joint_and_grad,
        leapfrog(log_joint_and_grad),
        step_size,
        n_leapfrog,
        inverse_mass_matrix,
        step_jitter=step_jitter,
        trajectory_jitter=trajectory_jitter,
    )


@dataclass(frozen=True)
class HMC(Trajectories):
    """Sample with Hamiltonian Monte Carlo, tuned during warm-up.

    Leaves the posterior invariant exactly once warm-up has ended; see `hmc` and
    `trajectory_warm_up`.

    Args:
        target_acceptance: the mean acceptance rate that warm-up aims at.
        trajectory_length: mean integration time in units of the posterior's standard deviations;
            None lets the chains find together what makes their predictions decorrelate fastest.
        max_leapfrog: bound on the leapfrog steps of one transition, whatever the step size.
        step_size: first guess; None for a tenth.
    """

    target_acceptance: float = 0.8

    name: ClassVar[str] = "HMC"

    def trajectory(self, log_joint_and_grad: LogDensityAndGrad) -> Trajectory:
        """Return leapfrog trajectories."""
        return leapfrog(log_joint_and_grad)
