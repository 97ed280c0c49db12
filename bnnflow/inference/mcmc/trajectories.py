"""What Hamiltonian and microcanonical samplers share: jittered trajectories, accepted or not, and
their tuning.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from bnnflow.arguments import integer, number, settle
from bnnflow.draws import Draws
from bnnflow.dynamics import DIVERGENCE
from bnnflow.inference.loop import Tuned, WarmUp, run_chains
from bnnflow.inference.mcmc.mass import Moments
from bnnflow.inference.mcmc.warmup import DualAveraging, TrajectoryLength, window_ends
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.ranks import ALONE, Ranks
from bnnflow.types import Kernel, LogDensityAndGrad

__all__ = [
    "ChainState",
    "Proposal",
    "Trajectories",
    "Trajectory",
    "TrajectoryInfo",
    "metropolis",
    "predictions_as_features",
    "trajectory_warm_up",
]


class ChainState(NamedTuple):
    """Where every chain is, with the density and its gradient there."""

    theta: Tensor  # (chain, dim)
    log_joint: Tensor  # (chain,), float64
    grad: Tensor  # (chain, dim)


class TrajectoryInfo(NamedTuple):
    """What a person wants to know of one transition; ``(chain,)`` each."""

    acceptance_rate: Tensor
    diverging: Tensor
    energy: Tensor
    n_steps: Tensor
    step_size: Tensor


class Proposal(NamedTuple):
    """The end of a trajectory, before it is accepted or not."""

    state: ChainState
    velocity: (
        Tensor  # (chain, dim), d theta / d time in coordinates scaled by the mass matrix
    )
    start_energy: Tensor  # (chain,), float64
    end_energy: Tensor  # (chain,), float64


class Trajectory(Protocol):
    """Integrate ``n_steps`` steps of a reversible flow that keeps exp(-energy), from newly drawn
    velocities.
    """

    def __call__(
        self,
        state: ChainState,
        step_size: Tensor,
        scale: Tensor,
        n_steps: int | Tensor,
        generator: torch.Generator,
    ) -> Proposal:
        """Take steps of size ``(chain, 1)`` in the coordinates that ``scale`` maps to weights, as
        many for all chains or for every chain its own ``(chain,)``.
        """
        ...


def _accept(
    state: ChainState,
    proposal: Proposal,
    step_size: Tensor,
    n_steps: int | Tensor,
    generator: torch.Generator,
) -> tuple[ChainState, TrajectoryInfo]:
    """Accept every chain's proposal with probability min(1, exp(-energy error))."""
    end, _, start_energy, end_energy = proposal
    error = end_energy - start_energy
    diverging = ~(error < DIVERGENCE)  # NaN counts
    rate = torch.where(diverging, 0.0, (-error).clamp(max=0).exp())
    accept = (
        torch.rand(rate.shape, generator=generator, device=rate.device, dtype=rate.dtype)
        < rate
    )
    moved = ChainState(
        torch.where(accept[:, None], end.theta, state.theta),
        torch.where(accept, end.log_joint, state.log_joint),
        torch.where(accept[:, None], end.grad, state.grad),
    )
    energy = torch.where(accept, end_energy, start_energy)
    counts = torch.as_tensor(n_steps, device=rate.device).expand(rate.shape)
    return moved, TrajectoryInfo(rate, diverging, energy, counts, step_size.squeeze(1))


def metropolis(
    log_joint_and_grad: LogDensityAndGrad,
    trajectory: Trajectory,
    step_size: float | Tensor,
    n_leapfrog: int | Tensor,
    inverse_mass_matrix: Tensor,
    *,
    step_jitter: float = 0.2,
    trajectory_jitter: float = 0.5,
) -> Kernel:
    """Build the kernel that follows ``trajectory`` and accepts its end, or stays.

    Leaves exp(log_joint) invariant: the step size of every chain and the number of steps are drawn
    anew before each transition, independently of the state.

    Args:
        log_joint_and_grad: ``(chain, dim) -> (chain,), (chain, dim)``.
        trajectory: the flow.
        step_size: time of one step in coordinates scaled by the square root of
            ``inverse_mass_matrix``; one for all chains, or ``(chain, 1)``.
        n_leapfrog: the largest number of steps, for all chains or for every chain its own
            ``(chain,)``.
        inverse_mass_matrix: a diagonal ``(dim,)`` or ``(chain, dim)``, ideally the posterior
            variances.
        step_jitter: step sizes are uniform within this fraction of ``step_size``, per chain.
        trajectory_jitter: numbers of steps are uniform between this fraction of ``n_leapfrog`` and
            all of it.
    """
    scale = inverse_mass_matrix.sqrt()

    def init(theta: Tensor, generator: torch.Generator) -> ChainState:
        return ChainState(theta, *log_joint_and_grad(theta))

    def step(
        state: ChainState, generator: torch.Generator
    ) -> tuple[ChainState, TrajectoryInfo]:
        steps, n_steps = _jittered(
            state.theta, step_size, step_jitter, n_leapfrog, trajectory_jitter, generator
        )
        proposal = trajectory(state, steps, scale, n_steps, generator)
        return _accept(state, proposal, steps, n_steps, generator)

    return Kernel(init, step)


def _jittered(
    theta: Tensor,
    step_size: float | Tensor,
    step_jitter: float,
    most: int | Tensor,
    jitter: float,
    generator: torch.Generator,
) -> tuple[Tensor, int | Tensor]:
    """Draw step sizes ``(chain, 1)`` and numbers of steps: one, or the same part of every chain's
    own.
    """
    uniform = torch.rand(
        len(theta), 1, generator=generator, device=theta.device, dtype=theta.dtype
    )
    sizes = step_size * (1 + step_jitter * (2 * uniform - 1))
    if isinstance(most, Tensor):
        part = torch.rand((), generator=generator, device=theta.device)
        part = jitter + (1 - jitter) * part
        return sizes, (part * most).round().long().clamp(min=1)
    fewest = max(1, round(jitter * most))
    n_steps = int(
        torch.randint(fewest, most + 1, (), generator=generator, device=theta.device)
    )
    return sizes, n_steps


# ---------------------------------------- warm-up

_FIRST_LEAPFROGS = 64
"""The most steps of a transition before the first mass matrix."""

Features = Callable[[Tensor], Tensor]
"""``(chain, dim) -> (chain, features)``: what the chains are to decorrelate."""


def predictions_as_features(model: BayesianModel, rows: int = 32) -> Features | None:
    """Return what the network predicts at some training inputs, and all that is inferred beside its
    weights.

    Weights that differ by a symmetry predict the same, and weights that hardly matter may move as
    slowly as they like: predictions are what chains can compare. A single layer has no such
    weights, and None stands for the weights.
    """
    if len(model.spec.layers) == 1:
        return None
    x = model.x[:: max(1, len(model.x) // rows)]
    first = model.spec.network.dim

    def features(theta: Tensor) -> Tensor:
        outputs = model.outputs(theta, x)
        if model.likelihood.kind == "classification" and outputs.shape[-1] > 1:
            outputs = outputs - outputs.mean(-1, keepdim=True)  # what the softmax sees
        return torch.cat([outputs.flatten(1), theta[:, first:]], 1)

    return features


class _Tuning(NamedTuple):
    """What warm-up has learned so far; see `trajectory_warm_up`."""

    chain: ChainState
    step: DualAveraging
    length: TrajectoryLength
    inverse_mass_matrix: Tensor  # (chain, dim)
    moments: Moments
    done: int


def trajectory_warm_up(
    log_joint_and_grad: LogDensityAndGrad,
    trajectory: Trajectory,
    n: int,
    settings: Trajectories,
    *,
    unit: float = 1.0,
    features: Features | None = None,
    ranks: Ranks = ALONE,
) -> WarmUp:
    """Tune step size, trajectory length and diagonal mass matrix of a `metropolis` kernel in ``n``
    transitions.

    All chains, over all processes, share one step size, found by dual averaging, and one trajectory
    length, found by `TrajectoryLength`. Every chain has a mass matrix of its own, because chains of
    a network sit in modes that are copies of each other with the units exchanged: the variances
    within the chain, shrunk towards those pooled over all chains. They are re-estimated in windows
    of doubling length.

    Args:
        log_joint_and_grad: see `metropolis`.
        trajectory: see `metropolis`.
        n: number of transitions.
        settings: what warm-up aims at, and where it begins.
        unit: of time. Lengths begin at seven tenths of it, and are never shorter; step sizes begin
            at a tenth.
        features: what is to decorrelate; the weights if None.
        ranks: the processes that share the chains.
    """
    ends = window_ends(n)
    step_size = settings.step_size or 0.1 * unit
    trajectory_length, max_leapfrog = settings.trajectory_length, settings.max_leapfrog

    def followed(theta: Tensor) -> Tensor:
        return (features(theta) if features else theta).double()

    def init(theta: Tensor, generator: torch.Generator) -> _Tuning:
        chain = ChainState(theta, *log_joint_and_grad(theta))
        length = TrajectoryLength.start(trajectory_length or 0.7 * unit, followed(theta))
        mass = torch.ones_like(theta)
        adapt, moments = DualAveraging.start(step_size), Moments.start(theta, mass)
        return _Tuning(chain, adapt, length, mass, moments, done=0)

    def step(tuning: _Tuning, generator: torch.Generator) -> tuple[_Tuning, TrajectoryInfo]:
        chain, adapt, length, mass, moments, done = tuning
        scale = mass.sqrt()
        if trajectory_length is None:
            longest = 0.75 * max_leapfrog * adapt.step_size
            number, time = length.candidate(longest, generator)
        else:
            number, time = 0, trajectory_length
        most = _leapfrogs(adapt.step_size, time, max_leapfrog)
        # the mass matrix is yet unknown, and a length in its units means nothing
        if len(ends) > 1 and done < ends[1]:
            most = min(most, _FIRST_LEAPFROGS)
        steps, n_steps = _jittered(chain.theta, adapt.step_size, 0.2, most, 0.5, generator)
        proposal = trajectory(chain, steps, scale, n_steps, generator)
        moved, info = _accept(chain, proposal, steps, n_steps, generator)
        acceptance = float(ranks.mean(info.acceptance_rate.mean()))
        adapt = adapt.update(acceptance, settings.target_acceptance)
        if trajectory_length is None and done >= ends[0]:
            start, end = followed(chain.theta), followed(proposal.state.theta)
            length = length.update(number, _jump(start, end, info.acceptance_rate, ranks))
        moments, done = moments.update(moved.theta), done + 1
        if done in ends[1:]:
            mass = moments.inverse_mass_matrix(mass, ranks)
            adapt = DualAveraging.start(adapt.averaged)
        if done in ends:
            moments = Moments.start(moved.theta, mass)
        return _Tuning(moved, adapt, length, mass, moments, done), info

    def tuned(tuning: _Tuning) -> Tuned:
        step, length = (
            tuning.step.averaged if tuning.done else step_size,
            tuning.length.length,
        )
        n_leapfrog = _leapfrogs(step, length, max_leapfrog)
        mass = tuning.inverse_mass_matrix
        kernel = metropolis(log_joint_and_grad, trajectory, step, n_leapfrog, mass)
        found = {"step_size": step, "n_leapfrog": n_leapfrog, "trajectory_length": length}
        return Tuned(kernel, tuning.chain, found)

    return WarmUp(init, step, tuned)


def _leapfrogs(step_size: float, length: float, most: int) -> int:
    """Return the largest number of steps, of which the mean of a uniform number between its half
    and all of it goes as far as ``length``.
    """
    return max(1, min(most, round(length / (0.75 * step_size))))


@dataclass(frozen=True)
class Trajectories(Method):
    """What methods of accepted trajectories share: their settings, and how a run of them goes."""

    target_acceptance: float = 0.8
    trajectory_length: float | None = None
    max_leapfrog: int = 1024
    step_size: float | None = None

    name: ClassVar[str]  # for the progress bar

    def __post_init__(self) -> None:
        settle(self, number, "target_acceptance", above=0, below=1)
        settle(self, number, "trajectory_length", "step_size", above=0)
        settle(self, integer, "max_leapfrog", least=1)

    @abstractmethod
    def trajectory(self, log_joint_and_grad: LogDensityAndGrad) -> Trajectory:
        """Return trajectories that preserve the density."""

    def unit(self, dim: int) -> float:
        """Return the time in which a standard normal in ``dim`` dimensions is crossed."""
        return 1.0

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Run the chains; see `bnnflow.sample`."""
        chains, warmup, draws = (
            run.chains_or(16),
            500 if run.warmup is None else run.warmup,
            run.draws or 1000,
        )
        target = model.target
        process = trajectory_warm_up(
            target,
            self.trajectory(target),
            warmup,
            self,
            unit=self.unit(model.dim),
            features=predictions_as_features(model),
            ranks=run.ranks,
        )
        return run_chains(
            model, run, process, chains=chains, warmup=warmup, draws=draws, name=self.name
        )


def _jump(start: Tensor, end: Tensor, rate: Tensor, ranks: Ranks) -> Tensor:
    """Return the mean over chains of the squared jumps from ``start`` to ``end``
    ``(chain, features)``.

    Proposals count by their probability of being accepted.
    """
    usable = (rate > 0) & end.isfinite().all(1)
    return ranks.mean(
        torch.where(usable[:, None], (end - start).square() * rate[:, None], 0.0).mean(0)
    )
