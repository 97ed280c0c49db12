"""Stochastic-gradient Langevin dynamics, plain, preconditioned, in cycles, with control
variates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bnnflow.arguments import checked, choice, settle
from bnnflow.compiled import langevin
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

__all__ = ["SGLD", "PSGLDState", "SGLDInfo", "SGLDState", "psgld", "sgld"]


_CONSTANT = Constant()


class SGLDState(NamedTuple):
    """Where every chain is, with the estimates of the density and its gradient there."""

    theta: Tensor  # (chain, dim)
    log_joint: Tensor  # (chain,), float64
    grad: Tensor  # (chain, dim)
    done: int  # steps


class PSGLDState(NamedTuple):
    """The same with the running mean of squared gradients, and the preconditioner that it gives."""

    theta: Tensor  # (chain, dim)
    log_joint: Tensor  # (chain,), float64
    grad: Tensor  # (chain, dim)
    squares: Tensor  # (chain, dim)
    metric: Tensor  # (chain, dim)
    done: int  # steps


class SGLDInfo(NamedTuple):
    """What a person wants to know of one step; ``(chain,)`` each."""

    n_steps: Tensor
    diverging: Tensor
    step_size: Tensor


class SGLDDraw(NamedTuple):
    """What a person wants to know of one draw; ``(chain,)`` each."""

    n_steps: Tensor
    diverging: Tensor
    step_size: Tensor
    configurational_temperature: Tensor


def sgld(
    target: StochasticTarget,
    step_size: float,
    metric: Tensor,
    *,
    schedule: Schedule = Constant(),
    cost: int = 1,
) -> Kernel:
    """Build the kernel of stochastic-gradient Langevin dynamics (Welling and Teh 2011) with a fixed
    preconditioner.

    theta <- theta + (eps / 2) G g + N(0, eps G), with g an unbiased estimate of grad log_joint at
    theta, G the constant diagonal ``metric`` (so that there is no Gamma term) and eps the scheduled
    step size. Temperature is the model's: the noise has unit temperature. Approximates
    exp(log_joint) with a bias of order eps. On a Gaussian, in a direction where G^(1/2) H G^(1/2)
    has the eigenvalue l and G^(1/2) g the noise variance v, the mean is exact and the variance is
    too large by the factor (1 + eps v / 4) / (1 - eps l / 4); unstable for eps l >= 4.

    Args:
        target: estimates of log_joint and its gradient.
        step_size: eps at scale 1.
        metric: G, ``(dim,)``.
        schedule: scales of eps; where it does not sample, no noise is added.
        cost: gradients a step, for ``n_steps``; mini-batch gradients count as one each.
    """
    root = metric.sqrt()

    def init(theta: Tensor, generator: torch.Generator) -> SGLDState:
        state = SGLDState(theta, *target(theta, generator), 0)
        return clip_or_revert(
            state,
            lambda: state._replace(grad=torch.zeros_like(theta)),
            root,
            _limit(theta, step_size),
        )[0]

    def step(state: SGLDState, generator: torch.Generator) -> tuple[SGLDState, SGLDInfo]:
        scale, sampling = schedule(state.done)
        eps = step_size * scale
        if sampling:
            theta = langevin(
                state.theta, state.grad, metric, root, 0.5 * eps, math.sqrt(eps), generator
            )
        else:
            theta = torch.addcmul(state.theta, state.grad, metric, value=0.5 * eps)
        new = SGLDState(theta, *target(theta, generator), state.done + 1)
        new, diverging = clip_or_revert(new, lambda: state, root, _limit(theta, eps))
        return new, _info(theta, diverging, cost, eps)

    return Kernel(init, step)


def psgld(
    target: StochasticTarget,
    step_size: float,
    n: int,
    *,
    decay: float = 0.99,
    floor: float = 1e-5,
    schedule: Schedule = Constant(),
    cost: int = 1,
) -> Kernel:
    """Build the kernel of SGLD preconditioned by running gradients (Li et al. 2016).

    V <- decay V + (1 - decay) (g / n)^2 and G = 1 / (floor + sqrt(V)), each chain its own, then the
    step of `sgld`. Approximates exp(log_joint) with a bias of order eps, and one more: as G follows
    the chain, an exact drift would need the term Gamma_i = sum_j dG_ij / dtheta_j, which is dropped
    here as in practice everywhere. That bias vanishes with 1 - decay, not with eps, and is least
    where the noise of mini-batches, not the chain, sets V: with full gradients on a linear
    regression it makes variances half as large again. A preconditioner frozen after warm-up
    (`sgld`) is free of it.

    Args:
        target: estimates of log_joint and its gradient.
        step_size: eps at scale 1.
        n: rows of data, by which gradients are divided before they are squared.
        decay: of V.
        floor: the paper's lambda, bounds G by its inverse.
        schedule: scales of eps.
        cost: gradients a step.
    """

    def preconditioner(squares: Tensor) -> Tensor:
        return squares.sqrt().add_(floor).reciprocal_()

    def init(theta: Tensor, generator: torch.Generator) -> PSGLDState:
        value, grad = target(theta, generator)
        squares = (torch.nan_to_num(grad, 0.0, 0.0, 0.0) / n).square()
        # no scale is small by chance
        squares = 0.5 * (squares.mean(0) + squares.mean()).expand_as(grad).clone()
        metric = preconditioner(squares)
        state = PSGLDState(theta, value, grad, squares, metric, 0)
        before = state._replace(grad=torch.zeros_like(theta))
        return clip_or_revert(
            state, lambda: before, metric.sqrt(), _limit(theta, step_size)
        )[0]

    def step(state: PSGLDState, generator: torch.Generator) -> tuple[PSGLDState, SGLDInfo]:
        scale, sampling = schedule(state.done)
        eps = step_size * scale
        squares = torch.addcmul(
            decay * state.squares, state.grad, state.grad, value=(1 - decay) / n**2
        )
        metric = preconditioner(squares)
        root = metric.sqrt()
        if sampling:
            theta = langevin(
                state.theta, state.grad, metric, root, 0.5 * eps, math.sqrt(eps), generator
            )
        else:
            theta = torch.addcmul(state.theta, state.grad, metric, value=0.5 * eps)
        value, grad = target(theta, generator)
        new = PSGLDState(theta, value, grad, squares, metric, state.done + 1)
        new, diverging = clip_or_revert(new, lambda: state, root, _limit(theta, eps))
        return new, _info(theta, diverging, cost, eps)

    return Kernel(init, step)


def _limit(theta: Tensor, eps: float) -> float:
    """Return the gradient length whose drift is ten times the noise of the step."""
    return 20 * math.sqrt(theta.shape[-1] / eps)


def _info(theta: Tensor, diverging: Tensor, cost: int, step_size: float) -> SGLDInfo:
    chains, device = len(theta), theta.device
    return SGLDInfo(
        constant_statistic(chains, cost, device),
        diverging,
        constant_statistic(chains, step_size, device),
    )


@checked
@dataclass(frozen=True)
class SGLD(Method):
    """Sample with stochastic-gradient Langevin dynamics (Welling and Teh 2011).

    See `sgld` for the update.

    Approximates the posterior with a bias of the order of the step size; there is no accept step.
    Without ``step_size`` one is found: warm-up estimates a diagonal preconditioner G, the largest
    curvature l and the mean gradient noise v in its units, and takes eps = 4 bias / max(l, v). By
    the closed form for Gaussians variances are then too large by about ``bias`` at most, in the
    stiffest direction (l), and on average (v). Gradient noise is what limits mini-batches far from
    the mode; ``control_variates`` remove most of it.

    ``log_joint`` of the draws is exact: with mini-batches the full density is evaluated once a
    draw. The statistic ``n_steps`` counts gradients, of a mini-batch or of all data alike;
    ``configurational_temperature`` is 1 on average where the law is right.

    Args:
        step_size: eps, in units of the preconditioner; None finds it. A number takes the paper's
            plain update unless a preconditioner is named, and is shortened only by divergences in
            warm-up.
        batch_size: rows in a mini-batch, each chain its own; None takes all data.
        preconditioner: ``"none"``, ``"diagonal"`` (estimated in warm-up, then fixed: no further
            bias), ``"rmsprop"`` (Li et al. 2016, for comparisons: slow to reach the mode from afar,
            and biased for want of the Gamma term, see `psgld`). None is diagonal where the step
            size is left to warm-up, and none where it is given.
        control_variates: estimate gradients by differences from those at a mode (Baker et al.
            2019): the chain's warm start, or where Adam leads from ``init``. Two mini-batch
            gradients a step.
        bias: relative excess of variances that a found step size may cause.
        schedule: `Constant`, `Polynomial` or `Cyclical` step sizes, counted from the end of
            warm-up.
        thinning: steps for each draw, and for each transition of warm-up.

    Example:
        >>> import bnnflow as bf
        >>> x = torch.linspace(-1, 1, 50).unsqueeze(-1)
        >>> net, noise = torch.nn.Linear(1, 1), bf.likelihoods.Gaussian(0.1)
        >>> model = bf.BayesianModel(net, bf.priors.Normal(1.0), noise, x, x)
        >>> draws = bf.sample(model, SGLD(batch_size=10), chains=4, warmup=20, draws=30, seed=0)
        >>> draws.theta.shape, draws.info["exact"]
        (torch.Size([4, 30, 2]), False)
    """

    step_size: float | None = None
    batch_size: int | None = None
    preconditioner: Literal["none", "diagonal", "rmsprop"] | None = None
    control_variates: bool = False
    bias: float = 0.1
    schedule: Schedule = _CONSTANT
    thinning: int = 10

    def __post_init__(self) -> None:
        check(self)
        settle(self, choice, "preconditioner", choices=("none", "diagonal", "rmsprop"))

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Run the chains; see `bnnflow.sample`.

        The defaults are 16 chains, 200 transitions of warm-up, 1,000 draws.
        """

        def make_kernel(
            target: StochasticTarget,
            scales: Scales,
            step_size: float,
            schedule: Schedule,
            cost: int,
        ) -> Kernel:
            if self.preconditioner == "rmsprop":
                return psgld(target, step_size, len(model.x), schedule=schedule, cost=cost)
            return sgld(target, step_size, scales.metric, schedule=schedule, cost=cost)

        def step_size_rule(scales: Scales) -> tuple[float, float]:
            eps = 4 * self.bias / max(scales.curvature, scales.noise_level)
            eps = min(eps / self.schedule.kept_scale, 2 / scales.curvature)
            # A preconditioner that follows the gradient may change: keep well away from the longest
            # stable step.
            return eps, (0.1 if self.preconditioner == "rmsprop" else 1) / scales.curvature

        def notes(scales: Scales, step_size: float) -> dict[str, Any]:
            kept = step_size * self.schedule.kept_scale
            return {"variance_excess": kept * max(scales.curvature, scales.noise_level) / 4}

        return run_stochastic(
            model, run, self, Scheme(make_kernel, step_size_rule, notes, SGLDDraw)
        )
