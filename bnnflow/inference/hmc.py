"""Hamiltonian Monte Carlo over many chains at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bnnflow.draws import Draws
from bnnflow.inference.loop import run
from bnnflow.inference.start import WARM_START, starting_points
from bnnflow.inference.warmup import warm_up
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.types import Kernel, LogDensityAndGrad

__all__ = ["HMC", "HMCInfo", "HMCState", "hmc"]


class HMCState(NamedTuple):
    """Where every chain is, with the density and its gradient there."""

    theta: Tensor  # (chain, dim)
    log_joint: Tensor  # (chain,), float64
    grad: Tensor  # (chain, dim)


class HMCInfo(NamedTuple):
    """What a person wants to know of one transition; ``(chain,)`` each."""

    acceptance_rate: Tensor
    diverging: Tensor
    energy: Tensor
    n_steps: Tensor


_DIVERGENCE = 1000.0  # nats of energy error beyond which a trajectory has left the level set (Stan's bound)


def hmc(
    log_joint_and_grad: LogDensityAndGrad,
    step_size: float,
    n_leapfrog: int,
    inverse_mass_matrix: Tensor,
    *,
    step_jitter: float = 0.2,
    trajectory_jitter: float = 0.5,
) -> Kernel:
    """Build the Hamiltonian Monte Carlo kernel (Duane et al. 1987; Neal 2011).

    With M^-1 the diagonal ``inverse_mass_matrix``, momenta p ~ N(0, M) are drawn, ``n_leapfrog`` leapfrog steps taken
    and the end point accepted with probability min(1, exp(H - H')), H = p M^-1 p / 2 - log_joint. Leaves
    exp(log_joint) invariant exactly: the step size of every chain and the number of steps are drawn anew before each
    transition, independently of the state.

    Args:
        log_joint_and_grad: ``(chain, dim) -> (chain,), (chain, dim)``.
        step_size: leapfrog step in coordinates scaled by the square root of ``inverse_mass_matrix``.
        n_leapfrog: the largest number of steps.
        inverse_mass_matrix: ``(dim,)``, ideally the posterior variances.
        step_jitter: step sizes are uniform within this fraction of ``step_size``, per chain.
        trajectory_jitter: numbers of steps are uniform between this fraction of ``n_leapfrog`` and all of it.
    """
    scale = inverse_mass_matrix.sqrt()
    fewest = max(1, round(trajectory_jitter * n_leapfrog))

    def init(theta: Tensor, generator: torch.Generator) -> HMCState:
        return HMCState(theta, *log_joint_and_grad(theta))

    def step(state: HMCState, generator: torch.Generator) -> tuple[HMCState, HMCInfo]:
        theta, log_joint, grad = state
        chains, device = theta.shape[0], theta.device
        # Momenta are kept in units of M^(1/2), so that their law is standard normal.
        momentum = torch.randn(theta.shape, generator=generator, device=device, dtype=theta.dtype)
        jitter = torch.rand(chains, 1, generator=generator, device=device, dtype=theta.dtype)
        steps = step_size * (1 + step_jitter * (2 * jitter - 1)) * scale  # (chain, dim)
        n_steps = int(torch.randint(fewest, n_leapfrog + 1, (), generator=generator, device=device))
        energy = 0.5 * momentum.square().sum(-1, dtype=torch.float64) - log_joint

        new_theta, new_grad, new_log_joint = theta, grad, log_joint
        momentum = momentum + 0.5 * steps * new_grad
        for i in range(n_steps):
            new_theta = new_theta + steps * momentum
            new_log_joint, new_grad = log_joint_and_grad(new_theta)
            momentum = momentum + (steps if i < n_steps - 1 else 0.5 * steps) * new_grad
        new_energy = 0.5 * momentum.square().sum(-1, dtype=torch.float64) - new_log_joint

        error = new_energy - energy
        diverging = ~(error < _DIVERGENCE)  # NaN counts
        acceptance = torch.where(diverging, 0.0, (-error).clamp(max=0).exp())
        accept = torch.rand(chains, generator=generator, device=device, dtype=torch.float64) < acceptance
        state = HMCState(
            torch.where(accept[:, None], new_theta, theta),
            torch.where(accept, new_log_joint, log_joint),
            torch.where(accept[:, None], new_grad, grad),
        )
        counts = torch.full((chains,), n_steps, device=device)
        return state, HMCInfo(acceptance, diverging, torch.where(accept, new_energy, energy), counts)

    return Kernel(init, step)


@dataclass(frozen=True)
class HMC:
    """Sample with Hamiltonian Monte Carlo, tuned during warm-up.

    Leaves the posterior invariant exactly once warm-up has ended. All chains share one step size, found by dual
    averaging, and one diagonal mass matrix, pooled over chains.

    Args:
        target_acceptance: the mean acceptance rate that warm-up aims at.
        trajectory_length: integration time in units of the posterior's standard deviations; pi / 2 is ideal for a
            Gaussian.
        max_leapfrog: bound on the leapfrog steps of one transition, whatever the step size.
        step_size: first guess.
    """

    target_acceptance: float = 0.8
    trajectory_length: float = 1.5
    max_leapfrog: int = 128
    step_size: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must be in (0, 1), got {self.target_acceptance}")
        for name in ("trajectory_length", "max_leapfrog", "step_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def sample(
        self,
        model: BayesianModel,
        *,
        chains: int | None,
        warmup: int | None,
        draws: int | None,
        generator: torch.Generator,
        init,
        progress: bool,
    ) -> Draws:
        """Run the chains; see `bnnflow.sample`."""
        chains, warmup, draws = chains or 16, 500 if warmup is None else warmup, draws or 1000
        target = torch.no_grad()(model.log_joint_and_grad)
        theta = starting_points(model, chains, init, generator, progress)
        with progress_bar(warmup + draws, "HMC", progress, "draw") as bar:
            tuned = warm_up(
                lambda step_size, n_leapfrog, mass: hmc(target, step_size, n_leapfrog, mass),
                theta,
                warmup,
                generator,
                bar,
                target_acceptance=self.target_acceptance,
                trajectory_length=self.trajectory_length,
                max_leapfrog=self.max_leapfrog,
                step_size=self.step_size,
            )
            result = run(tuned.kernel, tuned.state, draws, generator, bar)
        sampling = int(result.stats["n_steps"][0].sum()) if result.draws else 0
        info = {
            "step_size": tuned.step_size,
            "n_leapfrog": tuned.n_leapfrog,
            "warmup": warmup,
            "gradients_per_chain": tuned.gradients + sampling + (WARM_START if init is None else 0),
            "divergences": int(result.stats["diverging"].sum()),
        }
        return Draws(result.theta, result.log_joint, result.stats, info=info | result.info)
