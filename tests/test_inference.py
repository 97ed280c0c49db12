"""Laws of the samplers: closed forms gated by the chain's own effective sample size, calibration, and survival."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import arviz
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.inference.adjusted_mclmc import adjusted_mclmc
from bnnflow.inference.hmc import hmc, leapfrog
from bnnflow.inference.loop import warm_up
from bnnflow.inference.mclmc import mclmc

from bnnflow.inference.start import maximise
from bnnflow.inference.trajectories import ChainState, TrajectoryInfo, trajectory_warm_up
from bnnflow.inference.warmup import DualAveraging
from bnnflow.types import Kernel, LogDensityAndGrad

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module], dtype: torch.dtype = F64) -> nn.Module:
    """Build a network from a seed, without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().to(dtype)


class Conjugate(NamedTuple):
    """Bayesian linear regression with fixed noise, and its posterior."""

    model: bf.BayesianModel
    mean: Tensor
    covariance: Tensor
    log_evidence: float


def conjugate(hard: bool = False, dtype: torch.dtype = F64, temperature: float = 1.0) -> Conjugate:
    """Return the problem; ``hard`` has strongly correlated weights on scales a factor of a hundred apart."""
    g, noise, scale = generator(1), 0.5, 1.5
    x = torch.randn(25, 3, generator=g, dtype=F64)
    if hard:
        x = torch.stack([x[:, 0], x[:, 0] + 0.3 * x[:, 1], 30 * x[:, 2]], 1)
    y = x @ torch.tensor([1.0, -0.5, 0.02], dtype=F64) + 0.3 + noise * torch.randn(25, generator=g, dtype=F64)
    net = built(lambda: nn.Linear(3, 1), dtype)
    model = bf.BayesianModel(net, priors.Normal(scale), likelihoods.Gaussian(noise), x, y, temperature=temperature)
    design = torch.cat([x, torch.ones(25, 1, dtype=F64)], 1)
    covariance = torch.linalg.inv(design.T @ design / noise**2 + torch.eye(4, dtype=F64) / scale**2)
    marginal = noise**2 * torch.eye(25, dtype=F64) + scale**2 * design @ design.T
    evidence = torch.distributions.MultivariateNormal(torch.zeros(25, dtype=F64), marginal).log_prob(y)
    return Conjugate(model, covariance @ design.T @ y / noise**2, temperature * covariance, float(evidence))


def tiny_network(n: int = 6, dtype: torch.dtype = F64, seed: int = 2) -> bf.BayesianModel:
    x = torch.linspace(-1.5, 1.5, n, dtype=F64).unsqueeze(-1)
    y = (2 * x).sin() + 0.2 * torch.randn(n, 1, generator=generator(seed), dtype=F64)
    net = built(lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)), dtype)
    return bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), x, y)


def check_moments(theta: Tensor, mean: Tensor, covariance: Tensor, *, least_ess: float = 200, k: float = 4.5) -> None:
    """Compare ``(chain, draw, dim)`` draws with a law, each moment within ``k`` of its own Monte-Carlo errors."""
    offset = theta.double() - mean
    rows, columns = torch.triu_indices(len(mean), len(mean))
    series = torch.cat([offset, offset[..., rows] * offset[..., columns] - covariance[rows, columns]], -1).numpy()
    ess = np.array([arviz.ess(series[..., i], method="mean") for i in range(series.shape[-1])])
    assert ess.min() > least_ess, f"effective sample size of only {ess.min():.0f}"
    errors = np.abs(series.mean((0, 1))) / (series.std((0, 1)) / np.sqrt(ess))
    assert errors.max() < k, f"a moment is off by {errors.max():.1f} Monte-Carlo errors"


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("hard", [False, True], ids=["mild", "correlated and badly scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["f32", "f64"])
def test_hmc_finds_the_conjugate_posterior(hard: bool, dtype: torch.dtype) -> None:
    problem = conjugate(hard, dtype)
    draws = bf.sample(problem.model, bf.HMC(), chains=8, warmup=300, draws=400, seed=0)
    assert draws.theta.shape == (8, 400, 4)
    assert draws.theta.dtype == dtype
    check_moments(draws.theta, problem.mean, problem.covariance)
    assert draws.info["divergences"] == 0
    assert 0.6 < draws.stats["acceptance_rate"].mean() < 0.98


def test_hmc_at_a_temperature() -> None:
    problem = conjugate(temperature=0.3)
    draws = bf.sample(problem.model, chains=8, warmup=200, draws=300, seed=1)
    check_moments(draws.theta, problem.mean, problem.covariance)


@pytest.mark.parametrize("options", [{"step_jitter": 0.0, "trajectory_jitter": 1.0}, {}], ids=["plain", "jittered"])
@pytest.mark.parametrize("step_size", [0.4, 0.9])
def test_kernel_leaves_the_posterior_invariant(step_size: float, options: dict[str, float]) -> None:
    problem = conjugate()
    kernel = hmc(problem.model.log_joint_and_grad, step_size, 3, problem.covariance.diagonal(), **options)
    check_moments(_run(kernel, problem, draws=400), problem.mean, problem.covariance)


def _run(kernel: Kernel, problem: Conjugate, draws: int) -> Tensor:
    """Start in equilibrium, so that only invariance is tested."""
    g = generator(3)
    exact = bf.Gaussian(problem.mean, torch.linalg.cholesky(problem.covariance))
    return collected(kernel, exact.sample(20, g), draws, g).theta


def collected(kernel: Kernel, theta: Tensor, draws: int, g: torch.Generator) -> bf.Draws:
    """Step a kernel and keep every state."""
    state, states, infos = kernel.init(theta, g), [], []
    for _ in range(draws):
        state, info = kernel.step(state, g)
        states.append(state)
        infos.append(info)
    values = {name: torch.stack([getattr(i, name) for i in infos], 1) for name in infos[0]._fields}
    return bf.Draws(torch.stack([s.theta for s in states], 1), torch.stack([s.log_joint for s in states], 1), values)


def small_hmc(
    target: LogDensityAndGrad, step_size: float, scale: Tensor, *, noise: float = 1.0, sign: float = 1.0, accepts=True
) -> Kernel:
    """Return a two-step Hamiltonian kernel that can be broken in three ways."""

    def init(theta: Tensor, generator: torch.Generator) -> ChainState:
        return ChainState(theta, *target(theta))

    def step(state: ChainState, generator: torch.Generator) -> tuple[ChainState, TrajectoryInfo]:
        theta, value, grad = state
        start = p = noise * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        for _ in range(2):
            p = p + 0.5 * step_size * scale * grad
            theta = theta + step_size * scale * p
            value, grad = target(theta)
            p = p + 0.5 * step_size * scale * grad
        gain = value - state.log_joint - 0.5 * (p.square() - start.square()).sum(-1)
        accept = torch.rand(len(theta), generator=generator).log() < sign * gain
        accept = accept | (not accepts)
        moved = ChainState(*(torch.where(accept.reshape(-1, *[1] * (a.dim() - 1)), a, b) for a, b in
                           zip((theta, value, grad), state, strict=True)))  # fmt: skip
        counts = torch.full_like(accept, 2, dtype=torch.long)
        return moved, TrajectoryInfo(accept.double(), ~accept, -value, counts, torch.full_like(value, step_size))

    return Kernel(init, step)


BROKEN = {"noise": {"noise": 1.3}, "energy": {"sign": -1.0}, "acceptance": {"accepts": False}}


@pytest.mark.parametrize("fault", [None, *BROKEN])
def test_the_closed_form_test_has_power(fault: str | None) -> None:
    problem = conjugate()
    scale = problem.covariance.diagonal().sqrt()
    kernel = small_hmc(problem.model.log_joint_and_grad, 0.8, scale, **BROKEN.get(fault, {}))
    theta = _run(kernel, problem, draws=400)
    if fault is None:
        check_moments(theta, problem.mean, problem.covariance)
    else:
        with pytest.raises(AssertionError, match="Monte-Carlo errors"):
            check_moments(theta, problem.mean, problem.covariance, least_ess=0)


# ---------------------------------------------------------------- calibration


def joint_pvalues(
    make_kernel: Callable[[LogDensityAndGrad, Tensor], Kernel], n: int = 10_000, steps: int = 15
) -> list[float]:
    """Test a kernel by the law that weights from the prior, moved given data drawn from them, stay the prior's.

    Every chain has data of its own (Geweke 2004; Talts et al. 2018 in one batch). Returns Kolmogorov-Smirnov
    p-values of each weight, and of how the log likelihood at the moved weights compares with that of the first ones.
    """
    model, g = tiny_network(), generator(4)
    start = model.sample_prior(n, g)
    outputs = model.outputs(start)  # (n, rows, 1)
    y = outputs + 0.3 * torch.randn(outputs.shape, generator=g, dtype=F64)

    def log_joint_and_grad(theta: Tensor) -> tuple[Tensor, Tensor]:
        outputs, pullback = model.network.pullback(theta, model.x)
        value = model.likelihood.log_prob(outputs, y, {}).sum(-1)
        prior, prior_grad = model.flat_prior.log_prob_and_grad(theta)
        return value + prior, pullback(model.likelihood.score(outputs, y, {})[0]) + prior_grad

    kernel = make_kernel(log_joint_and_grad, torch.ones(model.dim, dtype=F64))
    state = kernel.init(start, g)
    for _ in range(steps):
        state, info = kernel.step(state, g)
    assert info.acceptance_rate.mean() > 0.1, "the chains have to move"
    moved = [stats.kstest(column.numpy(), "norm").pvalue for column in state.theta.T]
    before, after = (log_joint_and_grad(theta)[0].numpy() for theta in (start, state.theta))
    return [*moved, stats.ks_2samp(before, after).pvalue]


def test_hmc_keeps_the_joint_law() -> None:
    pvalues = joint_pvalues(lambda target, ones: hmc(target, 0.1, 8, 0.5 * ones))
    assert min(pvalues) > 1e-4


@pytest.mark.parametrize("fault", [None, *BROKEN])
def test_the_joint_law_test_has_power(fault: str | None) -> None:
    options = BROKEN.get(fault, {})
    pvalues = joint_pvalues(lambda target, ones: small_hmc(target, 0.12, ones, **options), steps=60)
    assert (min(pvalues) > 1e-4) == (fault is None)


def simulated_ranks(replicates: int, draws: int, warmup: int) -> Tensor:
    """Rank true functions and likelihoods among posterior draws, ``(replicates, quantities)`` in (0, 1)."""
    g, ranks = generator(5), []
    template = tiny_network()
    sites = torch.tensor([[-2.0], [0.1], [2.5]], dtype=F64)
    for replicate in range(replicates):
        truth = template.sample_prior(1, g)
        y = template.outputs(truth)[0] + 0.3 * torch.randn(6, 1, generator=g, dtype=F64)
        model = bf.BayesianModel(template.net, priors.Normal(), likelihoods.Gaussian(0.3), template.x, y)
        found = bf.sample(model, bf.HMC(), chains=4, warmup=warmup, draws=draws, seed=replicate, init="prior")

        def quantities(theta: Tensor, model: bf.BayesianModel = model) -> Tensor:
            values = [model.outputs(theta, sites).squeeze(-1), model.log_likelihood(theta)[:, None]]
            return torch.cat([*values, theta.square().sum(-1, keepdim=True)], -1)

        thinned = found.theta[:, ::5].flatten(0, 1)
        below = (quantities(thinned) < quantities(truth)).double().sum(0)
        jitter = torch.rand(below.shape, generator=g, dtype=F64)
        ranks.append((below + jitter) / (len(thinned) + 1))
    return torch.stack(ranks)


def test_simulation_based_calibration_in_small() -> None:
    ranks = simulated_ranks(replicates=12, draws=60, warmup=80)
    assert min(stats.kstest(column.numpy(), "uniform").pvalue for column in ranks.T) > 1e-3


@pytest.mark.validate
def test_simulation_based_calibration() -> None:
    ranks = simulated_ranks(replicates=150, draws=200, warmup=150)
    assert min(stats.kstest(column.numpy(), "uniform").pvalue for column in ranks.T) > 1e-3


# ---------------------------------------------------------------- survival


def cliff(nothing: float) -> LogDensityAndGrad:
    """Return the standard normal whose first coordinate must stay below 1: beyond, the density is ``nothing``."""

    def log_joint_and_grad(theta: Tensor) -> tuple[Tensor, Tensor]:
        beyond = theta[:, 0] > 1
        return torch.where(beyond, nothing, -0.5 * theta.square().sum(-1)), torch.where(
            beyond[:, None], nothing, -theta
        )

    return log_joint_and_grad


@pytest.mark.parametrize("nothing", [math.nan, -math.inf], ids=["nan", "-inf"])
def test_broken_densities_are_counted_and_survived(nothing: float) -> None:
    g = generator(6)
    kernel = hmc(cliff(nothing), 0.3, 6, torch.ones(2, dtype=F64))
    result = collected(kernel, torch.zeros(20, 2, dtype=F64), 600, g)
    assert (result.theta[..., 0] <= 1).all()
    assert result.log_joint.isfinite().all()
    assert result.stats["diverging"].sum() > 100
    assert (result.stats["acceptance_rate"][result.stats["diverging"]] == 0).all()
    assert result.stats["energy"].isfinite().all()
    law = stats.truncnorm(-math.inf, 1)
    mean, variance = torch.tensor([law.mean(), 0.0], dtype=F64), torch.tensor([law.var(), 1.0], dtype=F64)
    check_moments(result.theta[:, 100:], mean, variance.diag())


def test_nan_acceptance_shrinks_the_step() -> None:
    adapt, rejected = DualAveraging.start(0.1), DualAveraging.start(0.1)
    for _ in range(20):
        before = adapt.step_size
        adapt, rejected = adapt.update(math.nan, 0.8), rejected.update(0.0, 0.8)
        assert adapt.step_size < max(before, 1.0)
    assert adapt.averaged == rejected.averaged
    assert adapt.step_size < 1e-3


@pytest.mark.parametrize("acceptance", [0.0, 1.0, math.nan])
def test_step_sizes_never_overflow(acceptance: float) -> None:
    adapt = DualAveraging.start(0.1)
    for _ in range(60_000):
        adapt = adapt.update(acceptance, 0.8)
    assert 0 < adapt.step_size < math.inf
    assert 0 < adapt.averaged < math.inf


TUNING = {"target_acceptance": 0.8, "trajectory_length": None, "max_leapfrog": 64, "step_size": 0.1}


@pytest.mark.parametrize("n", [0, 1, 5, 30, 3000])
def test_warm_up_survives_a_density_that_is_never_finite(n: int) -> None:
    def nowhere(theta: Tensor) -> tuple[Tensor, Tensor]:
        at_start = (theta == 0).all(-1)
        return torch.where(at_start, 0.0, math.nan).double(), torch.zeros_like(theta)

    start = torch.zeros(2, 3, dtype=F64)
    process = trajectory_warm_up(nowhere, leapfrog(nowhere), n, **(TUNING | {"max_leapfrog": 2}))
    tuned = warm_up(process, start, n, generator())
    assert torch.equal(tuned.state.theta, start)
    assert 0 < tuned.found["step_size"] < math.inf
    assert tuned.found["trajectory_length"] == 1.0  # nothing was learned


def test_mass_matrix_is_the_posteriors_variances() -> None:
    problem = conjugate(hard=True)
    target, g = problem.model.log_joint_and_grad, generator()
    process = trajectory_warm_up(target, leapfrog(target), 600, **TUNING)
    tuning = process.init(problem.mean.expand(8, -1), g)
    for _ in range(600):
        tuning, _ = process.step(tuning, g)
    ratio = tuning.inverse_mass_matrix / problem.covariance.diagonal()
    assert ((ratio > 0.4) & (ratio < 2.5)).all()
    assert ((ratio.mean(0) > 0.7) & (ratio.mean(0) < 1.4)).all()


class Counted:
    """A model's ``log_joint_and_grad`` that counts its calls and interrupts one of them."""

    def __init__(self, model: bf.BayesianModel, interrupt_at: float = math.inf) -> None:
        self.calls, self._at, self._function = 0, interrupt_at, model.log_joint_and_grad
        model.log_joint_and_grad = self  # type: ignore[method-assign, assignment]

    def __call__(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.calls == self._at:
            raise KeyboardInterrupt
        return self._function(theta)


def test_an_interrupt_returns_the_draws_so_far() -> None:
    options = {"chains": 3, "warmup": 40, "draws": 60, "seed": 0}
    model = tiny_network()
    whole = Counted(model)
    complete = bf.sample(model, bf.HMC(), **options)
    model = tiny_network()
    Counted(model, interrupt_at=whole.calls - 30)
    with pytest.warns(UserWarning, match=r"interrupted: returning the \d+ of 60 draws"):
        draws = bf.sample(model, bf.HMC(), **options)
    assert draws.info["interrupted"]
    assert not complete.info["interrupted"]
    assert 0 < draws.draws < 60
    assert torch.equal(draws.theta, complete.theta[:, : draws.draws])
    for name, values in draws.stats.items():
        assert torch.equal(values, complete.stats[name][:, : draws.draws])


@pytest.mark.parametrize("at", [1, 310], ids=["start", "warm-up"])
def test_an_interrupt_before_the_first_draw_goes_on(at: int) -> None:
    model = tiny_network()
    Counted(model, interrupt_at=at)
    with pytest.raises(KeyboardInterrupt):
        bf.sample(model, bf.HMC(), chains=2, warmup=20, draws=5, seed=0)


@pytest.mark.parametrize("init", [None, "prior"])
def test_gradients_are_counted(init: str | None) -> None:
    model = tiny_network()
    counted = Counted(model)
    draws = bf.sample(model, bf.HMC(), chains=2, warmup=30, draws=20, seed=0, init=init)
    assert draws.info["gradients_per_chain"] == counted.calls


# ---------------------------------------------------------------- the one door


@pytest.mark.parametrize("method", [bf.HMC(), bf.VI(steps=20), bf.DeepEnsemble(3, 20)], ids=repr)
def test_draws_depend_on_the_seed_alone(method) -> None:
    def theta(seed: int | torch.Generator) -> Tensor:
        return bf.sample(tiny_network(), method, seed=seed, **_short(method)).theta

    first = theta(3)
    assert torch.equal(first, theta(3))
    assert torch.equal(first, theta(generator(3)))
    assert torch.equal(first, theta(np.int64(3)))
    assert not torch.equal(first, theta(4))


@pytest.mark.parametrize("method", [bf.HMC(), bf.VI(steps=20), bf.DeepEnsemble(3, 20)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_every_method_runs_in_either_precision(method, dtype: torch.dtype) -> None:
    other = F64 if dtype == torch.float32 else torch.float32
    draws = bf.sample(
        replaced_scale(tiny_network(dtype=other)), method, seed=0, dtype=dtype, device="cpu", **_short(method)
    )
    assert draws.theta.dtype == dtype
    assert draws.log_joint.dtype == F64
    assert draws.log_joint.shape == draws.theta.shape[:2]
    target = replaced_scale(tiny_network(dtype=other)).to(dtype=dtype)
    torch.testing.assert_close(draws.log_joint, target.log_joint(draws.theta), rtol=1e-4, atol=1e-3)
    assert draws.info["method"] == type(method).__name__
    assert draws.info["settings"] == repr(method)
    assert draws.info["model"] == target.fingerprint()
    assert draws.info["seconds"] > 0


def _short(method) -> dict[str, int]:
    if isinstance(method, bf.DeepEnsemble):
        return {}
    return {"chains": 2, "draws": 5} | ({"warmup": 20} if isinstance(method, bf.HMC) else {})


def replaced_scale(model: bf.BayesianModel) -> bf.BayesianModel:
    """Return the same model with a learned scale."""
    return bf.BayesianModel(model.net, priors.Normal(), likelihoods.Gaussian(), model.x, model.y)


def test_starting_points() -> None:
    model = tiny_network()
    options = {"chains": 3, "warmup": 0, "draws": 1, "seed": 0}
    hold = bf.HMC(step_size=1e-9, max_leapfrog=1)  # hardly moves
    point, each = model.sample_prior(1, 1)[0], model.sample_prior(3, 2)

    def start(init) -> Tensor:
        return bf.sample(model, hold, init=init, **options).theta[:, 0]

    torch.testing.assert_close(start(point), point.expand(3, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(start(each), each, rtol=0, atol=1e-6)
    torch.testing.assert_close(start(each.float()), each, rtol=0, atol=1e-6)
    torch.testing.assert_close(start(model.to_network(point)), point.expand(3, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(start("prior"), model.sample_prior(3, 0), rtol=0, atol=1e-6)
    climbed = start(None)
    assert (model.log_joint(climbed) > model.log_joint(start("prior"))).all()


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (torch.zeros(9), "axis of length 10"),
        (torch.zeros(2, 10), r"init must be \(dim,\) or \(3, dim\), got \(2, 10\)"),
        (torch.zeros(1, 3, 10), "init must be"),
        (torch.full((10,), math.nan), r"log_joint is not finite at the starting point of chains \[0, 1, 2\]"),
        ("posterior", "init must be None, 'prior', a network or a tensor"),
        ("network", r"0\.weight must be"),
    ],
    ids=["dim", "chains", "axes", "nan", "word", "network"],
)
def test_wrong_starting_points_are_refused(init, message: str) -> None:
    init = built(lambda: nn.Linear(1, 1)) if isinstance(init, str) and init == "network" else init
    with pytest.raises(ValueError, match=message):
        bf.sample(tiny_network(), bf.HMC(), chains=3, warmup=1, draws=1, init=init)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (bf.HMC(), {"chains": 0}, "chains must be an integer of at least 1, got 0"),
        (bf.HMC(), {"draws": -1}, "draws must be an integer of at least 1, got -1"),
        (bf.HMC(), {"draws": 2.5}, "draws must be an integer"),
        (bf.HMC(), {"warmup": -1}, "warmup must be an integer of at least 0"),
        (bf.HMC, {}, "must be a method such as HMC"),
        ("hmc", {}, "must be a method such as HMC"),
        (bf.DeepEnsemble(), {"chains": 4}, "DeepEnsemble takes members and steps, not chains"),
        (bf.DeepEnsemble(), {"draws": 4, "warmup": 1}, "not warmup, draws"),
        (bf.VI(), {"warmup": 4}, "VI takes steps, not"),
        (bf.VI(), {"init": "prior"}, "VI takes steps, not"),
    ],
)
def test_numbers_without_sense_are_refused(method, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bf.sample(tiny_network(), method, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (bf.HMC, {"target_acceptance": 1.0}),
        (bf.HMC, {"step_size": 0.0}),
        (bf.HMC, {"max_leapfrog": 0}),
        (bf.VI, {"steps": 0}),
        (bf.VI, {"particles": 0}),
        (bf.DeepEnsemble, {"members": 0}),
        (bf.DeepEnsemble, {"learning_rate": -1.0}),
    ],
)
def test_settings_without_sense_are_refused(method: type, options: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        method(**options)


@pytest.mark.parametrize("seed", [1.5, "0", None, True])
def test_seeds_are_integers_or_generators(seed) -> None:
    with pytest.raises(TypeError, match="seed must be an int"):
        bf.sample(tiny_network(), seed=seed)


# ---------------------------------------------------------------- approximations


def test_vi_finds_the_best_independent_gaussian() -> None:
    problem = conjugate()
    draws = bf.sample(problem.model, bf.VI(steps=1500, particles=16, learning_rate=0.01), chains=2, draws=2000, seed=0)
    precision = torch.linalg.inv(problem.covariance)
    sd = precision.diagonal().rsqrt()
    assert isinstance(draws.posterior, bf.Gaussian)
    torch.testing.assert_close(draws.posterior.loc / sd, problem.mean / sd, rtol=0, atol=0.1)
    torch.testing.assert_close(draws.posterior.scale_tril / sd, torch.ones(4, dtype=F64), rtol=0, atol=0.06)
    check_moments(draws.theta, draws.posterior.loc, draws.posterior.scale_tril.square().diag())
    # log evidence - ELBO = KL(q || p), which is known for Gaussians
    divergence = 0.5 * float(precision.diagonal().log().sum() - torch.linalg.slogdet(precision)[1])
    assert draws.info["elbo"] == pytest.approx(problem.log_evidence - divergence, abs=0.1)


def test_vi_agrees_with_the_log_joint_at_a_temperature() -> None:
    """The guide's coordinates are theta's own, and so is its target, learned scale and temperature included."""
    base = tiny_network()
    x = torch.zeros(6, 1, dtype=F64)  # the weights of inputs do not matter, the scale is all that is learned
    net = built(lambda: nn.Linear(1, 1))
    model = bf.BayesianModel(net, priors.Normal(0.05), likelihoods.Gaussian(), x, 0.7 * base.y, temperature=0.2)
    found = bf.sample(model, bf.VI(steps=800, learning_rate=0.02), draws=500, seed=0).posterior
    theta = found.loc.expand(400, -1).clone()
    theta[:, -1] = torch.linspace(-4, 3, 400, dtype=F64)
    weights = model.log_joint(theta).softmax(0)
    mean = (weights * theta[:, -1]).sum()
    sd = (weights * (theta[:, -1] - mean).square()).sum().sqrt()
    assert abs(float(found.loc[-1] - mean)) < 0.15 * float(sd)
    assert float(found.scale_tril[-1]) == pytest.approx(float(sd), rel=0.15)


def test_ensemble_members_reach_the_mode() -> None:
    problem = conjugate()
    draws = bf.sample(problem.model, bf.DeepEnsemble(members=4, steps=1500), seed=0)
    assert draws.theta.shape == (1, 4, 4)
    torch.testing.assert_close(draws.theta[0], problem.mean.expand(4, -1), rtol=0, atol=1e-3)


def test_ensemble_members_are_modes_of_a_network() -> None:
    model = tiny_network()
    draws = bf.sample(model, bf.DeepEnsemble(members=5, steps=3000), seed=1)
    assert (model.log_joint_and_grad(draws.flat)[1].norm(dim=-1) < 0.05).all()
    assert len(draws.flat[:, 0].unique()) == 5


def test_maximise_keeps_the_best_when_a_density_breaks() -> None:
    model = tiny_network()
    theta = model.sample_prior(4, 0)
    whole = model.log_joint_and_grad

    def breaks(theta: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = whole(theta)
        breaks.calls += 1
        broken = torch.arange(len(theta)) == 2
        return (torch.where(broken, math.nan, value), grad) if breaks.calls > 10 else (value, grad)

    breaks.calls = 0
    model.log_joint_and_grad = breaks  # type: ignore[method-assign]
    found = maximise(model, theta, 50, 0.02, False, "")
    assert found.isfinite().all()
    assert (model.log_joint(found) >= model.log_joint(theta)).all()


# ---------------------------------------------------------------- Gaussians


@pytest.mark.parametrize("dim", [1, 4])
@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_gaussian_is_torchs(dim: int, diagonal: bool) -> None:
    g = generator(dim)
    loc = torch.randn(dim, generator=g, dtype=F64)
    scale_tril = torch.randn(dim, dim, generator=g, dtype=F64).tril(-1) + torch.eye(dim, dtype=F64) * 0.7
    full = scale_tril.diagonal().diag() if diagonal else scale_tril
    gaussian = bf.Gaussian(loc, scale_tril.diagonal() if diagonal else scale_tril)
    oracle = torch.distributions.MultivariateNormal(loc, scale_tril=full)
    theta = torch.randn(3, 5, dim, generator=g, dtype=F64)
    torch.testing.assert_close(gaussian.log_prob(theta), oracle.log_prob(theta))
    check_moments(gaussian.sample(4000, 0).reshape(4, 1000, dim), loc, full @ full.T)
    fitted = bf.Gaussian.fit(gaussian.sample(20_000, 1), shrinkage=0.0)
    torch.testing.assert_close(fitted.loc, loc, rtol=0, atol=0.05)
    torch.testing.assert_close(fitted.scale_tril @ fitted.scale_tril.T, full @ full.T, rtol=0.1, atol=0.1)


def test_draws_check_their_shapes() -> None:
    theta, log_joint = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=F64)
    draws = bf.Draws(theta, log_joint)
    assert (draws.chains, draws.draws, draws.dim) == (2, 3, 4)
    assert draws.flat.shape == (6, 4)
    with pytest.raises(ValueError, match=r"theta must be \(chain, draw, dim\), got \(3, 4\)"):
        bf.Draws(theta[0], log_joint[0])
    with pytest.raises(ValueError, match=r"log_weights must be \(2, 3\), got \(2, 2\)"):
        replace(draws, log_weights=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"energy must be \(2, 3\)"):
        replace(draws, stats={"energy": torch.zeros(6)})
