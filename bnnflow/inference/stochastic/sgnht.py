"""The stochastic-gradient Nose-Hoover thermostat: friction that learns the noise of the
gradient.
"""

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
from bnnflow.inference.stochastic.gradients import Scales, StochasticTarget, clip_or_revert
from bnnflow.inference.stochastic.schedules import Constant, Schedule
from bnnflow.inference.stochastic.sghmc import (
    MomentumDraw,
    MomentumInfo,
    friction_of,
    kick_limit,
    momentum_info,
    stable_steps,
)
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.types import Kernel

__all__ = ["SGNHT", "SGNHTState", "sgnht"]


_CONSTANT = Constant()


class SGNHTState(NamedTuple):
    """Where every chain is and how it moves, its thermostat, and the estimates of the density and
    its gradient.
    """

    theta: Tensor  # (chain, dim)
    log_joint: Tensor  # (chain,), float64
    grad: Tensor  # (chain, dim)
    # (chain, dim), in units of the square root of the mass, before the kick of ``grad``
    momentum: Tensor
    thermostat: Tensor  # (chain, 1) or (chain, dim): the friction
    done: int  # steps


def sgnht(
    target: StochasticTarget,
    step_size: float,
    metric: Tensor,
    friction: float,
    *,
    inertia: float = 1.0,
    per_parameter: bool = False,
    schedule: Schedule = Constant(),
    cost: int = 1,
) -> Kernel:
    """Build the kernel of the stochastic-gradient Nose-Hoover thermostat (Ding et al. 2014),
    symmetrically split.

    Discretises dtheta = G^(1/2) p dt, dp = G^(1/2) g dt - xi p dt + N(0, 2 friction dt), dxi =
    (mean of p^2 - 1) / inertia dt, with G the diagonal ``metric`` (the inverse mass) and p standard
    normal, by the scheme BADODAB (Leimkuhler and Shang 2016), one gradient a step: half a kick,
    half a drift, half a thermostat step, friction and noise solved exactly, and the same backwards;
    the last half kick is made together with the next step's first.

    The thermostat raises the friction xi until the momenta have unit temperature, whatever the
    noise of g adds: noise that is constant and the same in all directions (in every single one,
    with ``per_parameter``) does not heat the chain. In continuous time this leaves exp(log_joint)
    N(p; 0, I) N(xi; friction + noise, inertia^-1 / dim) invariant (temperature is the model's),
    discretised with a bias of order h^2; noise that differs between directions or changes with
    theta leaves one of order h.

    Args:
        target: estimates of log_joint and its gradient.
        step_size: h at scale 1; the schedule's scale is one of h^2.
        metric: G, ``(dim,)``.
        friction: strength of the noise that is added, and what xi starts from.
        inertia: of the thermostat.
        per_parameter: give every coordinate a thermostat instead of every chain.
        schedule: of the step size; where it does not sample, xi rests and there is friction but no
            noise.
        cost: gradients a step, for ``n_steps``; mini-batch gradients count as one each.
    """
    root = metric.sqrt()

    def squared(momentum: Tensor) -> Tensor:
        squares = momentum * momentum
        return squares if per_parameter else squares.mean(-1, keepdim=True)

    def init(theta: Tensor, generator: torch.Generator) -> SGNHTState:
        momentum = normal_like(theta, generator)
        thermostat = torch.full_like(theta if per_parameter else theta[:, :1], friction)
        state = SGNHTState(theta, *target(theta, generator), momentum, thermostat, 0)
        before = state._replace(grad=torch.zeros_like(theta))
        return clip_or_revert(state, lambda: before, root, kick_limit(theta, step_size))[0]

    def step(
        state: SGNHTState, generator: torch.Generator
    ) -> tuple[SGNHTState, MomentumInfo]:
        scale, sampling = schedule(state.done)
        h = step_size * math.sqrt(scale)
        momentum = torch.addcmul(state.momentum, state.grad, root, value=h)
        theta = torch.addcmul(state.theta, momentum, root, value=0.5 * h)
        first, thermostat = squared(momentum), state.thermostat
        if sampling:
            thermostat = torch.add(thermostat, first - 1, alpha=0.5 * h / inertia)
            fresh = normal_like(theta, generator)
            momentum *= (-h * thermostat).exp_()
            momentum.addcmul_(fresh, _spread(thermostat, friction, h))
            last = squared(momentum)
            thermostat = torch.add(thermostat, last - 1, alpha=0.5 * h / inertia)
        else:
            momentum *= math.exp(-h * friction)
            last = squared(momentum)
        kinetic = 0.5 * (first + last).mean(-1)
        theta.addcmul_(momentum, root, value=0.5 * h)
        new = SGNHTState(
            theta, *target(theta, generator), momentum, thermostat, state.done + 1
        )
        new, diverging = clip_or_revert(
            new, lambda: _restarted(state, friction), root, kick_limit(theta, h)
        )
        return new, momentum_info(theta, diverging, cost, h, kinetic)

    return Kernel(init, step)


def _spread(thermostat: Tensor, friction: float, h: float) -> Tensor:
    """Return the scale of the noise that friction ``thermostat`` of either sign leaves after a time
    ``h``.
    """
    xi = thermostat + 1e-30  # exactly zero has a limit, which this rounds to
    return (torch.expm1(-2 * h * xi).neg_() / xi).mul_(friction).sqrt_()


def _restarted(state: SGNHTState, friction: float) -> SGNHTState:
    return state._replace(
        momentum=-state.momentum, thermostat=torch.full_like(state.thermostat, friction)
    )


@checked
@dataclass(frozen=True)
class SGNHT(Method):
    """Sample with the stochastic-gradient Nose-Hoover thermostat (Ding et al. 2014).

    See `sgnht` for the update.

    Approximates the posterior; there is no accept step. The bias is of second order in the step
    size where the thermostat can balance the noise of mini-batches, and of first order in what it
    cannot. Without ``step_size`` one is found: warm-up estimates a diagonal preconditioner, the
    largest curvature l and the mean gradient noise v in its units, and takes h = 2 sqrt(bias /
    max(l, v)).

    ``log_joint`` and the statistics of the draws are as in `SGHMC`, but that
    ``kinetic_temperature`` is the mean of p^2 before and after friction and noise: what the
    thermostat holds at 1.

    Args:
        step_size: h, in units of the preconditioner; None finds it.
        batch_size: rows in a mini-batch, each chain its own; None takes all data.
        friction: strength of the added noise; None is 1 in the preconditioned units, and otherwise
            0.1 / step_size.
        inertia: of the thermostat, which answers in times of its square root.
        per_parameter: give every coordinate a thermostat, which can then balance noise that differs
            between them.
        preconditioner: ``"none"`` or ``"diagonal"`` (estimated in warm-up, then fixed). None is
            diagonal where the step size is left to warm-up, and none where it is given.
        control_variates: estimate gradients by differences from those at a mode (Baker et al.
            2019). Two mini-batch gradients a step.
        bias: sets a found step size.
        schedule: `Constant`, `Polynomial` or `Cyclical`; scales h^2.
        thinning: steps for each draw, and for each transition of warm-up.
    """

    step_size: float | None = None
    batch_size: int | None = None
    friction: float | None = None
    inertia: float = 1.0
    per_parameter: bool = False
    preconditioner: Literal["none", "diagonal"] | None = None
    control_variates: bool = False
    bias: float = 0.1
    schedule: Schedule = _CONSTANT
    thinning: int = 10

    def __post_init__(self) -> None:
        check(self, "friction", "inertia")
        settle(self, choice, "preconditioner", choices=("none", "diagonal"))
        settle(self, flag, "per_parameter")

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
            return sgnht(
                target,
                step_size,
                scales.metric,
                friction,
                inertia=self.inertia,
                per_parameter=self.per_parameter,
                schedule=schedule,
                cost=cost,
            )

        def step_size_rule(scales: Scales) -> tuple[float, float]:
            h = 2 * math.sqrt(self.bias / max(scales.curvature, scales.noise_level))
            return stable_steps(h, scales, self.schedule)

        def notes(scales: Scales, step_size: float) -> dict[str, float]:
            return {"friction": friction}

        def settle(state: SGNHTState, scales: Scales, step_size: float) -> SGNHTState:
            # what the thermostat would learn
            balance = friction + 0.5 * step_size * scales.noise_level
            return state._replace(thermostat=torch.full_like(state.thermostat, balance))

        return run_stochastic(
            model,
            run,
            self,
            Scheme(make_kernel, step_size_rule, notes, MomentumDraw, settle),
        )
