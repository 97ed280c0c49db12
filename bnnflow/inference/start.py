"""Where chains and ensembles start: random networks, and a short batched optimisation of all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.weights import WeightSpec

__all__ = ["WARM_START", "maximise", "random_networks", "starting_points"]

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


def maximise(
    model: BayesianModel, theta: Tensor, steps: int, learning_rate: float, progress: bool, description: str
) -> Tensor:
    """Climb log_joint from every row of ``theta`` ``(n, dim)`` at once with Adam and a cosine schedule.

    A row whose density becomes NaN keeps its best point so far.
    """
    theta = theta.clone()
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    best, best_value = theta.clone(), torch.full(theta.shape[:1], -math.inf, dtype=torch.float64, device=theta.device)
    with torch.no_grad(), progress_bar(steps, description, progress, "step") as bar:
        for step in range(1, steps + 1):
            value, grad = model.log_joint_and_grad(theta)
            better = value > best_value
            best = torch.where(better[:, None], theta, best)
            best_value = torch.where(better, value, best_value)
            grad = torch.nan_to_num(grad, 0.0, 0.0, 0.0)
            first.lerp_(grad, 0.1)
            second.lerp_(grad.square(), 0.001)
            rate = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            unbiased = first / (1 - 0.9**step)
            theta = theta + rate * unbiased / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            bar.update()
        value = model.log_joint(theta)
    return torch.where((value > best_value)[:, None], theta, best)


def starting_points(
    model: BayesianModel, chains: int, init: Tensor | nn.Module | str | None, generator: torch.Generator, progress: bool
) -> Tensor:
    """Return ``(chains, dim)`` starting points.

    Args:
        model: the posterior.
        chains: how many.
        init: None climbs from prior draws for 300 Adam steps; ``"prior"`` takes prior draws; a network or ``(dim,)``
            weights start every chain there; ``(chains, dim)`` weights are used as they are.
        generator: the source of randomness.
        progress: whether to show a bar.

    Raises:
        ValueError: if ``init`` does not fit, or log_joint is not finite there.
    """
    if isinstance(init, nn.Module):
        init = model.from_network(init)
    if isinstance(init, Tensor):
        theta = init.to(model.device, model.dtype)
        model.spec.check(theta)
        if theta.dim() > 2 or (theta.dim() == 2 and theta.shape[0] != chains):
            raise ValueError(f"init must be (dim,) or ({chains}, dim), got {tuple(theta.shape)}")
        theta = theta.expand(chains, -1).clone()
    elif init is None or init == "prior":
        theta = model.sample_prior(chains, generator)
        if init is None:
            theta = maximise(model, theta, WARM_START, 0.02, progress, "warm start")
    else:
        raise ValueError(f"init must be None, 'prior', a network or a tensor, got {init!r}")
    bad = (~model.log_joint(theta).isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"log_joint is not finite at the starting point of chains {bad[:5]}")
    return theta
