"""Laws of warm-up, of survival and of the one door, `bnnflow.sample`.

Of the Gaussian approximations too.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.inference.loop import warm_up
from bnnflow.inference.mcmc.adjusted_mclmc import microcanonical
from bnnflow.inference.mcmc.hmc import leapfrog
from bnnflow.inference.mcmc.trajectories import trajectory_warm_up
from bnnflow.inference.mcmc.warmup import DualAveraging
from bnnflow.inference.start import maximise
from tests.problems import F64, built, check_moments, conjugate, generator, tiny_network

# ---------------------------------------- warm-up and survival


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


@pytest.mark.parametrize("trajectory", [leapfrog, microcanonical])
@pytest.mark.parametrize("n", [0, 1, 5, 30, 1500])
def test_warm_up_survives_a_density_that_is_never_finite(n: int, trajectory) -> None:
    def nowhere(theta: Tensor) -> tuple[Tensor, Tensor]:
        at_start = (theta == 0).all(-1)
        return torch.where(at_start, 0.0, math.nan).double(), torch.zeros_like(theta)

    start = torch.zeros(2, 3, dtype=F64)
    process = trajectory_warm_up(nowhere, trajectory(nowhere), n, bf.HMC(max_leapfrog=2))
    tuned = warm_up(process, start, n, generator())
    assert torch.equal(tuned.state.theta, start)
    assert 0 < tuned.found["step_size"] < math.inf
    untouched = warm_up(process, start, 0, generator())
    # nothing was learned
    assert tuned.found["trajectory_length"] == untouched.found["trajectory_length"]


def test_mass_matrix_is_the_posteriors_variances() -> None:
    problem = conjugate(hard=True)
    target, g = problem.model.log_joint_and_grad, generator()
    process = trajectory_warm_up(target, leapfrog(target), 600, bf.HMC(max_leapfrog=64))
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

    def __call__(self, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.calls == self._at:
            raise KeyboardInterrupt
        return self._function(*given)  # type: ignore[arg-type]


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
    assert 0 < draws.n_draws < 60
    assert torch.equal(draws.theta, complete.theta[:, : draws.n_draws])
    for name, values in draws.stats.items():
        assert torch.equal(values, complete.stats[name][:, : draws.n_draws])


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


# ---------------------------------------- the one door

METHODS = [
    bf.HMC(),
    bf.AdjustedMCLMC(max_leapfrog=32),
    bf.MCLMC(thinning=2),
    bf.SMC(particles=20, moves=1),
    bf.VI(steps=20),
    bf.DeepEnsemble(3, 20),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_draws_depend_on_the_seed_alone(method) -> None:
    def theta(seed: int | torch.Generator) -> Tensor:
        return bf.sample(tiny_network(), method, seed=seed, **_short(method)).theta

    first = theta(3)
    assert torch.equal(first, theta(3))
    assert torch.equal(first, theta(generator(3)))
    assert torch.equal(first, theta(np.int64(3)))
    assert not torch.equal(first, theta(4))


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_every_method_runs_in_either_precision(method, dtype: torch.dtype) -> None:
    other = F64 if dtype == torch.float32 else torch.float32
    draws = bf.sample(
        replaced_scale(tiny_network(dtype=other)),
        method,
        seed=0,
        dtype=dtype,
        device="cpu",
        **_short(method),
    )
    assert draws.theta.dtype == dtype
    assert draws.log_joint.dtype == F64
    assert draws.log_joint.shape == draws.theta.shape[:2]
    target = replaced_scale(tiny_network(dtype=other)).to(dtype=dtype)
    torch.testing.assert_close(
        draws.log_joint, target.log_joint(draws.theta), rtol=1e-4, atol=1e-3
    )
    assert draws.info["method"] == type(method).__name__
    assert draws.info["settings"] == repr(method)
    assert draws.info["model"] == target.fingerprint()
    assert draws.info["seconds"] > 0


def _short(method) -> dict[str, int]:
    if isinstance(method, bf.DeepEnsemble):
        return {}
    if isinstance(method, bf.SMC):
        return {"chains": 2}
    return {"chains": 2, "draws": 5} | ({} if isinstance(method, bf.VI) else {"warmup": 20})


def replaced_scale(model: bf.BayesianModel) -> bf.BayesianModel:
    """Return the same model with a learned scale."""
    return bf.BayesianModel(
        model.net, priors.Normal(), likelihoods.Gaussian(), model.x, model.y
    )


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
    torch.testing.assert_close(
        start(model.network_at(point)), point.expand(3, -1), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(start("prior"), model.sample_prior(3, 0), rtol=0, atol=1e-6)
    climbed = start(None)
    assert (model.log_joint(climbed) > model.log_joint(start("prior"))).all()


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (torch.zeros(9), "axis of length 10"),
        (torch.zeros(2, 10), r"init must be \(dim,\) or \(3, dim\), got \(2, 10\)"),
        (torch.zeros(1, 3, 10), "init must be"),
        (
            torch.full((10,), math.nan),
            r"log_joint is not finite at the starting point of chains \[0, 1, 2\]",
        ),
        ("posterior", "init must be None, 'prior', a network, several networks or weights"),
        ("network", r"0\.weight must be"),
    ],
    ids=["dim", "chains", "axes", "nan", "word", "network"],
)
def test_wrong_starting_points_are_refused(init, message: str) -> None:
    init = (
        built(lambda: nn.Linear(1, 1))
        if isinstance(init, str) and init == "network"
        else init
    )
    with pytest.raises(ValueError, match=message):
        bf.sample(tiny_network(), bf.HMC(), chains=3, warmup=1, draws=1, init=init)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (bf.HMC(), {"chains": 0}, "chains must be at least 1, got 0"),
        (bf.HMC(), {"draws": -1}, "draws must be at least 1, got -1"),
        (bf.HMC(), {"draws": 2.5}, "draws must be an integer"),
        (bf.HMC(), {"warmup": -1}, "warmup must be at least 0"),
        (bf.HMC, {}, "method must be a Method, got the class HMC itself"),
        ("hmc", {}, "method must be a Method"),
        (
            bf.DeepEnsemble(),
            {"chains": 4},
            "DeepEnsemble takes members and steps, not chains",
        ),
        (bf.DeepEnsemble(), {"draws": 4, "warmup": 1}, "not warmup, draws"),
        (bf.VI(), {"warmup": 4}, "VI takes steps, not"),
    ],
)
def test_numbers_without_sense_are_refused(method, options: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        bf.sample(tiny_network(), method, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (bf.HMC, {"target_acceptance": 1.0}),
        (bf.HMC, {"step_size": 0.0}),
        (bf.HMC, {"max_leapfrog": 0}),
        (bf.AdjustedMCLMC, {"target_acceptance": 0.0}),
        (bf.AdjustedMCLMC, {"trajectory_length": -1.0}),
        (bf.MCLMC, {"energy_variance": 0.0}),
        (bf.MCLMC, {"thinning": 0}),
        (bf.MCLMC, {"L": -1.0}),
        (bf.PyroNUTS, {"max_tree_depth": 0}),
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


# ---------------------------------------- approximations


def test_vi_finds_the_best_independent_gaussian() -> None:
    problem = conjugate()
    draws = bf.sample(
        problem.model,
        bf.VI(steps=1500, particles=16, learning_rate=0.01),
        chains=2,
        draws=2000,
        seed=0,
    )
    precision = torch.linalg.inv(problem.covariance)
    sd = precision.diagonal().rsqrt()
    assert isinstance(draws.posterior, bf.Gaussian)
    torch.testing.assert_close(
        draws.posterior.loc / sd, problem.mean / sd, rtol=0, atol=0.1
    )
    torch.testing.assert_close(
        draws.posterior.scale_tril / sd, torch.ones(4, dtype=F64), rtol=0, atol=0.06
    )
    check_moments(
        draws.theta, draws.posterior.loc, draws.posterior.scale_tril.square().diag()
    )
    # log evidence - ELBO = KL(q || p), which is known for Gaussians
    divergence = 0.5 * float(
        precision.diagonal().log().sum() - torch.linalg.slogdet(precision)[1]
    )
    assert draws.info["elbo"] == pytest.approx(problem.log_normaliser - divergence, abs=0.1)


def test_vi_agrees_with_the_log_joint_at_a_temperature() -> None:
    """The guide's coordinates are theta's own, and so is its target, learned scale and temperature
    included.
    """
    base = tiny_network()
    # the weights of inputs do not matter, the scale is all that is learned
    x = torch.zeros(6, 1, dtype=F64)
    net = built(lambda: nn.Linear(1, 1))
    model = bf.BayesianModel(
        net, priors.Normal(0.05), likelihoods.Gaussian(), x, 0.7 * base.y, temperature=0.2
    )
    found = bf.sample(
        model, bf.VI(steps=800, learning_rate=0.02), draws=500, seed=0
    ).posterior
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
    torch.testing.assert_close(
        draws.theta[0], problem.mean.expand(4, -1), rtol=0, atol=1e-3
    )


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
        return (
            (torch.where(broken, math.nan, value), grad)
            if breaks.calls > 10
            else (value, grad)
        )

    breaks.calls = 0
    model.log_joint_and_grad = breaks  # type: ignore[method-assign]
    found = maximise(model, theta, 50, 0.02, False, "")
    assert found.isfinite().all()
    assert (model.log_joint(found) >= model.log_joint(theta)).all()


# ---------------------------------------- Gaussians


@pytest.mark.parametrize("dim", [1, 4])
@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_gaussian_is_torchs(dim: int, diagonal: bool) -> None:
    g = generator(dim)
    loc = torch.randn(dim, generator=g, dtype=F64)
    scale_tril = (
        torch.randn(dim, dim, generator=g, dtype=F64).tril(-1)
        + torch.eye(dim, dtype=F64) * 0.7
    )
    full = scale_tril.diagonal().diag() if diagonal else scale_tril
    gaussian = bf.Gaussian(loc, scale_tril.diagonal() if diagonal else scale_tril)
    oracle = torch.distributions.MultivariateNormal(loc, scale_tril=full)
    theta = torch.randn(3, 5, dim, generator=g, dtype=F64)
    torch.testing.assert_close(gaussian.log_prob(theta), oracle.log_prob(theta))
    check_moments(gaussian.sample(4000, 0).reshape(4, 1000, dim), loc, full @ full.T)
    fitted = bf.Gaussian.fit(gaussian.sample(20_000, 1), shrinkage=0.0)
    torch.testing.assert_close(fitted.loc, loc, rtol=0, atol=0.05)
    torch.testing.assert_close(
        fitted.scale_tril @ fitted.scale_tril.T, full @ full.T, rtol=0.1, atol=0.1
    )


def test_draws_check_their_shapes() -> None:
    theta, log_joint = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=F64)
    draws = bf.Draws(theta, log_joint)
    assert (draws.n_chains, draws.n_draws, draws.dim) == (2, 3, 4)
    assert repr(draws) == "Draws(2 x 3 draws of 4 weights)"
    weighted = replace(
        draws,
        log_weights=draws.log_joint,
        log_evidence=(-3.0, 0.25),
        info={"method": "SMC", "seconds": 2.0},
    )
    assert (
        repr(weighted)
        == "Draws(SMC, 2 x 3 draws of 4 weights, weighted, log evidence -3.00 +- 0.25, 2.0 s)"
    )
    assert draws.flat.shape == (6, 4)
    with pytest.raises(
        ValueError, match=r"theta must be \(chain, draw, dim\), got \(3, 4\)"
    ):
        bf.Draws(theta[0], log_joint[0])
    with pytest.raises(ValueError, match=r"log_weights must be \(2, 3\), got \(2, 2\)"):
        replace(draws, log_weights=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"energy must be \(2, 3\)"):
        replace(draws, stats={"energy": torch.zeros(6)})
