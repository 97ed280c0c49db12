"""Stochastic-gradient Hamiltonian Monte Carlo: Langevin dynamics with momentum and friction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bnnflow.arguments import checked, choice, flag, settle
from bnnflow.compiled import normal_like
from bnnflow.draws import Draws
from bnnflow.inference.stochastic.burn_in import Scheme, check, run_stochastic
from bnnflow.inference.stochastic.gradients import (
    Scales,
    StochasticTarget,
    clip_or_revert,
    constant_statistic,
)
from bnnflow.inference.stochastic.schedules import Constant, Schedule
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.types import Kernel

__all__ = [
    "SGHMC",
    "MomentumDraw",
    "MomentumInfo",
    "SGHMCState",
    "friction_of",
    "kick_limit",
    "momentum_info",
    "sghmc",
    "stable_steps",
]


_CONSTANT = Constant()


class SGHMCState(NamedTuple):
    """Where every chain is and how it moves, with the estimates of the density and its gradient
    there.
    """

    theta: Tensor  # (chain, dim)
    log_joint: Tensor  # (chain,), float64
    grad: Tensor  # (chain, dim)
    # (chain, dim), in units of the square root of the mass, before the kick of ``grad``
    momentum: Tensor
    done: int  # steps


class MomentumInfo(NamedTuple):
    """What a person wants to know of one step; ``(chain,)`` each."""

    n_steps: Tensor
    diverging: Tensor
    step_size: Tensor
    kinetic_temperature: Tensor


class MomentumDraw(NamedTuple):
    """What a person wants to know of one draw; ``(chain,)`` each."""

    n_steps: Tensor
    diverging: Tensor
    step_size: Tensor
    kinetic_temperature: Tensor
    configurational_temperature: Tensor


def sghmc(
    target: StochasticTarget,
    step_size: float,
    metric: Tensor,
    friction: float,
    *,
    noise: Tensor | None = None,
    schedule: Schedule = Constant(),
    cost: int = 1,
) -> Kernel:
    """Build the kernel of stochastic-gradient Hamiltonian Monte Carlo (Chen et al. 2014),
    symmetrically split.

    Discretises dtheta = G^(1/2) p dt, dp = G^(1/2) g dt - friction p dt + N(0, 2 friction dt), with
    G the diagonal ``metric`` (the inverse mass) and p standard normal, by BAOAB (Leimkuhler and
    Matthews 2013), one gradient a step. The last half kick of a step is made together with the
    first of the next, which has the same gradient:

        p <- p + h G^(1/2) g; theta <- theta + (h / 2) G^(1/2) p; p <- c p + N(0, 1 - c^2), c =
        exp(-friction h) theta <- theta + (h / 2) G^(1/2) p; g <- gradient at theta

    Temperature is the model's: the noise has unit temperature. With full gradients approximates
    exp(log_joint) with a bias of order h^2, none on a Gaussian, where it is stable for h sqrt(l) <
    2, l the largest eigenvalue of G^(1/2) H G^(1/2). Noise of variance v in G^(1/2) g heats the
    chain by about h v / (2 friction), of order h.

    Args:
        target: estimates of log_joint and its gradient.
        step_size: h at scale 1; the schedule's scale is one of h^2.
        metric: G, ``(dim,)``.
        friction: per unit of time.
        noise: variance of the noise of g, ``(dim,)``, if the friction's own noise is to be lowered
            by as much (B-hat of the paper): 1 - c^2 (1 + h^2 G noise), or none where that is
            negative.
        schedule: of the step size; where it does not sample, there is friction but no noise.
        cost: gradients a step, for ``n_steps``; mini-batch gradients count as one each.
    """
    root = metric.sqrt()

    def init(theta: Tensor, generator: torch.Generator) -> SGHMCState:
        momentum = normal_like(theta, generator)
        state = SGHMCState(theta, *target(theta, generator), momentum, 0)
        before = state._replace(grad=torch.zeros_like(theta))
        return clip_or_revert(state, lambda: before, root, kick_limit(theta, step_size))[0]

    def step(
        state: SGHMCState, generator: torch.Generator
    ) -> tuple[SGHMCState, MomentumInfo]:
        scale, sampling = schedule(state.done)
        h = step_size * math.sqrt(scale)
        decay = math.exp(-friction * h)
        momentum = torch.addcmul(state.momentum, state.grad, root, value=h)
        theta = torch.addcmul(state.theta, momentum, root, value=0.5 * h)
        momentum.mul_(decay)
        if sampling:
            fresh = normal_like(theta, generator)
            if noise is None:
                momentum.add_(fresh, alpha=math.sqrt(1 - decay**2))
            else:
                momentum.addcmul_(
                    fresh,
                    (1 - decay**2 * (1 + h**2 * metric * noise)).clamp_(min=0).sqrt_(),
                )
        kinetic = torch.linalg.vecdot(momentum, momentum) / theta.shape[-1]
        theta.addcmul_(momentum, root, value=0.5 * h)
        new = SGHMCState(theta, *target(theta, generator), momentum, state.done + 1)
        new, diverging = clip_or_revert(
            new, lambda: _reversed(state), root, kick_limit(theta, h)
        )
        return new, momentum_info(theta, diverging, cost, h, kinetic)

    return Kernel(init, step)


def _reversed(state: SGHMCState) -> SGHMCState:
    return state._replace(momentum=-state.momentum)


def kick_limit(theta: Tensor, h: float) -> float:
    """Return the gradient length whose kick is ten times the momentum of an equilibrium."""
    return 10 * math.sqrt(theta.shape[-1]) / h


def friction_of(friction: float | None, step_size: float | None) -> float:
    """Return the friction, and where none is given that of a step size, or 1."""
    return friction or (1.0 if step_size is None else 0.1 / step_size)


def stable_steps(h: float, scales: Scales, schedule: Schedule) -> tuple[float, float]:
    """Return the step size whose draws are kept at steps of ``h``, and the longest stable one."""
    longest = 1 / math.sqrt(scales.curvature)
    return min(h / math.sqrt(schedule.kept_scale), longest), longest


def momentum_info(
    theta: Tensor, diverging: Tensor, cost: int, h: float, kinetic: Tensor
) -> MomentumInfo:
    """Return the statistics of a step with mean squared momentum ``kinetic``."""
    chains, device = len(theta), theta.device
    return MomentumInfo(
        constant_statistic(chains, cost, device),
        diverging,
        constant_statistic(chains, h, device),
        kinetic,
    )


@checked
@dataclass(frozen=True)
class SGHMC(Method):
    """Sample with stochastic-gradient Hamiltonian Monte Carlo (Chen et al. 2014).

    See `sghmc` for the update.

    Approximates the posterior; there is no accept step. The bias is of second order in the step
    size with full gradients and of first order with noisy ones. Without ``step_size`` one is found:
    warm-up estimates a diagonal preconditioner, the largest curvature l and the mean gradient noise
    v in its units, and takes h = min(2 sqrt(bias / l), 2 friction bias / v): momenta are then too
    hot by about ``bias`` at most. With ``noise_estimate`` the second bound is friction / v, where
    the gradient gives half of the noise that is wanted.

    ``log_joint`` of the draws is exact: with mini-batches the full density is evaluated once a
    draw. The statistic ``n_steps`` counts gradients, of a mini-batch or of all data alike.
    ``kinetic_temperature`` is the mean of p^2 over coordinates, right after friction and noise,
    where it is 1 on a Gaussian with full gradients at any stable step size; what it shows beyond is
    the gradient's noise. ``configurational_temperature`` is 1 on average where the law of theta is
    right.

    Args:
        step_size: h, in units of the preconditioner; None finds it.
        batch_size: rows in a mini-batch, each chain its own; None takes all data.
        friction: per unit of time; None is 1 in the preconditioned units, and otherwise 0.1 /
            step_size, which loses a tenth of the momentum a step.
        noise_estimate: lower the friction's noise by the gradient's, whose variances warm-up
            estimates.
        preconditioner: ``"none"`` or ``"diagonal"`` (estimated in warm-up, then fixed). None is
            diagonal where the step size is left to warm-up, and none where it is given.
        control_variates: estimate gradients by differences from those at a mode (Baker et al.
            2019). Two mini-batch gradients a step.
        bias: relative excess of the temperature that a found step size may cause.
        schedule: `Constant`, `Polynomial` or `Cyclical`; scales h^2.
        thinning: steps for each draw, and for each transition of warm-up.
    """

    step_size: float | None = None
    batch_size: int | None = None
    friction: float | None = None
    noise_estimate: bool = False
    preconditioner: Literal["none", "diagonal"] | None = None
    control_variates: bool = False
    bias: float = 0.1
    schedule: Schedule = _CONSTANT
    thinning: int = 10

    def __post_init__(self) -> None:
        check(self, "friction")
        settle(self, choice, "preconditioner", choices=("none", "diagonal"))
        settle(self, flag, "noise_estimate")
        if self.noise_estimate and self.batch_size is None:
            raise ValueError("noise_estimate is for mini-batches: give a batch_size")

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Run the chains; see `bnnflow.sample`.

        The defaults are 16 chains, 200 transitions of warm-up, 1,000 draws.
        """
        friction = friction_of(self.friction, self.step_size)

        def make_kernel(
            target: StochasticTarget,
            scales: Scales,
            step_size: float,
            schedule: Schedule,
            cost: int,
        ) -> Kernel:
            noise = scales.noise if self.noise_estimate else None
            return sghmc(
                target,
                step_size,
                scales.metric,
                friction,
                noise=noise,
                schedule=schedule,
                cost=cost,
            )

        def step_size_rule(scales: Scales) -> tuple[float, float]:
            h = 2 * math.sqrt(self.bias / scales.curvature)
            if scales.noise_level > 0:
                # half of it can still be taken off the noise
                heat = 0.5 if self.noise_estimate else self.bias
                h = min(h, 2 * friction * heat / scales.noise_level)
            return stable_steps(h, scales, self.schedule)

        def notes(scales: Scales, step_size: float) -> dict[str, float]:
            return {"friction": friction}

        return run_stochastic(
            model, run, self, Scheme(make_kernel, step_size_rule, notes, MomentumDraw)
        )
