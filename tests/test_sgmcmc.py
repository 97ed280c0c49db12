"""Laws of the stochastic-gradient samplers: closed forms of their bias, temperatures, control
variates, survival.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import arviz
import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.compiled import normal_like
from bnnflow.inference import SGHMC, SGLD, SGNHT, Cyclical, Polynomial
from bnnflow.inference.loop import thinned
from bnnflow.inference.stochastic.burn_in import skip_exploration
from bnnflow.inference.stochastic.gradients import (
    anchored,
    control_variates,
    measure,
    stochastic,
)
from bnnflow.inference.stochastic.schedules import Schedule, Stage
from bnnflow.inference.stochastic.sghmc import sghmc
from bnnflow.inference.stochastic.sgld import psgld, sgld
from bnnflow.inference.stochastic.sgnht import sgnht
from bnnflow.types import Kernel

F64 = torch.float64
METHODS = (SGLD, SGHMC, SGNHT)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(inputs: int, dtype: torch.dtype = F64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return nn.Linear(inputs, 1).to(dtype)


class Regression(NamedTuple):
    """Bayesian linear regression with fixed noise, and its tempered posterior."""

    model: bf.BayesianModel
    mean: Tensor
    covariance: Tensor


def regression(
    n: int = 100, temperature: float = 1.0, dtype: torch.dtype = F64
) -> Regression:
    g, noise, scale = generator(1), 0.5, 1.5
    x = torch.randn(n, 3, generator=g, dtype=F64) * torch.tensor([1.0, 1.0, 3.0], dtype=F64)
    x[:, 1] += 0.5 * x[:, 0]
    y = (
        x @ torch.tensor([1.0, -0.5, 0.02], dtype=F64)
        + 0.3
        + noise * torch.randn(n, generator=g, dtype=F64)
    )
    likelihood = likelihoods.Gaussian(noise)
    model = bf.BayesianModel(
        linear(3, dtype), priors.Normal(scale), likelihood, x, y, temperature=temperature
    )
    design = torch.cat([x, torch.ones(n, 1, dtype=F64)], 1)
    covariance = torch.linalg.inv(
        design.T @ design / noise**2 + torch.eye(4, dtype=F64) / scale**2
    )
    return Regression(model, covariance @ design.T @ y / noise**2, temperature * covariance)


def iterate(
    kernel: Kernel, theta: Tensor, steps: int, burn: int, seed: int = 3
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what ``steps`` steps after ``burn`` visit, ``(chain, step, dim)``, and their
    statistics.
    """
    g = generator(seed)
    state = kernel.init(theta, g)
    visited, infos = [], []
    for k in range(burn + steps):
        state, info = kernel.step(state, g)
        if k >= burn:
            visited.append(state.theta)
            infos.append(info)
    stats = {
        name: torch.stack([getattr(i, name) for i in infos], 1) for name in infos[0]._fields
    }
    return torch.stack(visited, 1), stats


def average(series: Tensor) -> tuple[float, float]:
    """Return the mean of ``(chain, draw)`` and its Monte-Carlo error by the effective sample
    size.
    """
    ess = arviz.ess(series.double().numpy(), method="mean")
    assert ess > 60, f"effective sample size of only {ess:.0f}"
    return float(series.double().mean()), float(series.double().std() / math.sqrt(ess))


def check_moments(theta: Tensor, mean: Tensor, covariance: Tensor, k: float = 4.5) -> None:
    """Compare ``(chain, draw, dim)`` draws with a law, each moment within ``k`` of its own
    Monte-Carlo errors.
    """
    offset = theta.double() - mean
    rows, columns = torch.triu_indices(len(mean), len(mean))
    series = torch.cat(
        [offset, offset[..., rows] * offset[..., columns] - covariance[rows, columns]], -1
    ).numpy()
    ess = np.array(
        [arviz.ess(series[..., i], method="mean") for i in range(series.shape[-1])]
    )
    assert ess.min() > 200, f"effective sample size of only {ess.min():.0f}"
    errors = np.abs(series.mean((0, 1))) / (series.std((0, 1)) / np.sqrt(ess))
    assert errors.max() < k, f"a moment is off by {errors.max():.1f} Monte-Carlo errors"


def temperature(problem: Regression, theta: Tensor) -> tuple[float, float]:
    """Return the mean of (theta - mean) covariance^-1 (theta - mean) / dim, 1 under the posterior,
    and its error.
    """
    offset = theta.double() - problem.mean
    return average((offset @ torch.linalg.inv(problem.covariance) * offset).mean(-1))


def equilibrium(problem: Regression, chains: int, dtype: torch.dtype = F64) -> Tensor:
    exact = bf.Gaussian(problem.mean, torch.linalg.cholesky(problem.covariance))
    return exact.sample(chains, generator(2)).to(dtype)


def noisy_normal(
    precision: Tensor, noise: float
) -> Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]:
    """Return a Gaussian whose gradient carries normal noise of variance ``noise``."""

    def target(theta: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        error = (
            math.sqrt(noise) * torch.randn(theta.shape, generator=g, dtype=theta.dtype)
            if noise
            else 0.0
        )
        return -0.5 * (precision * theta.square()).sum(
            -1, dtype=F64
        ), error - precision * theta

    return target


# ---------------------------------------- closed forms of the bias


@pytest.mark.parametrize("temper", [1.0, 0.3])
@pytest.mark.parametrize("eps", [0.4, 1.6])
def test_full_batch_sgld_has_the_variance_of_the_closed_form(
    eps: float, temper: float
) -> None:
    problem = regression(temperature=temper)
    metric = problem.covariance.diagonal()
    root = metric.sqrt()
    values, vectors = torch.linalg.eigh(
        root[:, None] * torch.linalg.inv(problem.covariance) * root
    )
    biased = (vectors / (values * (1 - eps * values / 4))) @ vectors.T
    theta, _ = iterate(
        sgld(stochastic(problem.model, None), eps, metric),
        equilibrium(problem, 64),
        1000,
        burn=100,
    )
    check_moments(theta, problem.mean, root[:, None] * biased * root)


@pytest.mark.parametrize("eps", [0.5, 0.25])
@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_noise_widens_sgld_by_the_closed_form(eps: float, noise: float) -> None:
    precision, metric = (
        torch.tensor([1.0, 4.0], dtype=F64),
        torch.tensor([1.0, 0.5], dtype=F64),
    )
    theta, _ = iterate(
        sgld(noisy_normal(precision, noise), eps, metric),
        torch.zeros(256, 2, dtype=F64),
        600,
        burn=200,
    )
    variance = (1 + eps * metric * noise / 4) / (
        precision * (1 - eps * metric * precision / 4)
    )
    check_moments(theta, torch.zeros(2, dtype=F64), variance.diag())


def sghmc_covariance(
    h: float, friction: float, precision: float, noise: float, estimate: bool
) -> np.ndarray:
    """Return the stationary covariance of (theta, p, error of the gradient) of BAOAB on a
    Gaussian.
    """
    decay = math.exp(-friction * h)
    left = max(0.0, 1 - decay**2 * (1 + h**2 * noise)) if estimate else 1 - decay**2
    kick = np.array([[1, 0, 0], [-h * precision, 1, h], [0, 0, 1]])
    drift = np.array([[1, h / 2, 0], [0, 1, 0], [0, 0, 1]])
    forget, renew = np.diag([1, decay, 1]), np.diag([1, 1, 0])
    added = drift @ np.diag([0, left, 0]) @ drift.T + np.diag([0, 0, noise])
    propagate = renew @ drift @ forget @ drift @ kick
    return solve_discrete_lyapunov(propagate, added)


@pytest.mark.parametrize("estimate", [False, True], ids=["plain", "noise estimate"])
@pytest.mark.parametrize(("h", "noise"), [(0.8, 0.0), (0.8, 1.0), (0.4, 1.0), (0.2, 4.0)])
def test_sghmc_has_the_variance_of_the_closed_form(
    h: float, noise: float, estimate: bool
) -> None:
    precision, ones = torch.tensor([1.0, 3.0], dtype=F64), torch.ones(2, dtype=F64)
    known = noise * ones if estimate else None
    kernel = sghmc(noisy_normal(precision, noise), h, ones, 1.0, noise=known)
    theta, stats = iterate(kernel, torch.zeros(256, 2, dtype=F64), 500, burn=100)
    expected = np.stack(
        [sghmc_covariance(h, 1.0, float(p), noise, estimate) for p in precision]
    )
    check_moments(theta, torch.zeros(2, dtype=F64), torch.tensor(expected[:, 0, 0]).diag())
    kinetic, error = average(stats["kinetic_temperature"])
    assert abs(kinetic - expected[:, 1, 1].mean()) < 4.5 * error
    if noise == 0:
        assert expected[:, 0, 0] == pytest.approx(1 / precision.numpy()), (
            "BAOAB is exact on a Gaussian"
        )
        assert expected[:, 1, 1] == pytest.approx(1)


def test_sghmc_noise_heats_at_first_order_and_the_estimate_takes_it_off() -> None:
    excess = [sghmc_covariance(h, 1.0, 1.0, 1.0, False)[0, 0] - 1 for h in (0.2, 0.1, 0.05)]
    mended = [
        abs(sghmc_covariance(h, 1.0, 1.0, 1.0, True)[0, 0] - 1) for h in (0.2, 0.1, 0.05)
    ]
    for first, second in pairwise(excess):
        assert first / second == pytest.approx(2, rel=0.15)
    for first, second in pairwise(mended):
        assert first / second == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("per_parameter", [False, True], ids=["scalar", "per parameter"])
def test_the_thermostat_takes_off_the_noise(per_parameter: bool) -> None:
    precision, ones, noise = (
        torch.tensor([1.0, 2.0, 3.0], dtype=F64),
        torch.ones(3, dtype=F64),
        6.0,
    )
    start, excess = torch.zeros(256, 3, dtype=F64), []
    for h in (0.4, 0.2):
        kernel = sgnht(
            noisy_normal(precision, noise), h, ones, 1.0, per_parameter=per_parameter
        )
        theta, stats = iterate(kernel, start, round(160 / h), burn=round(60 / h))
        value, error = average((theta.square() * precision).mean(-1))
        kinetic, kinetic_error = average(stats["kinetic_temperature"])
        assert abs(kinetic - 1) < 4.5 * kinetic_error + 0.01
        excess.append((abs(value - 1), error))
        heated = (
            np.mean(
                [
                    float(p) * sghmc_covariance(h, 1.0, float(p), noise, False)[0, 0]
                    for p in precision
                ]
            )
            - 1
        )
        assert abs(value - 1) < 0.25 * heated, "far closer than without a thermostat"
    (coarse, _), (fine, error) = excess
    assert fine < coarse / 2.5 + 4 * error, "second order"


def test_the_thermostat_learns_the_noise() -> None:
    ones, h, noise = torch.ones(20, dtype=F64), 0.1, 10.0
    kernel = sgnht(noisy_normal(ones, noise), h, ones, 1.0)
    g = generator()
    state, seen = kernel.init(torch.zeros(64, 20, dtype=F64), g), []
    for k in range(1500):
        state, _ = kernel.step(state, g)
        if k >= 300:
            seen.append(state.thermostat.squeeze(-1))
    assert float(torch.stack(seen).mean()) == pytest.approx(1 + h * noise / 2, rel=0.05)


@pytest.mark.parametrize("inertia", [1.0, 4.0])
def test_the_thermostat_varies_by_one_over_inertia_and_dim(inertia: float) -> None:
    ones = torch.ones(5, dtype=F64)
    kernel = sgnht(noisy_normal(ones, 0.0), 0.1, ones, 1.0, inertia=inertia)
    g = generator()
    state, seen = kernel.init(torch.zeros(500, 5, dtype=F64), g), []
    for k in range(600):
        state, _ = kernel.step(state, g)
        if k >= 200:
            seen.append(state.thermostat.squeeze(-1))
    thermostat = torch.stack(seen)
    assert float(thermostat.mean()) == pytest.approx(1, abs=0.02)
    assert float(thermostat.var()) * inertia * 5 == pytest.approx(1, rel=0.1)


# ---------------------------------------- mini-batches


ENGINES: dict[str, Callable[..., Kernel]] = {
    "sgld": lambda target, size, problem, noise: sgld(
        target, size, problem.covariance.diagonal()
    ),
    "sghmc": lambda target, size, problem, noise: sghmc(
        target, size, problem.covariance.diagonal(), 1.0
    ),
    "sghmc, noise estimate": lambda target, size, problem, noise: sghmc(
        target, size, problem.covariance.diagonal(), 1.0, noise=noise
    ),
    "sgnht": lambda target, size, problem, noise: sgnht(
        target, size, problem.covariance.diagonal(), 1.0
    ),
    "sgnht, per parameter": lambda target, size, problem, noise: sgnht(
        target, size, problem.covariance.diagonal(), 1.0, per_parameter=True
    ),
}


@pytest.mark.crossed
@pytest.mark.parametrize(
    ("n", "batch", "temper"),
    [
        (100, 20, 1.0),
        (100, 20, 0.3),
        (10_000, 1000, 1.0),
        pytest.param(10_000, 1000, 0.3, marks=pytest.mark.validate),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_mini_batches_recover_the_temperature(
    engine: str, n: int, batch: int, temper: float
) -> None:
    problem = regression(n, temper)
    target = stochastic(problem.model, batch)
    scales = measure(
        problem.model,
        target,
        problem.mean.expand(32, -1),
        generator(),
        problem.covariance.diagonal(),
    )
    theta = equilibrium(problem, 40 if n < 1000 else 16)
    found = []
    for share in (0.3, 0.1):  # of heat that noise adds, by the formulas of the docstrings
        if engine == "sgld":
            size, promised = (
                4 * share / scales.noise_level,
                share + share * scales.curvature / scales.noise_level,
            )
        else:
            size = 2 * share / scales.noise_level
            promised = share if engine == "sghmc" else 0.35 * share
        kernel = ENGINES[engine](target, size, problem, scales.noise)
        time = size / 2 if engine == "sgld" else size
        steps = (
            min(3000, round(30 / time))
            if n < 1000
            else min(1500 if temper == 1 else 3000, round(14 / time))
        )
        visited, stats = iterate(kernel, theta, steps, burn=round(2 / time))
        value, error = temperature(problem, visited)
        found.append(value)
        assert abs(value - 1) < 1.3 * promised + 4 * error, (
            f"temperature {value:.3f}, promised {1 + promised:.3f}"
        )
        assert not stats["diverging"].any()
    assert abs(found[1] - 1) < abs(found[0] - 1) + 4 * error, "a smaller step has less bias"


@pytest.mark.parametrize("kernel", ["sgld", "sghmc"])
@pytest.mark.parametrize("temper", [1.0, 0.3])
def test_control_variates_allow_long_steps_on_large_data(
    kernel: str, temper: float
) -> None:
    problem = regression(10_000, temper)
    target = control_variates(
        problem.model, anchored(problem.model, problem.mean.expand(32, -1)), 100
    )
    metric = problem.covariance.diagonal()
    built = (
        sgld(target, 0.2, metric, cost=2)
        if kernel == "sgld"
        else sghmc(target, 0.5, metric, 1.0, cost=2)
    )
    visited, stats = iterate(built, equilibrium(problem, 32), 500, burn=20)
    value, error = temperature(problem, visited)
    assert abs(value - 1) < 0.08 + 4 * error
    assert (stats["n_steps"] == 2).all()


# What must be noticed: each of these has once been found in a published library.


def small_sgld(target: Any, eps: float, metric: Tensor, *, noise: float = 1.0) -> Kernel:
    good = sgld(target, eps, metric)

    def step(state: Any, g: torch.Generator) -> tuple[Any, Any]:
        theta = state.theta + 0.5 * eps * metric * state.grad
        theta = theta + noise * (eps * metric).sqrt() * torch.randn(
            theta.shape, generator=g, dtype=theta.dtype
        )
        new = good.init(theta, g)
        return new, good.step(new, generator())[1]

    return Kernel(good.init, step)


def small_sghmc(target: Any, h: float, metric: Tensor, *, friction: bool = True) -> Kernel:
    good, decay = sghmc(target, h, metric, 1.0), math.exp(-h)

    def step(state: Any, g: torch.Generator) -> tuple[Any, Any]:
        momentum = (decay if friction else 1.0) * (
            state.momentum + h * metric.sqrt() * state.grad
        )
        momentum = momentum + math.sqrt(1 - decay**2) * torch.randn(
            momentum.shape, generator=g, dtype=F64
        )
        theta = state.theta + h * metric.sqrt() * momentum
        value, grad = target(theta, g)
        return state._replace(
            theta=theta, log_joint=value, grad=grad, momentum=momentum
        ), good.step(state, generator())[1]

    return Kernel(good.init, step)


def prior_scaled(model: bf.BayesianModel, batch: int) -> Any:
    """Return a target whose prior, too, is multiplied by n / batch."""

    def target(theta: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        value, grad = model.minibatch_log_joint_and_grad(theta, g, batch)
        prior, prior_grad = model.flat_prior.log_prob_and_grad(theta)
        more = (len(model.x) / batch - 1) / model.temperature
        return value + more * prior, grad + more * prior_grad

    return target


@pytest.mark.parametrize("fault", [None, "noise", "friction"])
def test_the_temperature_test_has_power(fault: str | None) -> None:
    problem = regression(100)
    target, metric = stochastic(problem.model, None), problem.covariance.diagonal()
    if fault == "friction":
        kernel = small_sghmc(target, 0.2, metric, friction=False)
    else:
        kernel = small_sgld(target, 0.1, metric, noise=1.3 if fault else 1.0)
    visited, _ = iterate(kernel, equilibrium(problem, 48), 400, burn=20)
    offset = visited - problem.mean
    off = abs(float((offset @ torch.linalg.inv(problem.covariance) * offset).mean()) - 1)
    assert (off < 0.08) == (fault is None), f"temperature off by {off:.3f}"


def test_the_test_of_unbiasedness_has_power() -> None:
    model = strong_prior()
    with pytest.raises(AssertionError, match="biased"):
        check_unbiased(model, prior_scaled(model, 4))


def strong_prior() -> bf.BayesianModel:
    given = regression(100).model
    return bf.BayesianModel(
        given.net, priors.Normal(0.05), given.likelihood, given.x, given.y, temperature=0.5
    )


def check_unbiased(model: bf.BayesianModel, target: Any) -> None:
    """Compare the mean of gradients with the full gradient, each coordinate within its own
    errors.
    """
    point = model.sample_prior(1, seed=5)
    full = model.log_joint_and_grad(point)[1]
    grads = target(point.expand(20_000, -1), generator(6))[1]
    errors = (grads.mean(0) - full).abs() / (
        grads.std(0) / math.sqrt(len(grads)) + 1e-9 * full.abs()
    )
    assert errors.max() < 4.5, f"biased by {errors.max():.1f} errors"


@pytest.mark.parametrize("batch", [1, 7, 100])
@pytest.mark.parametrize("anchor", [False, True], ids=["plain", "control variates"])
def test_gradients_are_unbiased_prior_and_temperature_included(
    anchor: bool, batch: int
) -> None:
    model = strong_prior()
    if anchor:
        at = anchored(model, model.sample_prior(1, seed=1).expand(20_000, -1))
        check_unbiased(model, control_variates(model, at, batch))
    else:
        check_unbiased(model, stochastic(model, batch))


def test_control_variates_have_the_variance_of_the_closed_form() -> None:
    problem, batch, many = regression(100), 10, 20_000
    model = problem.model
    at = anchored(model, problem.mean.expand(many, -1))
    theta = problem.mean + problem.covariance.diagonal().sqrt()
    target = control_variates(model, at, batch)
    assert target(at.theta, generator())[1].std(0).max() == 0, "exact at the anchor"
    grads = target(theta.expand(many, -1), generator())[1]
    design = torch.cat([model.x, torch.ones(100, 1, dtype=F64)], 1)
    # (row, dim), differences from the anchor's
    each = -design * (design @ (theta - problem.mean))[:, None] / 0.5**2
    strata = each.unflatten(0, (batch, -1))  # one row is drawn of each
    expected = (100 / batch) ** 2 * strata.var(1, correction=0).sum(0)
    assert torch.allclose(grads.var(0), expected, rtol=0.06)
    plain = stochastic(model, batch)(theta.expand(many, -1), generator())[1].var(0)
    assert (expected < plain / 4).all()


# ---------------------------------------- what a step is


@pytest.mark.parametrize("n", [1, 4])
def test_steps_in_one_transition_are_the_same_steps(n: int) -> None:
    problem = regression()
    metric = problem.covariance.diagonal()
    kernel = sgld(stochastic(problem.model, 10), 1e-3, metric, schedule=Polynomial(1.0))
    start = equilibrium(problem, 3)
    visited, stats = iterate(kernel, start, n, burn=0)
    together, found = iterate(thinned(kernel, n), start, 1, burn=0)
    assert torch.equal(together[:, 0], visited[:, -1])
    assert (found["n_steps"] == n).all()
    assert not found["diverging"].any()
    assert torch.allclose(found["step_size"][:, 0], stats["step_size"].mean(1))


def test_one_step_of_sghmc_uses_the_gradient() -> None:
    ones, h = torch.ones(2, dtype=F64), 0.3

    def slope(size: float) -> Any:
        return lambda theta, g: (theta.sum(-1), torch.full_like(theta, size))

    start, ends = torch.zeros(4, 2, dtype=F64), []
    for size in (0.0, 1.0):
        ends.append(iterate(sghmc(slope(size), h, ones, 1.0), start, 1, burn=0)[0])
    assert torch.allclose(
        ends[1] - ends[0], torch.tensor(h**2 / 2 * (1 + math.exp(-h)), dtype=F64)
    )


@pytest.mark.parametrize("batch", [1, 5, None])
def test_the_noise_of_sgld_knows_neither_rows_nor_batches(batch: int | None) -> None:
    problem = regression(100)
    theta = problem.mean.expand(20_000, -1)

    def flat(theta: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        value, grad = stochastic(problem.model, batch)(theta, g)
        return value, 0 * grad

    metric = problem.covariance.diagonal()
    moved = iterate(sgld(flat, 0.1, metric), theta, 1, burn=0)[0].squeeze(1) - theta
    assert torch.allclose(moved.var(0), 0.1 * metric, rtol=0.05)


def test_rmsprop_divides_by_the_running_gradient() -> None:
    n, decay, floor, eps, g = 100, 0.9, 0.01, 1e-3, generator()
    problem = regression(n)
    kernel = psgld(stochastic(problem.model, None), eps, n, decay=decay, floor=floor)
    state = kernel.init(problem.mean.expand(3, -1) + 0.1, g)
    noise = normal_like(state.theta, generator(g.initial_seed()))
    new, _ = kernel.step(state, g)
    squares = decay * state.squares + (1 - decay) * (state.grad / n) ** 2
    metric = 1 / (floor + squares.sqrt())
    assert torch.allclose(
        new.theta,
        state.theta + eps / 2 * metric * state.grad + (eps * metric).sqrt() * noise,
    )


def test_rmsprop_is_near_the_posterior_where_noise_sets_its_scale() -> None:
    problem, n, batch = regression(100), 100, 5
    target = stochastic(problem.model, batch)
    start = equilibrium(problem, 48)
    state = psgld(target, 1e-6, n).init(start, generator())
    scales = measure(problem.model, target, start, generator(), state.metric)
    kernel = psgld(
        target, 4 * 0.05 / max(scales.curvature, scales.noise_level), n, decay=0.999
    )
    visited, _ = iterate(kernel, start, 3000, burn=300)
    value, error = temperature(problem, visited)
    assert abs(value - 1) < 0.15 + 4 * error


# ---------------------------------------- scales


def test_scales_are_those_of_a_gaussian() -> None:
    problem, batch = regression(100), 10
    precision = torch.linalg.inv(problem.covariance)
    theta = problem.mean.expand(32, -1)
    scales = measure(problem.model, stochastic(problem.model, batch), theta, generator())
    scaled = scales.metric.sqrt()[:, None] * precision * scales.metric.sqrt()
    assert torch.allclose(scaled.norm(dim=1), torch.ones(4, dtype=F64), rtol=0.2)
    assert scales.curvature == pytest.approx(
        float(torch.linalg.eigvalsh(scaled).max()), rel=0.05
    )
    design = torch.cat([problem.model.x, torch.ones(100, 1, dtype=F64)], 1)
    residuals = problem.model.y.flatten() - design @ problem.mean
    rows = (design * residuals[:, None] / 0.5**2).unflatten(0, (batch, -1))
    noise = (100 / batch) ** 2 * rows.var(1, correction=0).sum(0)
    assert torch.allclose(scales.noise, noise, rtol=0.3)
    assert scales.noise_level == pytest.approx(float((scales.metric * scales.noise).mean()))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("n", [20, 5000])
def test_the_preconditioner_of_a_diagonal_posterior_is_its_variances(
    n: int, dtype: torch.dtype
) -> None:
    widths = torch.tensor([1e-2, 1.0, 30.0], dtype=F64)
    x = (
        torch.linalg.qr(torch.randn(n, 3, generator=generator(), dtype=F64))[0]
        * math.sqrt(n)
        * widths
    ).to(dtype)
    net = linear(3, dtype)
    prior = {
        "weight": torch.distributions.Normal(0.0, 1.0),
        "bias": torch.distributions.Normal(0.0, 1e-3),
    }
    model = bf.BayesianModel(net, prior, likelihoods.Gaussian(0.5), x, x.sum(1))
    scales = measure(model, None, torch.zeros(8, 4, dtype=dtype), generator())
    variances = 1 / (n * widths**2 / 0.5**2 + 1)
    assert torch.allclose(scales.metric[:3].double(), variances, rtol=0.1)
    assert scales.curvature == pytest.approx(1, rel=0.1)


# ---------------------------------------- from the outside


@pytest.mark.crossed
@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(None, torch.float32), (10, F64)],
    ids=["full, f32", "batches, f64"],
)
@pytest.mark.parametrize("method", METHODS)
def test_defaults_find_the_posterior(
    method: Any, batch: int | None, dtype: torch.dtype
) -> None:
    problem = regression(100, dtype=dtype)
    options = {"control_variates": True} if batch else {}
    draws = bf.sample(
        problem.model,
        method(batch_size=batch, **options),
        chains=16,
        warmup=80,
        draws=200,
        seed=0,
    )
    value, error = temperature(problem, draws.theta)
    assert abs(value - 1) < 0.15 + 4 * error
    assert draws.theta.dtype == dtype
    assert draws.log_joint.dtype == F64
    assert torch.allclose(draws.log_joint, problem.model.log_joint(draws.theta), rtol=1e-5)
    assert draws.info["exact"] is False
    assert (draws.stats["n_steps"] == 10 * (2 if batch else 1)).all()
    names = {"n_steps", "diverging", "step_size", "configurational_temperature"}
    assert set(draws.stats) == names | (
        {"kinetic_temperature"} if method is not SGLD else set()
    )
    virial, error = average(draws.stats["configurational_temperature"])
    assert abs(virial - 1) < 0.15 + 4 * error
    again = bf.sample(
        problem.model,
        method(batch_size=batch, **options),
        chains=16,
        warmup=80,
        draws=3,
        seed=0,
    )
    assert torch.equal(draws.theta[:, :3], again.theta)


def test_large_data_from_afar() -> None:
    problem = regression(10_000)
    method = SGLD(batch_size=100, control_variates=True)
    draws = bf.sample(
        problem.model, method, chains=8, warmup=80, draws=150, seed=0, init="prior"
    )
    value, error = temperature(problem, draws.theta)
    assert abs(value - 1) < 0.2 + 4 * error


@pytest.mark.parametrize(
    "method",
    [SGLD(), SGLD(preconditioner="rmsprop"), SGHMC(), SGNHT(), SGNHT(per_parameter=True)],
)
def test_states_are_plain(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnnflow.inference.stochastic import burn_in

    seen = []
    inner = burn_in.run_chains

    def spy(model: Any, run: Any, process: Any, **options: Any) -> Any:
        g = generator()
        state = process.init(model.sample_prior(2, seed=0), g)
        state, _ = process.step(state, g)
        before = [leaf.clone() for leaf in leaves(state) if isinstance(leaf, Tensor)]
        process.step(state, g)
        seen.append(state)
        assert all(
            map(
                torch.equal,
                before,
                [leaf for leaf in leaves(state) if isinstance(leaf, Tensor)],
            )
        ), "mutated"
        return inner(model, run, process, **options)

    monkeypatch.setattr(burn_in, "run_chains", spy)
    bf.sample(regression().model, method, chains=2, warmup=2, draws=2, seed=0)
    assert all(
        leaf is None or type(leaf) in (int, float, Tensor) for leaf in leaves(seen[0])
    )


def leaves(state: Any) -> list[Any]:
    return (
        [leaf for part in state for leaf in leaves(part)]
        if isinstance(state, tuple)
        else [state]
    )


@pytest.mark.parametrize("method", METHODS)
def test_resumed_runs_are_the_same(method: Any, tmp_path: Any) -> None:
    model = regression().model
    options = {"chains": 2, "warmup": 5, "seed": 0, "progress": False}
    settings = method(
        batch_size=10, control_variates=True, schedule=Cyclical(40, 0.5), thinning=3
    )
    whole = bf.sample(model, settings, draws=20, **options)
    bf.sample(model, settings, draws=7, checkpoint=tmp_path / "run", **options)
    more = bf.sample(
        model,
        settings,
        draws=20,
        checkpoint=bf.Checkpoint(tmp_path / "run", resume=True),
        **options,
    )
    assert torch.equal(whole.theta, more.theta)


@pytest.mark.parametrize(
    "settings",
    [
        {"step_size": 0.0},
        {"step_size": math.nan},
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"thinning": 0},
        {"bias": 1.0},
        {"preconditioner": "adam"},
        {"control_variates": True},
        {"schedule": 0.1},
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_settings_are_checked(method: Any, settings: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
        method(**settings)


def test_batches_larger_than_the_data_are_refused() -> None:
    with pytest.raises(ValueError, match="at most the 100 rows"):
        bf.sample(regression().model, SGLD(batch_size=101), chains=2, draws=2)


# ---------------------------------------- schedules


def test_the_cosine_cycle_is_the_papers() -> None:
    length, cycle = 50, Cyclical(50, 0.8)
    for k in range(1, 3 * length):  # equation 1 of Zhang et al. (2020) counts from 1
        expected = 0.5 * (math.cos(math.pi * ((k - 1) % length) / length) + 1)
        assert cycle(k - 1).scale == pytest.approx(expected)
        assert cycle(k - 1).sampling == (((k - 1) % length) / length >= 0.8)
    assert cycle.kept_scale == max(s.scale for s in map(cycle, range(length)) if s.sampling)


def test_polynomial_decay_is_that_of_welling_and_teh() -> None:
    a, b, gamma = 0.3, 20.0, 0.55
    schedule = Polynomial(delay=b, power=gamma)
    for k in (0, 1, 10, 1000):
        assert a * b**-gamma * schedule(k).scale == pytest.approx(a * (b + k) ** -gamma)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cyclical(0),
        lambda: Cyclical(10, 1.0),
        lambda: Cyclical(2, 0.9),
        lambda: Polynomial(0.0),
        lambda: Polynomial(power=1.5),
    ],
)
def test_schedules_are_checked(make: Callable[[], Schedule]) -> None:
    with pytest.raises(ValueError, match=r"must be|is left"):
        make()


@pytest.mark.parametrize("method", METHODS)
def test_draws_are_kept_from_sampling_stages_only(method: Any) -> None:
    cycle = Cyclical(40, 0.5)
    draws = bf.sample(
        regression().model,
        method(step_size=1e-4, schedule=cycle, thinning=5),
        chains=2,
        warmup=2,
        draws=9,
    )
    power = 1 if method is SGLD else 0.5
    assert draws.stats["step_size"].max() <= 1e-4 * cycle.kept_scale**power
    # 20 of exploration before each cycle
    assert draws.stats["n_steps"][0].tolist() == [25, 5, 5, 5, 25, 5, 5, 5, 25]


def test_exploration_has_no_noise() -> None:
    class Explore:
        kept_scale = 1.0

        def __call__(self, step: int) -> Stage:
            return Stage(1.0, step % 10 == 9)

    ones = torch.ones(3, dtype=F64)
    steps = skip_exploration(
        sgld(noisy_normal(ones, 0.0), 0.1, ones, schedule=Explore()), Explore()
    )
    theta, stats = iterate(steps, torch.full((5000, 3), 2.0, dtype=F64), 1, burn=0)
    assert (stats["n_steps"] == 10).all()
    assert float(theta.mean()) == pytest.approx(2 * 0.95**10, abs=0.02)
    assert float(theta.var()) == pytest.approx(0.1, rel=0.05)


def test_decreasing_steps_lose_the_bias() -> None:
    ones, start = torch.ones(2, dtype=F64), torch.zeros(256, 2, dtype=F64)
    constant, _ = iterate(sgld(noisy_normal(ones, 4.0), 0.8, ones), start, 2000, burn=50)
    schedule = Polynomial(delay=20, power=0.5)
    decayed, _ = iterate(
        sgld(noisy_normal(ones, 4.0), 0.8, ones, schedule=schedule), start, 2000, burn=50
    )
    excess = [float(theta.var()) - 1 for theta in (constant, decayed)]
    mean_scale = np.mean([schedule(k).scale for k in range(50, 2050)])
    assert excess[0] == pytest.approx(1.8 / 0.8 - 1, rel=0.1)
    # To first order the excess is (noise + 1) / 4 times the mean step size, as all draws count
    # equally.
    assert excess[1] == pytest.approx(0.8 * 5 / 4 * mean_scale, rel=0.25)


def test_cycles_find_both_modes() -> None:
    centres = torch.tensor([-3.0, 3.0], dtype=F64)

    def target(theta: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        logs = -0.5 * ((theta.unsqueeze(-1) - centres) / 0.5).square()  # (chain, 1, mode)
        share = logs.softmax(-1)
        return logs.logsumexp(-1).sum(-1), (share * (centres - theta.unsqueeze(-1))).sum(
            -1
        ) / 0.25

    ones, start = torch.ones(1, dtype=F64), torch.full((64, 1), 3.0, dtype=F64)
    cycle = Cyclical(100, 0.3)
    plain, _ = iterate(sgld(target, 0.1, ones), start, 300, burn=0)
    cycled, _ = iterate(
        skip_exploration(sghmc(target, 1.3, ones, 0.2, schedule=cycle), cycle),
        start,
        1500,
        burn=0,
    )
    assert (plain > 0).all()
    assert 0.1 < float((cycled < 0).double().mean()) < 0.9


# ---------------------------------------- survival


KERNELS: dict[str, Callable[[Any, float, Tensor], Kernel]] = {
    "sgld": lambda target, size, ones: sgld(target, size, ones),
    "psgld": lambda target, size, ones: psgld(target, size, 1),
    "sghmc": lambda target, size, ones: sghmc(target, size, ones, 1.0),
    "sgnht": lambda target, size, ones: sgnht(target, size, ones, 1.0),
}


@pytest.mark.parametrize("nothing", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", KERNELS)
def test_a_lost_chain_goes_back_and_harms_nobody(name: str, nothing: float) -> None:
    ones = torch.ones(2, dtype=F64)
    good = noisy_normal(ones, 0.0)

    def cliff(theta: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        value, grad = good(theta, g)
        beyond = (torch.arange(len(theta)) == 0) & (theta[:, 0] > 0.1)
        return torch.where(beyond, nothing, value), torch.where(
            beyond[:, None], nothing, grad
        )

    start = torch.full((4, 2), -0.1, dtype=F64)
    hurt, stats = iterate(KERNELS[name](cliff, 0.3, ones), start, 200, burn=0)
    sound, _ = iterate(KERNELS[name](good, 0.3, ones), start, 200, burn=0)
    assert torch.equal(hurt[1:], sound[1:])
    assert hurt.isfinite().all()
    assert (hurt[0, :, 0] <= 0.1).all()
    assert stats["diverging"][0].any()
    assert not stats["diverging"][1:].any()
    moved = (hurt[0, 1:] != hurt[0, :-1]).any(-1)
    assert not moved[stats["diverging"][0, 1:]].any(), "put back where it was"
    assert moved.double().mean() > 0.2, "and not stuck"


@pytest.mark.parametrize("name", KERNELS)
def test_stiff_tails_are_survived(name: str) -> None:
    def quartic(theta: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        return -theta.double().pow(4).sum(-1), -4 * theta**3

    ones = torch.ones(2)
    # an unguarded step from here leaves for infinity
    start = torch.tensor([[30.0, 30.0], [0.1, 0.1]])
    size = 1.0 if name == "psgld" else 0.05
    theta, stats = iterate(KERNELS[name](quartic, size, ones), start, 2000, burn=0)
    assert theta.isfinite().all()
    assert stats["diverging"][0, 0]
    assert theta[:, 1500:].abs().max() < 4
    assert name == "psgld" or not stats["diverging"][1].any()


class Cliff(bf.BayesianModel):
    """A posterior that is NaN outside a ball around zero."""

    def log_joint_and_grad(
        self, theta: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        value, grad = super().log_joint_and_grad(theta, rows)
        beyond = theta.norm(dim=-1) > 4
        return value.masked_fill(beyond, math.nan), grad.masked_fill(
            beyond.unsqueeze(-1), math.nan
        )


@pytest.mark.parametrize("method", METHODS)
def test_nan_shortens_the_step_in_warm_up(method: Any) -> None:
    given = regression().model
    model = Cliff(given.net, given.prior, given.likelihood, given.x, given.y)
    draws = bf.sample(
        model,
        method(step_size=3.0),
        chains=8,
        warmup=60,
        draws=20,
        seed=0,
        init=torch.zeros(4),
    )
    assert draws.info["step_size"] < 0.5
    assert draws.theta.isfinite().all()
    assert draws.stats["diverging"].double().mean() < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_a_given_step_size_is_taken_where_nothing_breaks(method: Any) -> None:
    draws = bf.sample(
        regression().model, method(step_size=1e-3), chains=4, warmup=40, draws=5, seed=0
    )
    assert draws.info["step_size"] == 1e-3
    assert draws.info["divergences"] == 0


# ---------------------------------------- networks


def network() -> bf.BayesianModel:
    x = torch.linspace(-1.5, 1.5, 20, dtype=F64).unsqueeze(-1)
    y = (2 * x).sin() + 0.2 * torch.randn(20, 1, generator=generator(2), dtype=F64)
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).to(F64)
    return bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), x, y)


@pytest.mark.validate
@pytest.mark.parametrize(
    "method",
    [
        SGLD(),
        SGHMC(),
        SGNHT(),
        SGLD(batch_size=10, control_variates=True),
        SGHMC(batch_size=10, noise_estimate=True),
        SGNHT(batch_size=10),
    ],
)
def test_predictions_agree_with_hmc(method: Any) -> None:
    model = network()
    exact = bf.sample(model, bf.HMC(), chains=16, warmup=300, draws=500, seed=0)
    draws = bf.sample(model, method, chains=16, warmup=300, draws=4000, seed=0)
    sites = torch.linspace(-2, 2, 9, dtype=F64).unsqueeze(-1)
    for function in (lambda f: f, lambda f: f.square()):
        both = [function(model.outputs(d.theta, sites).squeeze(-1)) for d in (draws, exact)]
        for site in range(len(sites)):
            (mean, error), (truth, other) = (average(values[..., site]) for values in both)
            scale = float(both[1][..., site].std())
            assert abs(mean - truth) < 4.5 * math.hypot(error, other) + 0.1 * scale
