"""Posteriors of which the truth is known, and how draws are compared with it: shared by the tests
of the samplers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import arviz
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.types import Kernel, LogDensityAndGrad

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def built(make: Callable[[], nn.Module], dtype: torch.dtype = F64) -> nn.Module:
    """Build a network from a seed, without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().to(dtype)


def chain(
    *widths: int, activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True
) -> nn.Module:
    modules: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        modules += [nn.Linear(n_in, n_out, bias=bias), activation()]
    return nn.Sequential(*modules[:-1])


# ---------------------------------------- posteriors


class Conjugate(NamedTuple):
    """Bayesian linear regression with fixed noise, its posterior, and the logarithm of what
    normalises it.
    """

    model: bf.BayesianModel
    mean: Tensor
    covariance: Tensor
    log_normaliser: float  # the evidence at temperature 1

    @property
    def posterior(self) -> bf.Gaussian:
        return bf.Gaussian(self.mean, torch.linalg.cholesky(self.covariance))


def conjugate(
    hard: bool = False, dtype: torch.dtype = F64, temperature: float = 1.0
) -> Conjugate:
    """Return the problem.

    ``hard`` has strongly correlated weights on scales a factor of a hundred apart.
    """
    g, noise, scale, dim = generator(1), 0.5, 1.5, 4
    x = torch.randn(25, 3, generator=g, dtype=F64)
    if hard:
        x = torch.stack([x[:, 0], x[:, 0] + 0.3 * x[:, 1], 30 * x[:, 2]], 1)
    y = (
        x @ torch.tensor([1.0, -0.5, 0.02], dtype=F64)
        + 0.3
        + noise * torch.randn(25, generator=g, dtype=F64)
    )
    net = built(lambda: nn.Linear(3, 1), dtype)
    model = bf.BayesianModel(
        net,
        priors.Normal(scale),
        likelihoods.Gaussian(noise),
        x,
        y,
        temperature=temperature,
    )
    design = torch.cat([x, torch.ones(25, 1, dtype=F64)], 1)
    covariance = torch.linalg.inv(
        design.T @ design / noise**2 + torch.eye(dim, dtype=F64) / scale**2
    )
    marginal = noise**2 * torch.eye(25, dtype=F64) + scale**2 * design @ design.T
    evidence = float(
        torch.distributions.MultivariateNormal(
            torch.zeros(25, dtype=F64), marginal
        ).log_prob(y)
    )
    # exp(log_joint) = (evidence * N(mean, S))^(1/T), and N(mean, S)^(1/T) is N(mean, T S) but for a
    # constant.
    log_det = float(torch.linalg.slogdet(2 * math.pi * covariance)[1])
    power = 0.5 * (1 - 1 / temperature) * log_det + 0.5 * dim * math.log(temperature)
    mean = covariance @ design.T @ y / noise**2
    return Conjugate(model, mean, temperature * covariance, evidence / temperature + power)


def tiny_network(n: int = 6, dtype: torch.dtype = F64, seed: int = 2) -> bf.BayesianModel:
    x = torch.linspace(-1.5, 1.5, n, dtype=F64).unsqueeze(-1)
    y = (2 * x).sin() + 0.2 * torch.randn(n, 1, generator=generator(seed), dtype=F64)
    net = built(lambda: chain(1, 3, 1, activation=nn.Tanh), dtype)
    return bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), x, y)


def two_weights() -> bf.BayesianModel:
    """Return the smallest network there is: v tanh(w x), with two modes that are copies of each
    other.
    """
    x = torch.linspace(-1.5, 1.5, 6, dtype=F64).unsqueeze(-1)
    net = built(lambda: chain(1, 1, 1, activation=nn.Tanh, bias=False))
    return bf.BayesianModel(
        net, priors.Normal(), likelihoods.Gaussian(0.3), x, x.tanh() + 0.1 * (7 * x).sin()
    )


def cliff(nothing: float) -> LogDensityAndGrad:
    """Return the standard normal whose first coordinate must stay below 1: beyond, the density is
    ``nothing``.
    """

    def log_joint_and_grad(theta: Tensor) -> tuple[Tensor, Tensor]:
        beyond = theta[:, 0] > 1
        return torch.where(beyond, nothing, -0.5 * theta.square().sum(-1)), torch.where(
            beyond[:, None], nothing, -theta
        )

    return log_joint_and_grad


def regression(
    dtype: torch.dtype = F64, prior=None, n: int = 30
) -> tuple[bf.BayesianModel, Tensor, Tensor]:
    """Bayesian linear regression with its posterior mean and covariance in the prior's normal
    coordinates.
    """
    g = generator(1)
    x = torch.randn(n, 3, generator=g, dtype=dtype)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=dtype) + 0.5 * torch.randn(
        n, generator=g, dtype=dtype
    )
    net = built(lambda: nn.Linear(3, 1), dtype)
    model = bf.BayesianModel(
        net, prior or priors.Normal(1.5), likelihoods.Gaussian(0.5), x, y
    )
    design = 1.5 * torch.cat([x, torch.ones(n, 1, dtype=dtype)], 1)
    covariance = torch.linalg.inv(design.T @ design / 0.25 + torch.eye(4, dtype=dtype))
    return model, covariance @ design.T @ y / 0.25, covariance


def linear(dim: int, prior=None, dtype: torch.dtype = F64) -> bf.BayesianModel:
    """Return linear regression without an intercept: a model of ``dim`` weights, whatever its
    posterior.
    """
    x = normal(20, dim, seed=1, dtype=dtype)
    net = built(lambda: nn.Linear(dim, 1, bias=False), dtype)
    return bf.BayesianModel(
        net, prior or priors.Normal(), likelihoods.Gaussian(0.5), x, x.sum(1)
    )


def network(
    kind: str = "gaussian",
    width: int | tuple[int, ...] = 5,
    dtype: torch.dtype = F64,
    prior=None,
) -> bf.BayesianModel:
    x = torch.randn(12, 2, generator=generator(2), dtype=dtype)
    likelihood, outputs, y = {
        "categorical": (likelihoods.Categorical(), 3, torch.arange(12) % 3),
        "gaussian": (likelihoods.Gaussian(0.3), 1, x.sum(1).sin()),
        "learned": (likelihoods.Gaussian(), 1, x.sum(1).sin()),
    }[kind]
    widths = (width,) if isinstance(width, int) else width
    net = built(lambda: chain(2, *widths, outputs, activation=nn.Tanh), dtype)
    return bf.BayesianModel(net, prior or priors.Normal(1.0), likelihood, x, y)


# ---------------------------------------- comparisons


def moments(theta: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return what is zero on average under a law of this mean and covariance,
    ``(..., dim) -> (..., moments)``.
    """
    offset = theta.double() - mean
    rows, columns = torch.triu_indices(len(mean), len(mean))
    return torch.cat(
        [offset, offset[..., rows] * offset[..., columns] - covariance[rows, columns]], -1
    )


def check_zero(series: Tensor, *, least_ess: float = 200, k: float = 4.5) -> None:
    """Check that every quantity of ``(chain, draw, quantities)`` is zero within ``k`` of its own
    Monte-Carlo errors.
    """
    values = series.double().numpy()
    ess = np.array(
        [arviz.ess(values[..., i], method="mean") for i in range(values.shape[-1])]
    )
    assert ess.min() > least_ess, f"effective sample size of only {ess.min():.0f}"
    errors = np.abs(values.mean((0, 1))) / (values.std((0, 1)) / np.sqrt(ess))
    assert errors.max() < k, f"a moment is off by {errors.max():.1f} Monte-Carlo errors"


def check_moments(
    theta: Tensor,
    mean: Tensor,
    covariance: Tensor,
    *,
    least_ess: float = 200,
    k: float = 4.5,
) -> None:
    """Compare ``(chain, draw, dim)`` draws with a law, each moment within ``k`` of its own
    Monte-Carlo errors.
    """
    check_zero(moments(theta, mean, covariance), least_ess=least_ess, k=k)


def check_runs(
    draws: bf.Draws, values: Tensor, *, least_ess: float = 200, k: float = 4.5
) -> None:
    """Check that weighted means of ``(run, particle, quantities)`` are zero, with errors from
    independent runs.
    """
    assert draws.log_weights is not None
    ess = (-(2 * draws.log_weights).logsumexp(1)).exp()
    assert ess.min() > least_ess, f"effective sample size of only {ess.min():.0f}"
    means = (draws.log_weights.exp().unsqueeze(-1) * values).sum(1)  # (run, quantities)
    errors = means.mean(0).abs() / (means.std(0) / math.sqrt(len(means)))
    assert errors.max() < k, f"a moment is off by {errors.max():.1f} Monte-Carlo errors"


def collected(kernel: Kernel, theta: Tensor, draws: int, g: torch.Generator) -> bf.Draws:
    """Step a kernel and keep every state."""
    state, states, infos = kernel.init(theta, g), [], []
    for _ in range(draws):
        state, info = kernel.step(state, g)
        states.append(state)
        infos.append(info)
    values = {
        name: torch.stack([getattr(i, name) for i in infos], 1) for name in infos[0]._fields
    }
    return bf.Draws(
        torch.stack([s.theta for s in states], 1),
        torch.stack([s.log_joint for s in states], 1),
        values,
    )


def in_equilibrium(kernel: Kernel, problem: Conjugate, draws: int = 400) -> Tensor:
    """Return what a kernel draws from exact draws, so that only invariance is tested."""
    g = generator(3)
    return collected(kernel, problem.posterior.sample(20, g), draws, g).theta


def joint_pvalues(
    make_kernel: Callable[[LogDensityAndGrad, Tensor], Kernel],
    model: bf.BayesianModel | None = None,
    n: int = 10_000,
    steps: int = 15,
) -> list[float]:
    """Test a kernel by the law that weights from the prior, moved given data drawn from them, stay
    the prior's.

    Every chain has data of its own (Geweke 2004; Talts et al. 2018 in one batch). Returns
    Kolmogorov-Smirnov p-values of each weight, and of how the log likelihood at the moved weights
    compares with that of the first ones.
    """
    model, g = model or tiny_network(), generator(4)
    start = model.sample_prior(n, g)
    outputs = model.outputs(start)  # (n, rows, 1)
    y = outputs + 0.3 * torch.randn(outputs.shape, generator=g, dtype=F64)

    def log_joint_and_grad(theta: Tensor) -> tuple[Tensor, Tensor]:
        outputs, pullback = model.network.pullback(theta, model.x)
        value = model.likelihood.log_prob(outputs, y, {}).sum(-1)
        prior, prior_grad = model.flat_prior.log_prob_and_grad(theta)
        return value + prior, pullback(
            model.likelihood.score(outputs, y, {})[0]
        ) + prior_grad

    kernel = make_kernel(log_joint_and_grad, torch.ones(n, model.dim, dtype=F64))
    state: Any = kernel.init(start, g)
    for _ in range(steps):
        state, info = kernel.step(state, g)
    assert info.acceptance_rate.mean() > 0.1, "the chains have to move"
    moved = [stats.kstest(column.numpy(), "norm").pvalue for column in state.theta.T]
    before, after = (log_joint_and_grad(theta)[0].numpy() for theta in (start, state.theta))
    return [*moved, stats.ks_2samp(before, after).pvalue]


class Moved(NamedTuple):
    """Where a hand-written kernel's chains are."""

    theta: Tensor
    log_joint: Tensor
    grad: Tensor
    direction: Tensor


class MovedInfo(NamedTuple):
    """Whether they moved."""

    acceptance_rate: Tensor


def accepted(
    new: Moved, old: Moved, gain: Tensor, g: torch.Generator
) -> tuple[Moved, MovedInfo]:
    """Return the new state with probability min(1, exp(gain)), or the old one."""
    accept = torch.rand(len(gain), generator=g).log() < gain
    chosen = (
        torch.where(accept.reshape(-1, *[1] * (a.dim() - 1)), a, b)
        for a, b in zip(new, old, strict=True)
    )
    return Moved(*chosen), MovedInfo(accept.double())


def one_in(step: int, cases: Iterable[Any]) -> list[Any]:
    """Return cases for `pytest.mark.parametrize`, of which `make test` runs one in so many, and
    `make validate` the others.
    """
    return [
        case
        if i % step == 0
        else pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.validate
        )
        for i, case in enumerate(cases)
    ]
