"""Gradients that are random, and what samplers must know of them: noise, curvature, and when one
has gone wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bnnflow.compiled import max_norm
from bnnflow.model import BayesianModel
from bnnflow.ranks import ALONE, Ranks

__all__ = [
    "Anchor",
    "Scales",
    "StochasticTarget",
    "anchored",
    "averaged",
    "clip_or_revert",
    "constant_statistic",
    "control_variates",
    "measure",
    "move_anchor",
    "stochastic",
]

StochasticTarget = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""``(theta (chain, dim), generator) -> (chain,), (chain, dim)``: unbiased estimates of log_joint
and its gradient.
"""


def stochastic(model: BayesianModel, batch_size: int | None) -> StochasticTarget:
    """Return log_joint and its gradient from mini-batches, one of its own for every chain.

    From all data if None.

    The scaling by n / batch and the temperature are the model's.
    """

    @torch.no_grad()
    def full(theta: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return model.log_joint_and_grad(theta)

    @torch.no_grad()
    def batched(theta: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        assert batch_size is not None
        return model.minibatch_log_joint_and_grad(theta, generator, batch_size)

    return full if batch_size is None else batched


class Anchor(NamedTuple):
    """Points near the posterior's modes, one for each chain, with the exact density and gradient
    there.
    """

    theta: Tensor  # (chain, dim)
    log_joint: Tensor  # (chain,)
    grad: Tensor  # (chain, dim)


@torch.no_grad()
def anchored(model: BayesianModel, theta: Tensor) -> Anchor:
    """Evaluate the full density at ``theta`` ``(chain, dim)``."""
    return Anchor(theta, *model.log_joint_and_grad(theta))


def move_anchor(model: BayesianModel, anchor: Anchor, theta: Tensor) -> Anchor:
    """Return the anchor, moved to ``theta`` where the density is higher there."""
    other = anchored(model, theta)
    better = other.log_joint > anchor.log_joint  # (chain,)
    rows = better.unsqueeze(-1)
    return Anchor(
        torch.where(rows, other.theta, anchor.theta),
        torch.where(better, other.log_joint, anchor.log_joint),
        torch.where(rows, other.grad, anchor.grad),
    )


def control_variates(
    model: BayesianModel, anchor: Anchor, batch_size: int
) -> StochasticTarget:
    """Return the estimator g(a) + g_b(theta) - g_b(a), with one batch b in both and a the chain's
    anchor.

    Unbiased wherever the anchor is (Baker et al. 2019), and exact at the anchor itself: the
    variance is that of the difference, which near the anchor grows with the squared distance
    instead of being that of the data. The prior is counted in full on both sides. Two mini-batch
    gradients, made in one call.
    """

    @torch.no_grad()
    def target(theta: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = model.random_rows(theta.shape[:-1], generator, batch_size)
        value, grad = model.log_joint_and_grad(
            torch.stack([theta, anchor.theta]), torch.stack([rows, rows])
        )
        return anchor.log_joint + (value[0] - value[1]), anchor.grad + (grad[0] - grad[1])

    return target


# ---------------------------------------- survival

_State = TypeVar("_State", bound=Any)


def clip_or_revert(
    new: _State, before: Callable[[], _State], root: Tensor, limit: float
) -> tuple[_State, Tensor]:
    """Mend what went wrong in a step, chain by chain, and say where it did.

    A chain whose density or gradient is not finite goes back to where it was. One whose gradient,
    in units of ``root``, is longer than ``limit`` stays, with its gradient cut to that length: it
    is then in a region too stiff for the step size, from which it can return, but which a full step
    would leave for infinity.

    Args:
        new: a state with ``log_joint`` and ``grad``; numbers in it belong to all chains and are
            kept.
        before: gives the state to go back to.
        root: square root of the preconditioner, ``(dim,)`` or ``(chain, dim)``.
        limit: longest gradient.

    Returns:
        The state, and where it was mended ``(chain,)``.
    """
    # One number tells of all chains at once that nothing happened, as nearly always.
    if max_norm(new.grad, root, new.log_joint) < limit:
        return new, constant_statistic(len(new.grad), False, new.grad.device)
    size = torch.linalg.vector_norm(new.grad * root, dim=-1)
    extreme = ~((size < limit) & new.log_joint.isfinite())
    if not extreme.any():
        return new, extreme
    lost = ~(size + new.log_joint).isfinite()
    cut = torch.where(extreme, limit / size, 1.0).unsqueeze(-1).to(new.grad)
    new = new._replace(grad=new.grad * cut)

    def chosen(now: Any, then: Any) -> Any:
        if not isinstance(now, Tensor):
            return now
        return torch.where(lost.reshape(-1, *[1] * (now.dim() - 1)), then, now)

    return type(new)(*map(chosen, new, before())), extreme


@functools.lru_cache(maxsize=32, typed=True)
def constant_statistic(chains: int, number: float, device: torch.device) -> Tensor:
    """Return a statistic that is the same for all chains, and the same tensor in every step: nobody
    may write to it.
    """
    kinds = {bool: torch.bool, int: torch.int64, float: torch.float64}
    return torch.full((chains,), number, dtype=kinds[type(number)], device=device)


# ---------------------------------------- scales


class Scales(NamedTuple):
    """What the size of a step depends on, found where the chains are."""

    metric: Tensor  # (dim,) or (chain, dim): the preconditioner G
    noise: Tensor  # (dim,): variance of the gradient's noise
    noise_level: float  # mean of G * noise over coordinates
    curvature: float  # largest eigenvalue of G^(1/2) H G^(1/2), H the Hessian of -log_joint
    gradients: int  # that finding them took


def averaged(old: Scales, new: Scales, weight: float) -> Scales:
    """Return scales with the preconditioner of ``old`` and a mean in which ``new`` has this weight.

    Only the numbers are averaged, and the variances of noise: what a step size must suit is where
    chains usually are.
    """
    return Scales(
        old.metric,
        torch.lerp(old.noise, new.noise, weight),
        old.noise_level + weight * (new.noise_level - old.noise_level),
        old.curvature + weight * (new.curvature - old.curvature),
        new.gradients,
    )


@torch.no_grad()
def measure(
    model: BayesianModel,
    target: StochasticTarget | None,
    theta: Tensor,
    generator: torch.Generator,
    metric: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Scales:
    """Find a preconditioner, the largest curvature in it, and the noise of the gradient.

    Products with the Hessian H are differences of full gradients over a tenth of the posterior's
    width. The preconditioner equilibrates: it is the diagonal G for which every row of G^(1/2) H
    G^(1/2) has norm 1 (Dauphin et al. 2015, iterated), 1 / H for a diagonal H, with squares of H
    pooled over chains. Curvature is the largest that power iteration finds in any chain.

    Args:
        model: the posterior.
        target: the gradients whose noise is wanted; None if they have none.
        theta: where, ``(chain, dim)``.
        generator: source of the probes and the batches.
        metric: the preconditioner, if it is given.
        ranks: the processes that share the chains.
    """
    here = model.log_joint_and_grad(theta)[1]
    gradients = 1

    def hessian(direction: Tensor) -> Tensor:
        nonlocal gradients
        gradients += 1
        return torch.nan_to_num(
            here - model.log_joint_and_grad(theta + direction)[1], 0.0, 0.0, 0.0
        )

    scale = _equilibrated(hessian, theta, generator, ranks)
    metric = scale if metric is None else metric
    curvature = _largest(
        hessian, theta, metric, float((metric / scale).max()), generator, ranks
    )
    noise = torch.zeros_like(scale)
    for _ in range(_PAIRS if target is not None else 0):
        assert target is not None
        gradients += 2
        pair = target(theta, generator)[1] - target(theta, generator)[1]
        noise += torch.nan_to_num(pair, 0.0, 0.0, 0.0).square().mean(0) / (2 * _PAIRS)
    noise = ranks.mean(noise)
    level = float(ranks.mean((metric * noise).mean().double()))
    return Scales(metric, noise, level, curvature, gradients)


_PAIRS = 8
_ROUNDS = 8
# the preconditioner's largest and smallest entries are this near to their median
_SPREAD = 1e8


def _equilibrated(
    hessian: Callable[[Tensor], Tensor],
    theta: Tensor,
    generator: torch.Generator,
    ranks: Ranks,
) -> Tensor:
    """Return G, ``(dim,)``, from random signs z: the mean of (H G^(1/2) z)_i^2 is row i of H G
    H.
    """
    metric, width = torch.ones_like(theta[0]), 1e-3
    for k in range(_ROUNDS):
        signs = (
            torch.randint(0, 2, theta.shape, generator=generator, device=theta.device).to(
                theta
            )
            * 2
            - 1
        )
        rows = ranks.mean(
            (hessian(width * signs * metric.sqrt()).double() / width).square().mean(0)
        )
        if not rows.max() > 0:  # the density is not finite, or flat: nothing was learned
            continue
        rows = rows.clamp(min=1e-20 * float(rows.max()))
        log = -0.5 * rows.log() if k == 0 else 0.5 * (metric.double().log() - rows.log())
        middle, bound = log.median(), torch.tensor(_SPREAD).log().item()
        metric, width = log.clamp(middle - bound, middle + bound).exp().to(theta), 0.1
    return metric


def _largest(
    hessian: Callable[[Tensor], Tensor],
    theta: Tensor,
    metric: Tensor,
    guess: float,
    generator: torch.Generator,
    ranks: Ranks,
) -> float:
    """Return the largest eigenvalue of G^(1/2) H G^(1/2) in any chain, by power iteration."""
    root = metric.sqrt()
    vector = torch.randn(
        theta.shape, generator=generator, device=theta.device, dtype=theta.dtype
    )
    vector = vector / vector.norm(dim=-1, keepdim=True)
    largest = guess
    for _ in range(_ROUNDS):
        width = 0.1 / largest**0.5
        product = root * hessian(width * root * vector) / width
        size = product.norm(dim=-1, keepdim=True)
        vector = torch.where(size > 0, product / size, vector)
        largest = float(size.nan_to_num(0.0, 0.0, 0.0).max()) or guess
    return float(ranks.gather(torch.tensor([largest], device=theta.device)).max())
