"""Laws of the exact engines, and of the kernels they are made of.

A new engine is one more row of ``ENGINES``, a new kernel one more row of ``KERNELS``.
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
from scipy import stats
from scipy.integrate import solve_ivp
from torch import Tensor

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.inference.mcmc.adjusted_mclmc import adjusted_mclmc
from bnnflow.inference.mcmc.hmc import hmc
from bnnflow.inference.mcmc.mclmc import mclmc, momentum_update, random_directions
from bnnflow.method import Method
from bnnflow.types import Kernel, LogDensityAndGrad
from tests.problems import (
    F64,
    Moved,
    MovedInfo,
    accepted,
    built,
    check_moments,
    check_runs,
    cliff,
    collected,
    conjugate,
    generator,
    in_equilibrium,
    joint_pvalues,
    moments,
    one_in,
    tiny_network,
    two_weights,
)


class Engine(NamedTuple):
    """A method whose draws are the posterior's, and how much of it the tests ask for."""

    method: Any
    sizes: dict[str, int]  # to find moments
    small: dict[str, int]  # to rank among, in `make test`
    large: dict[str, int]  # in `make validate`


CHAINS = {"chains": 8, "warmup": 300, "draws": 400}
SMALL, LARGE = (
    {"chains": 4, "warmup": 80, "draws": 60},
    {"chains": 4, "warmup": 150, "draws": 200},
)
ENGINES = {
    "HMC": Engine(bf.HMC(), CHAINS, SMALL, LARGE),
    "AdjustedMCLMC": Engine(
        bf.AdjustedMCLMC(), CHAINS | {"warmup": 200, "draws": 250}, SMALL, LARGE
    ),
    "ParallelTempering": Engine(
        bf.ParallelTempering(levels=8), CHAINS | {"draws": 600}, SMALL, LARGE
    ),
    "SMC": Engine(bf.SMC(particles=300), {"chains": 16}, {"chains": 1}, {"chains": 2}),
}
every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


# ---------------------------------------- closed forms


def agrees(draws: bf.Draws, mean: Tensor, covariance: Tensor) -> None:
    """Check weighted or Markov draws against a law."""
    if draws.log_weights is None:
        check_moments(draws.theta, mean, covariance)
    else:
        check_runs(draws, moments(draws.theta, mean, covariance))


@pytest.mark.crossed
@every_engine
@pytest.mark.parametrize("hard", [False, True], ids=["mild", "correlated and badly scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
def test_engines_find_the_conjugate_posterior(
    engine: Engine, hard: bool, dtype: torch.dtype
) -> None:
    problem = conjugate(hard, dtype)
    draws = bf.sample(problem.model, engine.method, seed=0, **engine.sizes)
    assert draws.theta.shape[0] == engine.sizes["chains"]
    assert draws.theta.dtype == dtype
    assert draws.log_joint.dtype == F64
    agrees(draws, problem.mean, problem.covariance)
    if "diverging" in draws.stats:
        assert draws.info["divergences"] == 0
        assert 0.6 < draws.stats["acceptance_rate"].mean() < 0.98


@pytest.mark.crossed
@every_engine
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_engines_sample_at_a_temperature(engine: Engine, temperature: float) -> None:
    problem = conjugate(temperature=temperature)
    agrees(
        bf.sample(problem.model, engine.method, seed=1, **engine.sizes),
        problem.mean,
        problem.covariance,
    )


@pytest.mark.slow
def test_pyros_sampler_finds_the_conjugate_posterior() -> None:
    problem = conjugate()
    draws = bf.sample(problem.model, bf.PyroNUTS(), chains=1, warmup=100, draws=250, seed=0)
    check_moments(draws.theta, problem.mean, problem.covariance, least_ess=50)


@pytest.mark.validate
def test_engines_agree_with_pyros_about_a_network() -> None:
    """Means and squares of predictions, within four Monte-Carlo errors of both samplers
    together.
    """
    model = tiny_network()
    sites = torch.tensor([[-2.0], [0.1], [2.5]], dtype=F64)

    def estimates(draws: bf.Draws) -> tuple[np.ndarray, np.ndarray]:
        outputs = model.outputs(draws.theta, sites).squeeze(-1)
        values = torch.cat([outputs, outputs.square()], -1)
        if draws.log_weights is not None:
            means = (draws.log_weights.exp().unsqueeze(-1) * values).sum(1)
            return means.mean(0).numpy(), (means.std(0) / math.sqrt(len(means))).numpy()
        ess = np.array(
            [arviz.ess(column.numpy(), method="mean") for column in values.unbind(-1)]
        )
        assert ess.min() > 40
        return values.mean((0, 1)).numpy(), values.flatten(0, 1).std(0).numpy() / np.sqrt(
            ess
        )

    oracle = bf.PyroNUTS(max_tree_depth=5)
    start = bf.sample(model, bf.HMC(), chains=1, warmup=100, draws=1, seed=5).theta[0]
    expected, its_error = estimates(
        bf.sample(model, oracle, chains=1, warmup=60, draws=400, seed=0, init=start)
    )
    for name, engine in ENGINES.items():
        found, error = estimates(bf.sample(model, engine.method, seed=1, **engine.sizes))
        assert (np.abs(found - expected) / np.sqrt(error**2 + its_error**2)).max() < 4, name


def second_moment(energy_variance: float) -> tuple[float, float]:
    """Return how wide MCLMC finds the conjugate posterior, relative to its width, and the
    Monte-Carlo error.
    """
    problem = conjugate()
    method = bf.MCLMC(energy_variance=energy_variance, thinning=4)
    theta = bf.sample(problem.model, method, chains=32, warmup=150, draws=400, seed=0).theta
    factor = torch.linalg.cholesky(problem.covariance)
    whitened = torch.linalg.solve_triangular(
        factor, (theta - problem.mean).unsqueeze(-1), upper=False
    ).squeeze(-1)
    values = whitened.square().mean(-1).numpy()
    return float(values.mean()), float(
        values.std() / np.sqrt(arviz.ess(values, method="mean"))
    )


def test_the_bias_of_unadjusted_chains_is_small_and_shrinks() -> None:
    (coarse, error), (usual, its_error), (fine, fine_error) = (
        second_moment(e) for e in (8.0, 0.005, 1e-4)
    )
    assert abs(fine - 1) < 4 * fine_error + 0.01
    assert abs(usual - 1) < 4 * its_error + 0.05
    assert abs(coarse - 1) > 2 * abs(usual - 1) + 4 * error


# ---------------------------------------- kernels


def masses(ones: Tensor) -> Tensor:
    """Return a mass matrix of its own for every chain."""
    return ones * (0.2 + torch.rand(ones.shape, generator=generator(7), dtype=ones.dtype))


MakeKernel = Callable[[LogDensityAndGrad, Tensor], Kernel]
KERNELS: dict[str, MakeKernel] = {
    "hmc": lambda target, ones: hmc(target, 0.14, 6, 0.5 * ones[0]),
    "hmc, one step": lambda target, ones: hmc(target, 0.25, 1, 0.5 * ones[0]),
    "hmc, a mass matrix each": lambda target, ones: hmc(target, 0.14, 6, masses(ones)),
    "adjusted": lambda target, ones: adjusted_mclmc(target, 0.45, 6, 0.5 * ones[0]),
    "adjusted, one step": lambda target, ones: adjusted_mclmc(
        target, 0.8, 1, 0.5 * ones[0]
    ),
    "adjusted, a mass matrix each": lambda target, ones: adjusted_mclmc(
        target, 0.45, 6, masses(ones)
    ),
}
every_kernel = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)


@every_kernel
@pytest.mark.parametrize(
    "model", [tiny_network, two_weights], ids=["network", "two weights"]
)
def test_kernels_keep_the_joint_law(
    make: MakeKernel, model: Callable[[], bf.BayesianModel]
) -> None:
    assert min(joint_pvalues(make, model())) > 1e-4


@pytest.mark.parametrize(
    "options",
    [{"step_jitter": 0.0, "trajectory_jitter": 1.0}, {}],
    ids=["plain", "jittered"],
)
@pytest.mark.parametrize("make", [hmc, adjusted_mclmc])
@pytest.mark.parametrize("step_size", [0.4, 0.9])
def test_kernels_leave_the_posterior_invariant(
    step_size: float, make: Any, options: dict[str, float]
) -> None:
    problem = conjugate()
    step_size *= math.sqrt(4) if make is adjusted_mclmc else 1.0
    kernel = make(
        problem.model.log_joint_and_grad,
        step_size,
        3,
        problem.covariance.diagonal(),
        **options,
    )
    check_moments(in_equilibrium(kernel, problem), problem.mean, problem.covariance)


def small_hmc(
    target: LogDensityAndGrad,
    step_size: float,
    scale: Tensor,
    *,
    noise: float = 1.0,
    sign: float = 1.0,
    accepts: bool = True,
) -> Kernel:
    """Return a two-step Hamiltonian kernel that can be broken in three ways."""

    def init(theta: Tensor, generator: torch.Generator) -> Moved:
        return Moved(theta, *target(theta), torch.zeros_like(theta))

    def step(state: Moved, generator: torch.Generator) -> tuple[Moved, MovedInfo]:
        theta, value, grad, _ = state
        start = p = noise * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        for _ in range(2):
            p = p + 0.5 * step_size * scale * grad
            theta = theta + step_size * scale * p
            value, grad = target(theta)
            p = p + 0.5 * step_size * scale * grad
        gain = value - state.log_joint - 0.5 * (p.square() - start.square()).sum(-1)
        gain = sign * gain if accepts else torch.full_like(gain, math.inf)
        return accepted(Moved(theta, value, grad, state.direction), state, gain, generator)

    return Kernel(init, step)


def small_microcanonical(
    target: LogDensityAndGrad,
    step_size: float,
    scale: Tensor,
    *,
    volume: float = 1.0,
    keep: float = 0.0,
    flips: bool = True,
) -> Kernel:
    """Return a two-step microcanonical kernel that counts ``volume`` times the volume's change.

    It keeps part of its direction from one transition to the next, which is right if a rejection
    turns it round.
    """

    def init(theta: Tensor, generator: torch.Generator) -> Moved:
        return Moved(theta, *target(theta), random_directions(theta, generator))

    def step(state: Moved, generator: torch.Generator) -> tuple[Moved, MovedInfo]:
        theta, value, grad, direction = state
        fresh = random_directions(theta, generator)
        # the normal law of length and direction together keeps the directions uniform
        if keep:
            lengths = torch.randn(theta.shape, generator=generator, dtype=theta.dtype).norm(
                dim=-1, keepdim=True
            )
            others = torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
            fresh = keep * lengths * direction + math.sqrt(1 - keep**2) * others
            fresh = fresh / fresh.norm(dim=-1, keepdim=True)
        direction, kinetic = fresh, torch.zeros_like(value)
        for _ in range(2):
            direction, first = momentum_update(direction, scale * grad, 0.5 * step_size)
            theta = theta + step_size * scale * direction
            value, grad = target(theta)
            direction, second = momentum_update(direction, scale * grad, 0.5 * step_size)
            kinetic = kinetic + first + second
        gain = value - state.log_joint - volume * kinetic
        stay = state._replace(direction=-fresh if flips else fresh)
        return accepted(Moved(theta, value, grad, direction), stay, gain, generator)

    return Kernel(init, step)


RIGHT = {
    "hmc": (small_hmc, 0.12, {}),
    "microcanonical": (small_microcanonical, 0.45, {}),
    "microcanonical, kept and flipped": (small_microcanonical, 0.45, {"keep": 0.8}),
}
BROKEN = {
    "hmc, noise": (small_hmc, 0.12, {"noise": 1.3}),
    "hmc, energy": (small_hmc, 0.12, {"sign": -1.0}),
    "hmc, acceptance": (small_hmc, 0.12, {"accepts": False}),
    "microcanonical, no volume": (small_microcanonical, 0.45, {"volume": 0.0}),
    "microcanonical, dim for dim - 1": (small_microcanonical, 0.45, {"volume": 10 / 9}),
    "microcanonical, kept and not flipped": (
        small_microcanonical,
        0.45,
        {"keep": 0.8, "flips": False},
    ),
}


@pytest.mark.parametrize("fault", one_in(2, [*RIGHT, *BROKEN]))
def test_the_joint_law_test_has_power(fault: str) -> None:
    make, step_size, options = (RIGHT | BROKEN)[fault]
    pvalues = joint_pvalues(
        lambda target, ones: make(target, step_size, ones, **options), n=6000, steps=60
    )
    assert (min(pvalues) > 1e-4) == (fault in RIGHT)


@pytest.mark.parametrize("fault", ["hmc", "hmc, noise", "hmc, energy", "hmc, acceptance"])
def test_the_closed_form_test_has_power(fault: str) -> None:
    problem = conjugate()
    make, _, options = (RIGHT | BROKEN)[fault]
    kernel = make(
        problem.model.log_joint_and_grad,
        0.8,
        problem.covariance.diagonal().sqrt(),
        **options,
    )
    theta = in_equilibrium(kernel, problem)
    if fault in RIGHT:
        check_moments(theta, problem.mean, problem.covariance)
    else:
        with pytest.raises(AssertionError, match="Monte-Carlo errors"):
            check_moments(theta, problem.mean, problem.covariance, least_ess=0)


@pytest.mark.parametrize("nothing", [math.nan, -math.inf], ids=["nan", "-inf"])
@pytest.mark.parametrize("make", [hmc, adjusted_mclmc])
def test_broken_densities_are_counted_and_survived(make: Any, nothing: float) -> None:
    kernel = make(cliff(nothing), 0.3, 6, torch.ones(2, dtype=F64))
    result = collected(kernel, torch.zeros(20, 2, dtype=F64), 600, generator(6))
    assert (result.theta[..., 0] <= 1).all()
    assert result.log_joint.isfinite().all()
    assert result.stats["diverging"].sum() > 100
    assert (result.stats["acceptance_rate"][result.stats["diverging"]] == 0).all()
    assert result.stats["energy"].isfinite().all()
    law = stats.truncnorm(-math.inf, 1)
    mean, variance = (
        torch.tensor([law.mean(), 0.0], dtype=F64),
        torch.tensor([law.var(), 1.0], dtype=F64),
    )
    check_moments(result.theta[:, 100:], mean, variance.diag())


# ---------------------------------------- turning


def directions(
    n: int, dim: int, seed: int = 0, dtype: torch.dtype = F64
) -> tuple[Tensor, Tensor]:
    """Return unit vectors, and gradients of very different lengths."""
    g = generator(seed)
    lengths = torch.logspace(-3, 2, n, dtype=F64)[:, None]
    grad = lengths * torch.randn(n, dim, generator=g, dtype=F64)
    return random_directions(torch.empty(n, dim, dtype=F64), g).to(dtype), grad.to(dtype)


dims = pytest.mark.parametrize("dim", [2, 3, 11])


@dims
def test_turning_solves_its_equation(dim: int) -> None:
    """Against an integration of du/dt and of the kinetic energy's dK/dt = u .

    Grad to twelve digits.
    """
    u, grad = directions(6, dim)

    def rate(t: float, y: np.ndarray, g: np.ndarray) -> np.ndarray:
        u = y[:-1]
        return np.append((g - u * (u @ g)) / (dim - 1), u @ g)

    turned, change = momentum_update(u, grad, 0.7)
    for i in range(len(u)):
        g = grad[i].numpy()
        exact = solve_ivp(
            rate,
            (0, 0.7),
            np.append(u[i], 0.0),
            args=(g,),
            method="LSODA",
            rtol=1e-11,
            atol=1e-12,
        )
        torch.testing.assert_close(
            turned[i], torch.from_numpy(exact.y[:-1, -1]), rtol=0, atol=1e-8
        )
        assert float(change[i]) == pytest.approx(exact.y[-1, -1], rel=1e-7, abs=1e-8)


@dims
def test_kinetic_energy_is_what_the_volume_loses(dim: int) -> None:
    """The map's Jacobian from one tangent space of the sphere to the other."""
    u, grad = directions(6, dim, seed=1)
    grad = (
        grad
        / grad.norm(dim=-1, keepdim=True)
        * torch.linspace(0.1, 6, 6, dtype=F64)[:, None]
    )
    turned, change = momentum_update(u, grad, 0.9)

    def tangent(direction: Tensor) -> Tensor:
        return torch.linalg.qr(
            torch.cat([direction[:, None], torch.eye(dim, dtype=F64)], 1)
        )[0][:, 1:dim]

    for i in range(len(u)):
        start, end = tangent(u[i]), tangent(turned[i])
        small = 1e-6 * start.T  # (dim - 1, dim)
        ahead, behind = (
            momentum_update(
                v / v.norm(dim=-1, keepdim=True), grad[i].expand(dim - 1, -1), 0.9
            )[0]
            for v in (u[i] + small, u[i] - small)
        )
        jacobian = (ahead - behind) / 2e-6 @ end
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(
            -float(change[i]), abs=1e-5
        )


@dims
def test_turns_compose(dim: int) -> None:
    u, grad = directions(50, dim, seed=2)
    whole, change = momentum_update(u, grad, 0.5)
    half, first = momentum_update(u, grad, 0.3)
    both, second = momentum_update(half, grad, 0.2)
    torch.testing.assert_close(both, whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(first + second, change, rtol=1e-10, atol=1e-10)
    # A reversed direction, turned towards the same gradient, goes back the way that it came.
    moderate = grad.norm(dim=-1) / (dim - 1) < 10
    back, lost = momentum_update(-whole[moderate], grad[moderate], 0.5)
    torch.testing.assert_close(back, -u[moderate], rtol=0, atol=1e-6)
    torch.testing.assert_close(lost, -change[moderate], rtol=1e-6, atol=1e-6)


@dims
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
def test_directions_stay_unit_vectors(dim: int, dtype: torch.dtype) -> None:
    u, grad = directions(50, dim, dtype=dtype)
    for _ in range(300):
        u, _ = momentum_update(u, grad, 0.1)
        grad = grad.roll(1, 0)
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    assert (u.norm(dim=-1) - 1).abs().max() < bound


@pytest.mark.parametrize("length", [0.0, 1e-40, 1e-20, 1e3, 1e8, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("way", [1.0, -1.0, 0.0], ids=["along", "against", "across"])
def test_extreme_gradients_turn_to_no_nan(
    way: float, length: float, dtype: torch.dtype
) -> None:
    dim, step = 5, 0.4
    u = torch.eye(dim, dtype=dtype)[:2]
    other = torch.eye(dim, dtype=dtype)[2:4]
    grad = length * (way * u if way else other)
    turned, change = momentum_update(u, grad, step)
    assert turned.isfinite().all()
    assert change.isfinite().all()
    torch.testing.assert_close(
        turned.norm(dim=-1), torch.ones(2, dtype=dtype), rtol=0, atol=1e-5
    )
    if way:  # already there, or on the point from which no way is shorter
        torch.testing.assert_close(turned, u, rtol=0, atol=1e-5)
    if way > 0:
        torch.testing.assert_close(
            change, torch.full((2,), step * length, dtype=F64), rtol=1e-5, atol=1e-6
        )
    if way < 0 and length <= 1e3:
        torch.testing.assert_close(
            change, torch.full((2,), -step * length, dtype=F64), rtol=1e-5, atol=1e-6
        )
    if way == 0.0 and length >= 1e18:
        torch.testing.assert_close(turned, other, rtol=0, atol=3e-5)


# ---------------------------------------- unadjusted chains


def test_energy_errors_fall_with_the_sixth_power_of_the_step() -> None:
    problem, model = conjugate(), tiny_network()
    exact = problem.posterior.sample(2000, 0)
    network = bf.sample(
        model, bf.HMC(), chains=200, warmup=200, draws=10, seed=0
    ).theta.flatten(0, 1)
    for target, theta, step_size in (
        (problem.model.log_joint_and_grad, exact, 0.04),
        (model.log_joint_and_grad, network, 0.06),
    ):
        variances = []
        for factor in (1.0, 0.5, 0.25):
            kernel = mclmc(
                target, factor * step_size, 1.0, torch.ones(theta.shape[1], dtype=F64)
            )
            g = generator(1)
            variances.append(
                float(kernel.step(kernel.init(theta, g), g)[1].energy_variance.mean())
            )
        assert variances[0] < 0.1
        ratios = [a / b for a, b in pairwise(variances)]
        assert all(40 < ratio < 110 for ratio in ratios), ratios  # 2^6 = 64


@pytest.mark.parametrize("part", [0.1, 0.5, 2.0])
def test_directions_are_forgotten_over_their_length(part: float) -> None:
    def flat(theta: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(theta), dtype=F64), torch.zeros_like(theta)

    kernel = mclmc(flat, part * 3.0, 3.0, torch.ones(300, dtype=F64))
    g = generator()
    state = kernel.init(torch.zeros(2000, 300, dtype=F64), g)
    after, _ = kernel.step(state, g)
    assert float((state.direction * after.direction).sum(-1).mean()) == pytest.approx(
        math.exp(-part), abs=0.01
    )
    # straight on where nothing pulls
    torch.testing.assert_close(after.theta, part * 3.0 * state.direction)


@pytest.mark.parametrize("nothing", [math.nan, -math.inf], ids=["nan", "-inf"])
def test_steps_into_nowhere_are_undone(nothing: float) -> None:
    kernel, g = mclmc(cliff(nothing), 0.5, 2.0, torch.ones(3, dtype=F64)), generator()
    state, met = kernel.init(torch.zeros(50, 3, dtype=F64), g), 0
    for _ in range(300):
        before = state
        state, info = kernel.step(state, g)
        lost = info.diverging
        met += int(lost.sum())
        for name in ("theta", "log_joint", "grad"):
            assert torch.equal(getattr(state, name)[lost], getattr(before, name)[lost])
            assert getattr(state, name).isfinite().all()
        assert (state.theta[:, 0] <= 1).all()
        assert (
            not torch.equal(state.direction[lost], before.direction[lost]) or not lost.any()
        )
        torch.testing.assert_close(state.direction.norm(dim=-1), torch.ones(50, dtype=F64))
        assert info.energy_variance.isfinite().all()
        assert (info.n_steps == 2).all()
    assert met > 100


def test_lost_steps_are_counted_in_the_draws() -> None:
    model = tiny_network()
    whole = model.log_joint_and_grad

    def fenced(theta: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = whole(theta)
        beyond = theta[:, 0].abs() > 0.7
        return torch.where(beyond, math.nan, value), torch.where(
            beyond[:, None], math.nan, grad
        )

    model.log_joint_and_grad = fenced  # type: ignore[method-assign]
    draws = bf.sample(
        model,
        bf.MCLMC(thinning=3),
        chains=8,
        warmup=60,
        draws=60,
        seed=0,
        init=torch.zeros(10),
    )
    assert draws.info["divergences"] == int(draws.stats["diverging"].sum()) > 0
    assert draws.theta.isfinite().all()
    assert (draws.theta[..., 0].abs() <= 0.7).all()
    assert draws.info["exact"] is False


@pytest.mark.parametrize(
    "method", [bf.MCLMC(), bf.AdjustedMCLMC()], ids=["MCLMC", "AdjustedMCLMC"]
)
def test_a_line_has_no_directions(method: Any) -> None:
    x = torch.tensor([[1.0], [2.0]])
    line = built(lambda: torch.nn.Linear(1, 1, bias=False))
    model = bf.BayesianModel(line, priors.Normal(), likelihoods.Gaussian(0.3), x, x)
    with pytest.raises(ValueError, match="at least two dimensions"):
        bf.sample(model, method, chains=2, warmup=1, draws=1)


# ---------------------------------------- calibration


def simulated_ranks(
    method: Any, sizes: dict[str, int], replicates: int, seed: int = 5
) -> Tensor:
    """Rank true functions and likelihoods among posterior draws, ``(replicates, quantities)`` in
    (0, 1).
    """
    g, ranks = generator(seed), []
    template = tiny_network()
    sites = torch.tensor([[-2.0], [0.1], [2.5]], dtype=F64)
    start = {} if isinstance(method, bf.SMC) else {"init": "prior"}
    for replicate in range(replicates):
        truth = template.sample_prior(1, g)
        y = template.outputs(truth)[0] + 0.3 * torch.randn(6, 1, generator=g, dtype=F64)
        model = bf.BayesianModel(
            template.net, priors.Normal(), likelihoods.Gaussian(0.3), template.x, y
        )
        found = bf.sample(model, method, seed=replicate, **start, **sizes)
        if found.log_weights is None:
            theta = found.theta[:, ::5].flatten(0, 1)
        else:
            theta = found.flat[
                torch.multinomial(found.log_weights.exp().flatten(), 50, True, generator=g)
            ]

        def quantities(theta: Tensor, model: bf.BayesianModel = model) -> Tensor:
            values = [
                model.outputs(theta, sites).squeeze(-1),
                model.log_likelihood(theta)[:, None],
            ]
            return torch.cat([*values, theta.square().sum(-1, keepdim=True)], -1)

        below = (quantities(theta) < quantities(truth)).double().sum(0)
        jitter = torch.rand(below.shape, generator=g, dtype=F64)
        ranks.append((below + jitter) / (len(theta) + 1))
    return torch.stack(ranks)


def uniform(ranks: Tensor) -> float:
    """Return the smallest p-value of the hypothesis that every quantity's ranks are uniform."""
    return min(stats.kstest(column.numpy(), "uniform").pvalue for column in ranks.T)


@every_engine
def test_simulation_based_calibration_in_small(engine: Engine) -> None:
    assert uniform(simulated_ranks(engine.method, engine.small, replicates=10)) > 1e-3


@pytest.mark.validate
@every_engine
def test_simulation_based_calibration(engine: Engine) -> None:
    assert uniform(simulated_ranks(engine.method, engine.large, replicates=150)) > 1e-3


@pytest.mark.validate
def test_calibration_has_power() -> None:
    """Hot chains are too wide, and ranks say so."""

    class Hot(Method):
        def draw(self, model: bf.BayesianModel, run: Any) -> bf.Draws:
            hot = bf.BayesianModel(
                model.net,
                priors.Normal(),
                model.likelihood,
                model.x,
                model.y,
                temperature=2.0,
            )
            return bf.HMC().draw(hot, run)

    assert uniform(simulated_ranks(Hot(), LARGE, replicates=150)) < 1e-3
