"""Where chains and ensembles start: random networks, and a short batched optimisation of all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.ranks import ALONE, Ranks
from bnnflow.weights import WeightSpec

__all__ = ["WARM_START", "Adam", "cosine", "maximise", "random_networks", "starting_points"]

WARM_START = 300
"""Adam steps, one gradient each, that chains without an ``init`` climb."""


def random_networks(spec: WeightSpec, n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Draw ``(n, dim)`` initial weights, uniform within 1 / sqrt(fan in) as PyTorch's layers do; extras at log 0.1."""
    params, fan_in = {}, 1
    for name in spec.names:
        shape = spec.shapes[name]
        if name in spec.extras:
            params[name] = torch.full((n, *shape), math.log(0.1), dtype=dtype, device=generator.device)
            continue
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else fan_in  # a bias follows its weight
        uniform = torch.rand(n, *shape, generator=generator, device=generator.device, dtype=dtype)
        params[name] = (2 * uniform - 1) / math.sqrt(max(1, fan_in))
    return spec.flatten(params)


class Adam:
    """The moments of Adam (Kingma and Ba 2015) over a batch of points, for climbing."""

    def __init__(self, theta: Tensor) -> None:
        self._first, self._second = torch.zeros_like(theta), torch.zeros_like(theta)
        self._steps = 0

    def step(self, theta: Tensor, grad: Tensor, rate: float) -> Tensor:
        """Return the points one step up the gradient; entries that are not finite count as zero."""
        self._steps += 1
        grad = torch.nan_to_num(grad, 0.0, 0.0, 0.0)
        self._first.lerp_(grad, 0.1)
        self._second.lerp_(grad.square(), 0.001)
        unbiased = self._first / (1 - 0.9**self._steps)
        return theta + rate * unbiased / ((self._second / (1 - 0.999**self._steps)).sqrt() + 1e-8)


def cosine(rate: float, step: int, steps: int) -> float:
    """Return a learning rate that falls to zero over ``steps`` steps, the first of which is 1."""
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def maximise(
    model: BayesianModel, theta: Tensor, steps: int, learning_rate: float, progress: bool, description: str
) -> Tensor:
    """Climb log_joint from every row of ``theta`` ``(n, dim)`` at once with Adam and a cosine schedule.

    A row whose density becomes NaN keeps its best point so far.
    """
    theta = theta.clone()
    adam = Adam(theta)
    best, best_value = theta.clone(), torch.full(theta.shape[:1], -math.inf, dtype=torch.float64, device=theta.device)
    with torch.no_grad(), progress_bar(steps, description, progress, "step") as bar:
        for step in range(1, steps + 1):
            value, grad = model.log_joint_and_grad(theta)
            better = value > best_value
            best = torch.where(better[:, None], theta, best)
            best_value = torch.where(better, value, best_value)
            theta = adam.step(theta, grad, cosine(learning_rate, step, steps))
            bar.update()
        value = model.log_joint(theta)
    return torch.where((value > best_value)[:, None], theta, best)


def starting_points(
    model: BayesianModel,
    chains: int,
    init: Tensor | nn.Module | str | None,
    generator: torch.Generator,
    progress: bool,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Return ``(chains, dim)`` starting points.

    Args:
        model: the posterior.
        chains: how many, in this process.
        init: None climbs from random networks for 300 Adam steps; ``"prior"`` takes prior draws; a network or
            ``(dim,)`` weights start every chain there; ``(chains, dim)`` weights, for the chains of all processes, are
            used as they are.
        generator: the source of randomness.
        progress: whether to show a bar.
        ranks: the processes that share the chains.

    Raises:
        ValueError: if ``init`` does not fit, or log_joint is not finite there.
    """
    if isinstance(init, nn.Module):
        init = model.from_network(init)
    if isinstance(init, Tensor):
        theta = init.to(model.device, model.dtype)
        model.spec.check(theta)
        every = chains * ranks.size
        if theta.dim() > 2 or (theta.dim() == 2 and theta.shape[0] != every):
            raise ValueError(f"init must be (dim,) or ({every}, dim), got {tuple(theta.shape)}")
        theta = ranks.own(theta.expand(every, -1)).clone()
    elif init is None:
        # Not from prior draws: with learned noise these begin millions of nats below the mode.
        theta = random_networks(model.spec, chains, generator, model.dtype)
        theta = maximise(model, theta, WARM_START, 0.02, progress, "warm start")
    elif init == "prior":
        theta = model.sample_prior(chains, generator)
    else:
        raise ValueError(f"init must be None, 'prior', a network or a tensor, got {init!r}")
    bad = (~model.log_joint(theta).isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"log_joint is not finite at the starting point of chains {bad[:5]}")
    return theta
