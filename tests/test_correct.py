"""Laws of corrections: evidences in closed form, honest errors, kernels that keep the posterior,
verdicts that see.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.draws import as_theta
from bnnflow.importance import khat_limit, kish_ess, log_mean, psis
from bnnflow.transport import Correction, Density, Flow, GaussianVelocity, Solver
from bnnflow.transport import correct as correct_function
from bnnflow.transport.correction.chains import mixed
from bnnflow.transport.correction.importance import (
    HeldOut,
    Student,
    bridge,
    ks_distance,
    rhat_and_ess,
)
from bnnflow.transport.correction.latent import Latent, crank_nicolson, log_normal
from tests.problems import (
    F64,
    Conjugate,
    built,
    check_moments,
    collected,
    conjugate,
    generator,
    one_in,
    two_weights,
)

# the package has the function under this name
MODULE = importlib.import_module("bnnflow.transport.correction.correct")
METHODS = ["importance", "defensive", "resample", "refine", "smc", "metropolis", "neutra"]


class Affine:
    """x0 -> loc + tril (x0 + bend tanh(x0)): a flow whose densities are known."""

    solver = Solver(steps=4)

    def __init__(self, loc: Tensor, tril: Tensor, bend: float = 0.0) -> None:
        self.loc, self.tril, self.bend, self.dim = loc, tril, bend, len(loc)

    def start(self, n: int, seed: int | torch.Generator = 0) -> Tensor:
        g = seed if isinstance(seed, torch.Generator) else generator(seed)
        return torch.randn(n, self.dim, generator=g, dtype=F64)

    def forward(self, x0: Tensor, **options: Any) -> Tensor:
        return self.loc + (x0 + self.bend * x0.tanh()) @ self.tril.T

    def forward_with_log_prob(self, x0: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return self.forward(x0), self.log_q(x0)

    def log_q(self, x0: Tensor) -> Tensor:
        stretch = torch.log1p(self.bend * (1 - x0.tanh() ** 2)).sum(-1)
        return log_normal(x0) - stretch - self.tril.diagonal().log().sum()

    def inverse_with_log_prob(self, theta: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        z = torch.linalg.solve_triangular(self.tril, (theta - self.loc).T, upper=False).T
        x0 = z / (1 + self.bend)
        for _ in range(40 if self.bend else 0):  # Newton's method, with bounded steps
            x0 = x0 - (
                (x0 + self.bend * x0.tanh() - z) / (1 + self.bend * (1 - x0.tanh() ** 2))
            ).clamp(-1, 1)
        return x0, self.log_q(x0)


def near(
    problem: Conjugate, scale: float = 1.2, shift: float = 0.3, bend: float = 0.0
) -> Affine:
    """Return a flow near the posterior, but wrong."""
    root = torch.linalg.cholesky(problem.covariance)
    return Affine(
        problem.mean + 0.5 * shift * root.sum(1), scale * root / (1 + 0.6 * bend), bend
    )


def chains_of(
    problem: Conjugate, chains: int = 8, draws: int = 100, seed: int = 9
) -> Tensor:
    return problem.posterior.sample(chains * draws, generator(seed)).unflatten(
        0, (chains, draws)
    )


def latent_of(flow: Any, model: bf.BayesianModel) -> Latent:
    return Latent(flow, model, Density(), generator())


# ---------------------------------------- every method against the closed form


@pytest.mark.crossed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bend", [0.0, 0.5], ids=["affine", "bent"])
def test_draws_and_evidence_are_the_closed_forms(method: Any, bend: float) -> None:
    problem = conjugate(hard=True)
    flow = near(problem, bend=bend)
    fixed = bf.correct(
        problem.model, flow, 1200, method, seed=1, held_out=chains_of(problem)
    )
    assert isinstance(fixed, Correction)
    assert fixed.method == fixed.info["correction"] == method
    assert fixed.verdict.startswith("trust after correction")
    assert method in fixed.verdict
    assert (fixed.log_weights is None) == (method not in ("importance", "defensive"))
    assert fixed.theta.shape[0] * fixed.theta.shape[1] >= 1200
    torch.testing.assert_close(fixed.log_joint, problem.model.log_joint(fixed.theta))
    theta, weights = as_theta(fixed)
    share = (
        torch.full((len(theta),), 1 / len(theta), dtype=F64)
        if weights is None
        else weights.exp()
    )
    assert float(share.sum()) == pytest.approx(1.0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(problem.covariance), (theta - problem.mean).T, upper=False
    )
    assert fixed.ess > 200
    assert ((share * white).sum(1).abs() < 4.5 / math.sqrt(fixed.ess)).all()
    assert ((share * (white**2 - 1)).sum(1).abs() < 4.5 * math.sqrt(2 / fixed.ess)).all()
    value, error = fixed.log_evidence
    assert 1e-3 < error < 0.1
    assert abs(value - problem.log_normaliser) < 4 * error
    for name, (route, spread) in fixed.info["evidences"].items():
        assert abs(route - problem.log_normaliser) < 4 * spread, name


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.validate)])
@pytest.mark.parametrize("method", one_in(2, METHODS))
def test_the_errors_of_evidences_are_honest(method: Any, many: bool) -> None:
    """Over independent repetitions the error divided by its own estimate has a standard deviation
    near one.
    """
    problem, scores = conjugate(), []
    count = {"refine": 8, "metropolis": 10, "neutra": 8}.get(method, 24)
    for seed in range(count if many else 5 * count // 8):
        fixed = bf.correct(problem.model, near(problem, 1.4), 400, method, seed=seed)
        value, error = fixed.log_evidence
        scores.append((value - problem.log_normaliser) / error)
    z = np.array(scores)
    # closer than 99.8% of the means of 16 squared standard normal numbers
    assert 0.5 < np.sqrt((z**2).mean()) < 1.6
    assert np.abs(z).max() < 4.5


def test_tempering_bridges_what_weights_cannot() -> None:
    """From a flow that is narrow and far away, in several temperatures: evidence and errors are
    right.
    """
    problem, scores, errors = conjugate(), [], []
    for seed in range(16):
        fixed = bf.correct(problem.model, near(problem, 0.8, 4.0), 1000, "smc", seed=seed)
        assert fixed.info["temperatures"] >= 4
        value, error = fixed.log_evidence
        errors.append(value - problem.log_normaliser)
        scores.append(errors[-1] / error)
    assert np.abs(np.mean(errors)) < 4 * np.std(errors) / math.sqrt(16)
    assert np.std(errors) < 0.2
    assert 0.5 < np.sqrt(np.mean(np.square(scores))) < 1.6
    alone = bf.correct(problem.model, near(problem, 0.8, 4.0), 1000, "importance", seed=0)
    assert alone.verdict.startswith("do not trust")


def test_latent_moves_may_be_made_around_any_gaussian() -> None:
    problem = conjugate()
    latent = latent_of(near(problem, bend=0.5), problem.model)
    start = latent.inverse(problem.posterior.sample(30, generator(1))).x0
    around = bf.Gaussian(
        start.mean(0) + 0.2, 1.2 * torch.linalg.cholesky(torch.cov(start.T))
    )
    draws = collected(crank_nicolson(latent, 0.7, around=around), start, 300, generator(2))
    assert 0.3 < draws.stats["acceptance_rate"].mean() < 0.95
    check_moments(draws.theta, problem.mean, problem.covariance)


def test_the_error_of_the_second_route_is_honest() -> None:
    """The bridge to chains whose draws hang together, with the error that their effective number
    gives.
    """
    problem, scores = conjugate(), []
    root = torch.linalg.cholesky(problem.covariance)
    flow = near(problem, 1.4)
    for seed in range(30):
        g, states = generator(100 + seed), []
        state = torch.randn(4, 4, generator=g, dtype=F64)
        for _ in range(150):  # autocorrelated draws of the posterior
            state = 0.9 * state + math.sqrt(1 - 0.81) * torch.randn(
                4, 4, generator=g, dtype=F64
            )
            states.append(problem.mean + state @ root.T)
        held = torch.stack(states, 1)
        fixed = bf.correct(
            problem.model, flow, 2000, "importance", seed=seed, held_out=held
        )
        value, error = fixed.info["evidences"]["bridge"]
        own = fixed.info["evidences"]["importance"]
        assert error < own[1]  # two sides know more than one
        scores.append((value - problem.log_normaliser) / error)
        assert fixed.verdict.startswith("trust after correction")
    assert 0.6 < np.sqrt(np.mean(np.square(scores))) < 1.45
    assert np.abs(scores).max() < 4.5


def test_an_exact_flow_needs_no_correction() -> None:
    problem = conjugate()
    flow = near(problem, 1.0, 0.0)
    fixed = bf.correct(problem.model, flow, 500, seed=0, held_out=chains_of(problem))
    assert fixed.verdict.startswith("trust: ")
    assert fixed.khat == 0
    assert fixed.ess == pytest.approx(500)
    assert fixed.log_evidence[0] == pytest.approx(problem.log_normaliser)
    assert fixed.info["held_out"]["forward_ess"] == pytest.approx(1)
    alone = bf.correct(problem.model, flow, 500, seed=0)
    assert alone.verdict.startswith("trust after correction")
    assert "cannot be excluded" in alone.verdict


def test_a_tempered_posterior_has_no_evidence() -> None:
    problem = conjugate(temperature=2.0)
    fixed = bf.correct(problem.model, near(problem), 800, "importance", seed=0)
    assert fixed.log_evidence is None
    value, error = fixed.info["log_tempered_normaliser"]
    assert abs(value - problem.log_normaliser) < 4 * error


# ---------------------------------------- kernels


@pytest.mark.parametrize(("fresh", "width"), [(0.0, 0.4), (1.0, 0.4), (0.5, 0.7)])
def test_latent_moves_keep_the_posterior(fresh: float, width: float) -> None:
    problem = conjugate()
    latent = latent_of(near(problem, bend=0.5), problem.model)
    start = latent.inverse(problem.posterior.sample(30, generator(1))).x0
    kernel = crank_nicolson(latent, width, independent_share=fresh)
    draws = collected(kernel, start, 400, generator(2))
    rate = draws.stats["acceptance_rate"]
    assert 0.2 < rate.mean() < 0.95
    assert draws.stats["independent"].double().mean() == pytest.approx(fresh, abs=0.02)
    check_moments(draws.theta, problem.mean, problem.covariance)


def test_latent_moves_keep_what_lies_between_flow_and_posterior() -> None:
    problem, power, root = conjugate(), 0.4, torch.linalg.cholesky(conjugate().covariance)
    flow = near(problem)
    latent = latent_of(flow, problem.model)
    # In latent coordinates the posterior is N(m, S), and N(0, I)^(1 - b) N(m, S)^b is Gaussian
    # again.
    inverse = torch.linalg.inv(flow.tril) @ root
    m, precision = (
        torch.linalg.solve(flow.tril, problem.mean - flow.loc),
        torch.linalg.inv(inverse @ inverse.T),
    )
    covariance = torch.linalg.inv((1 - power) * torch.eye(4, dtype=F64) + power * precision)
    mean = covariance @ (power * precision @ m)
    start = bf.Gaussian(mean, torch.linalg.cholesky(covariance)).sample(30, generator(1))
    state, kernel, g, states = (
        None,
        crank_nicolson(latent, 0.5, power=power),
        generator(2),
        [],
    )
    for _ in range(400):
        state = kernel.init(start, g) if state is None else state
        state, _ = kernel.step(state, g)
        states.append(state.x0)
    check_moments(torch.stack(states, 1), mean, covariance)


def test_sweeps_of_latent_and_hamiltonian_moves_keep_the_posterior() -> None:
    problem = conjugate()
    latent = latent_of(near(problem, bend=0.5), problem.model)
    start = latent.inverse(problem.posterior.sample(20, generator(1))).x0
    target = torch.no_grad()(problem.model.log_joint_and_grad)
    kernel = mixed(latent, target, 0.5, 0.3, 0.8, 6, problem.covariance.diagonal())
    draws = collected(kernel, start, 400, generator(2))
    assert 0.3 < draws.stats["hmc_acceptance_rate"].mean() < 0.99
    check_moments(draws.theta, problem.mean, problem.covariance)


def test_sweeps_keep_points_consistent() -> None:
    problem = conjugate()
    flow = near(problem, bend=0.5)
    latent, g = latent_of(flow, problem.model), generator(0)
    target = torch.no_grad()(problem.model.log_joint_and_grad)
    kernel = mixed(latent, target, 0.5, 0.3, 0.8, 6, problem.covariance.diagonal())
    points = kernel.init(flow.start(50, g), g)
    for _ in range(5):
        points, _ = kernel.step(points, g)
    theta, log_q = flow.forward_with_log_prob(points.x0)
    torch.testing.assert_close(points.theta, theta)
    torch.testing.assert_close(points.log_q, log_q)
    torch.testing.assert_close(points.log_joint, problem.model.log_joint(theta))


def test_the_gradient_in_latent_space_is_that_of_the_density() -> None:
    problem = conjugate()
    latent = latent_of(near(problem, bend=0.5), problem.model)
    x0, step = torch.randn(3, 4, generator=generator(), dtype=F64), 1e-5
    value, grad = latent.log_density_and_grad(x0)
    points = latent.forward(x0)
    torch.testing.assert_close(value, points.log_weight + log_normal(x0))
    for i in range(4):
        offset = step * torch.eye(4, dtype=F64)[i]
        ends = [latent.log_density_and_grad(x0 + sign * offset)[0] for sign in (1, -1)]
        torch.testing.assert_close(
            (ends[0] - ends[1]) / (2 * step), grad[:, i], rtol=1e-5, atol=1e-6
        )


# ---------------------------------------- a lost mode


@functools.cache
def two_modes() -> tuple[bf.BayesianModel, Tensor, float]:
    """Return the smallest network, exact draws of its two modes, and its evidence, by
    quadrature.
    """
    model, grid = two_weights(), torch.linspace(-7, 7, 701, dtype=F64)
    width = float(grid[1] - grid[0])
    theta = torch.cartesian_prod(grid, grid)
    log_joint = model.log_joint(theta)
    rows = torch.multinomial(
        log_joint.softmax(0), 4000, replacement=True, generator=generator(1)
    )
    jitter = width * (torch.rand(4000, 2, generator=generator(2), dtype=F64) - 0.5)
    return model, theta[rows] + jitter, float(log_joint.logsumexp(0)) + 2 * math.log(width)


def fitted(theta: Tensor, scale: float = 1.1) -> Affine:
    return Affine(theta.mean(0), scale * torch.linalg.cholesky(torch.cov(theta.T)))


def without_symmetries(model: bf.BayesianModel) -> bf.BayesianModel:
    """Return the model with a prior just uneven enough that symmetric copies no longer tell
    anything.
    """
    uneven = priors.Normal(1.0, 1e-3)
    return bf.BayesianModel(model.net, uneven, model.likelihood, model.x, model.y)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_a_flow_trained_on_one_of_two_modes_is_not_trusted(method: Any) -> None:
    model, exact, log_evidence = two_modes()
    model = without_symmetries(model)
    one, both = fitted(exact[exact[:, 0] > 0]), fitted(exact)
    lost = bf.correct(model, one, 800, method, seed=2, held_out=exact[:1000])
    assert lost.verdict.startswith("do not trust")
    assert "has lost a part of the posterior" in lost.verdict
    # the group that keeps this prior is trivial
    assert lost.info["equivalent_modes_gap"] == pytest.approx(0, abs=1e-9)
    assert lost.info["held_out"]["forward_ess"] < 1e-3
    # The route through held-out draws knows the whole evidence, the flow alone only half of it.
    value, error = lost.info["evidences"]["bridge"]
    assert abs(value - log_evidence) < 4 * error
    if method in ("auto", "importance", "smc"):
        # what the flow's own draws can say is that all is well
        assert lost.khat < khat_limit(800)
        assert (
            abs(lost.log_evidence[0] - (log_evidence - math.log(2)))
            < 4 * lost.log_evidence[1]
        )
        assert "lost about 5" in lost.verdict
    kept = bf.correct(model, both, 800, method, seed=2, held_out=exact[:1000])
    assert "has lost a part of the posterior" not in kept.verdict
    # chains that seldom pass between the modes may be worth too few draws, and then say so
    good = ("trust after correction", *(["trust with care"] if method == "neutra" else []))
    assert kept.verdict.startswith(good)


def test_chains_that_never_change_their_mode_still_show_a_lost_one() -> None:
    model, exact, _ = two_modes()
    model = without_symmetries(model)
    chains = bf.sample(model, bf.HMC(), chains=8, warmup=150, draws=100, seed=0)
    sides = (chains.theta[..., 0] > 0).double().mean(1)
    assert set(sides.tolist()) == {0.0, 1.0}
    for method in ("importance", "refine"):
        lost = bf.correct(
            model, fitted(exact[exact[:, 0] > 0]), 800, method, seed=2, held_out=chains
        )
        assert lost.verdict.startswith("do not trust")
        assert "has lost a part of the posterior" in lost.verdict
    kept = bf.correct(model, fitted(exact), 800, "importance", seed=2, held_out=chains)
    assert kept.verdict.startswith("trust after correction")


def test_held_out_draws_that_have_lost_a_part_are_found_out() -> None:
    problem = conjugate()
    draws = problem.posterior.sample(2000, generator(9))
    half = draws[draws[:, 0] > problem.mean[0]]
    fixed = bf.correct(
        problem.model, near(problem), 2000, "importance", seed=2, held_out=half
    )
    assert fixed.verdict.startswith("do not trust")
    assert "held-out and corrected draws differ in law" in fixed.verdict


def test_symmetric_copies_show_a_lost_mode_without_held_out_draws() -> None:
    model, exact, log_evidence = two_modes()
    one = fitted(exact[exact[:, 0] > 0])
    lost = bf.correct(model, one, 800, seed=2)
    assert lost.verdict.startswith("do not trust")
    assert "symmetric copies" in lost.verdict
    assert lost.info["equivalent_modes_gap"] > 10
    kept = bf.correct(model, fitted(exact), 800, seed=2)
    assert kept.verdict.startswith("trust after correction")
    assert abs(kept.info["equivalent_modes_gap"]) < 0.1
    # Draws aligned to one copy, and held-out draws aligned alike: predictions are right, and the
    # verdict says of what.
    aligned = bf.correct(model, one, 800, seed=2, held_out=exact[exact[:, 0] > 0][:1000])
    assert aligned.verdict.startswith("trust after correction")
    assert "that of the copies that it has" in aligned.verdict
    assert (
        abs(aligned.log_evidence[0] + math.log(2) - log_evidence)
        < 4 * aligned.log_evidence[1]
    )


# ---------------------------------------- choice of the method


def many_weights() -> bf.BayesianModel:
    x = torch.linspace(-1, 1, 12, dtype=F64).unsqueeze(-1)
    net = built(lambda: nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)))
    return bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), x, x.sin())


def test_auto_takes_weights_where_they_work_and_says_so() -> None:
    problem = conjugate()
    fixed = bf.correct(problem.model, near(problem), 600, seed=0)
    assert fixed.method == "importance"
    assert "importance, chosen for a k-hat of" in fixed.verdict
    assert fixed.info["asked"] == "auto"


def test_auto_tempers_where_weights_fail_in_few_dimensions() -> None:
    problem = conjugate()
    fixed = bf.correct(
        problem.model, near(problem, 0.35, 2.0), 600, seed=0, held_out=chains_of(problem)
    )
    assert fixed.khat > 0.7
    assert fixed.method == "smc"
    assert "smc, chosen since k-hat is" in fixed.verdict
    assert not fixed.verdict.startswith("trust: ")
    refused = bf.correct(problem.model, near(problem, 0.35, 2.0), 600, "importance", seed=0)
    assert refused.verdict.startswith("do not trust")
    assert "a few weights decide everything" in refused.verdict


@pytest.mark.parametrize("n", [50, 200])
def test_fewer_draws_than_the_pilot_are_weighed_once(n: int) -> None:
    problem = conjugate()
    fixed = bf.correct(problem.model, near(problem, 0.35, 2.0), n, seed=0)
    assert (fixed.method, fixed.theta.shape) == ("smc", (1, n, problem.model.dim))


def test_auto_refines_where_weights_fail_in_many_dimensions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = many_weights()
    flow = Affine(torch.zeros(61, dtype=F64), torch.eye(61, dtype=F64))  # the prior
    fixed = bf.correct(model, flow, 300, seed=0)
    assert fixed.method == "refine"
    assert "refine, chosen since k-hat is" in fixed.verdict
    assert fixed.log_weights is None
    assert fixed.info["density_solves"] < 600
    value, error = fixed.log_evidence
    there, spread = bf.sample(model, bf.SMC(particles=200), seed=1).log_evidence
    assert error < 0.15
    assert abs(value - there) < 4 * math.hypot(error, spread)
    monkeypatch.setattr(MODULE, "WEIGHED", 60)
    monkeypatch.setattr("bnnflow.transport.correction.refinement.WEIGHED", 60)
    blind = bf.correct(model, flow, 50, seed=0)
    assert blind.method == "refine"
    assert blind.log_evidence is None
    assert "too expensive" in blind.verdict
    assert blind.khat is None
    assert blind.info["density_solves"] == 0
    assert blind.verdict.startswith("do not trust")  # nothing was compared
    chains = bf.sample(model, bf.HMC(), chains=8, warmup=150, draws=60, seed=0)
    compared = bf.correct(model, flow, 300, seed=0, held_out=chains)
    # sixteen transitions from the prior are not enough
    assert "refine for longer" in compared.verdict
    compared = bf.correct(model, bf.GaussNewtonFlow(model), 300, seed=0, held_out=chains)
    assert compared.verdict.startswith("trust after correction")
    assert compared.info["density_solves"] == 0


def test_a_refinement_that_is_too_short_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = conjugate()
    monkeypatch.setattr("bnnflow.transport.correction.refinement.TRANSITIONS", 1)
    far = near(problem, 0.5, 40.0)
    fixed = bf.correct(problem.model, far, 400, "refine", seed=0)
    assert fixed.verdict.startswith("do not trust")
    assert "refine for longer" in fixed.verdict


# ---------------------------------------- refusals


@pytest.mark.parametrize("method", ["auto", *[m for m in METHODS if m != "refine"]])
@pytest.mark.parametrize("trace", ["hutchinson", "hutch++"])
def test_estimated_densities_are_refused_for_weights(method: Any, trace: Any) -> None:
    problem = conjugate()
    with pytest.raises(ValueError, match="weights made of it are biased"):
        bf.correct(problem.model, near(problem), 100, method, density=Density(trace))


def test_estimated_densities_are_named_if_forced() -> None:
    problem = conjugate()
    held = chains_of(problem)
    forced = bf.correct(
        problem.model,
        near(problem, 1.0, 0.0),
        400,
        force=True,
        seed=0,
        held_out=held,
        density=Density("hutchinson"),
    )
    assert forced.verdict.startswith("do not trust")
    assert "densities are estimates (hutchinson)" in forced.verdict
    refined = bf.correct(
        problem.model,
        near(problem),
        400,
        "refine",
        seed=0,
        held_out=held,
        density=Density("hutchinson"),
    )
    assert refined.verdict.startswith("trust after correction")
    assert refined.khat is None
    assert refined.info["density_solves"] == 0


def test_a_flow_without_a_density_over_weights_is_refused() -> None:
    class Manifold:
        dim = 4

        def sample(self, n: int, seed: int) -> Tensor:
            return torch.zeros(n, 4)

        def log_prob(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x))

    with pytest.raises(
        ValueError, match=r"Manifold has no density over weights.*completes the measure"
    ):
        bf.correct(conjugate().model, Manifold())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 49}, "n must be an integer of at least 50"),
        ({"n": 100.5}, "n must be an integer, got"),
        ({"method": "magic"}, "method must be one of 'auto', 'importance'"),
        ({"density": "exact"}, "density must be a Density"),
        ({"held_out": torch.zeros(20, 3)}, "axis of length"),
        ({"held_out": torch.zeros(5, 4)}, "at least 10 draws"),
        ({"held_out": torch.full((20, 4), math.nan)}, "20 of 20 held-out draws are NaN"),
        (
            {"held_out": (torch.zeros(20, 4), torch.full((20,), -math.inf))},
            "must not all have weight zero",
        ),
        (
            {"held_out": (torch.zeros(20, 4), torch.zeros(19))},
            "19 log weights for 20 draws",
        ),
    ],
)
def test_settings_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    problem = conjugate()
    with pytest.raises((TypeError, ValueError), match=message):
        bf.correct(problem.model, near(problem), **({"n": 100} | options))


def test_a_flow_of_another_dimension_is_refused() -> None:
    flow = Affine(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64))
    with pytest.raises(ValueError, match="the flow has dim 3 and the model 4"):
        bf.correct(conjugate().model, flow)


def test_neutra_is_for_few_dimensions() -> None:
    flow = Affine(torch.zeros(61, dtype=F64), torch.eye(61, dtype=F64))
    with pytest.raises(ValueError, match=r"dim 61 is above 50.*force=True insists"):
        bf.correct(many_weights(), flow, 50, "neutra")
    forced = bf.correct(many_weights(), flow, 50, "neutra", force=True, seed=0)
    assert forced.method == "neutra"


# ---------------------------------------- what goes wrong


class Broken(Affine):
    """A flow without an answer for latent points beyond a bound, in one of three ways."""

    def __init__(self, problem: Conjugate, how: str, bound: float = 1.5) -> None:
        base = near(problem)
        super().__init__(base.loc, base.tril)
        self.how, self.bound = how, bound

    def forward(self, x0: Tensor, **options: Any) -> Tensor:
        beyond = x0[:, 0] > self.bound
        if self.how == "raises" and bool(beyond.any()):
            raise FloatingPointError("the velocity became NaN")
        theta = super().forward(x0)
        return (
            torch.where(beyond[:, None], math.nan, theta)
            if self.how == "weights"
            else theta
        )

    def forward_with_log_prob(self, x0: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        theta, log_q = super().forward_with_log_prob(x0)
        return theta, torch.where(
            x0[:, 0] > self.bound, math.nan, log_q
        ) if self.how == "density" else log_q

    def inverse_with_log_prob(self, theta: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        x0 = torch.linalg.solve_triangular(self.tril, (theta - self.loc).T, upper=False).T
        return x0, self.forward_with_log_prob(x0)[1]


@pytest.mark.crossed
@pytest.mark.parametrize("how", ["raises", "weights", "density"])
@pytest.mark.parametrize("method", METHODS)
def test_draws_without_an_answer_are_survived_and_counted(how: str, method: Any) -> None:
    problem = conjugate()
    flow = Broken(problem, how)
    fixed = bf.correct(problem.model, flow, 400, method, seed=3)
    assert fixed.theta.isfinite().all()
    assert fixed.log_joint.isfinite().all()
    if method == "refine" and how == "density":
        return
    x0 = flow.start(400, generator(3))
    few = {"refine": 256, "metropolis": 400, "neutra": 400}.get(method, 400)
    if method != "defensive":
        assert fixed.info["lost"] == int((x0[:few, 0] > 1.5).sum()) > 10
    if method in ("importance", "resample"):
        assert "have no finite weight and were left out" in fixed.verdict
        # Zero weights are counted: the evidence is that of where the flow has an answer.
        points = Latent(near(problem), problem.model, Density(), generator()).forward(x0)
        whole = torch.where(x0[:, 0] > 1.5, -math.inf, points.log_weight)
        assert fixed.log_evidence[0] == pytest.approx(log_mean(whole)[0])
    # its way back has an answer everywhere
    if method in ("smc", "metropolis") and how != "weights":
        pulled, _ = near(problem).inverse_with_log_prob(fixed.theta.flatten(0, 1))
        assert pulled[:, 0].max() < 1.5 + 1e-9


def test_a_flow_without_any_answer_raises() -> None:
    problem = conjugate()
    for method in ("importance", "smc", "metropolis"):
        with pytest.raises(
            FloatingPointError, match="no draw of the flow has a finite weight"
        ):
            bf.correct(problem.model, Broken(problem, "density", -math.inf), 100, method)


@pytest.mark.parametrize(
    ("method", "after", "said"),
    [
        ("importance", 2, "after 1,024 of 3,000 draws were weighed"),
        ("resample", 2, "after 1,024 of 3,000 draws were weighed"),
        ("smc", 20, "at inverse temperature"),
        ("metropolis", 90, r"of 50 draws of each chain"),
        ("neutra", 150, r"draws of each chain"),
    ],
)
def test_an_interrupt_keeps_what_there_is(method: Any, after: int, said: str) -> None:
    problem = conjugate()
    flow, calls = near(problem, 0.6 if method == "smc" else 1.2), itertools.count()
    real = flow.forward_with_log_prob

    def interrupted(x0: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if next(calls) == after:
            raise KeyboardInterrupt
        return real(x0)

    flow.forward_with_log_prob = interrupted  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=f"interrupted .*{said}"):
        fixed = bf.correct(problem.model, flow, 3000, method, seed=0)
    assert fixed.info["interrupted"]
    assert "interrupted" in fixed.verdict
    assert fixed.theta.isfinite().all()
    if method == "smc":
        assert fixed.verdict.startswith("do not trust")
        assert fixed.log_evidence is None
    if method == "importance":
        assert fixed.n_draws == 1024
        assert (
            abs(fixed.log_evidence[0] - problem.log_normaliser) < 4 * fixed.log_evidence[1]
        )


def test_an_interrupted_refinement_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, calls = conjugate(), itertools.count()
    real = problem.model.log_joint_and_grad

    def interrupted(theta: Tensor) -> tuple[Tensor, Tensor]:
        if len(theta) == 100 and next(calls) == 20:
            raise KeyboardInterrupt
        return real(theta)

    monkeypatch.setattr(problem.model, "log_joint_and_grad", interrupted)
    with pytest.warns(UserWarning, match="interrupted"):
        fixed = bf.correct(problem.model, near(problem), 100, "refine", seed=0)
    assert fixed.info["interrupted"]
    assert fixed.info["transitions"] < 16
    assert fixed.verdict.startswith("do not trust")


def test_an_interrupt_while_the_evidence_is_sought_keeps_the_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = conjugate()

    def interrupted(*args: Any, **options: Any) -> tuple[float, float]:
        raise KeyboardInterrupt

    whole = bf.correct(problem.model, near(problem), 100, "refine", seed=0)
    monkeypatch.setattr("bnnflow.transport.correction.refinement.evidence", interrupted)
    with pytest.warns(UserWarning, match="interrupted while the evidence was sought"):
        fixed = bf.correct(problem.model, near(problem), 100, "refine", seed=0)
    torch.testing.assert_close(fixed.theta, whole.theta)
    assert fixed.info["interrupted"]
    assert whole.log_evidence is not None
    assert fixed.log_evidence is None


def test_a_tempered_posterior_has_no_evidence_after_refinement() -> None:
    problem = conjugate(temperature=0.5)
    fixed = bf.correct(problem.model, near(problem), 100, "refine", seed=0)
    assert fixed.log_evidence is fixed.info["log_tempered_normaliser"] is None


def test_an_interrupt_before_anything_goes_on() -> None:
    problem = conjugate()
    flow = near(problem)

    def interrupted(x0: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        raise KeyboardInterrupt

    flow.forward_with_log_prob = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        bf.correct(problem.model, flow, 100, "importance")


def test_steps_that_the_density_depends_on_are_found_out() -> None:
    problem = conjugate()
    flow = near(problem, 1.0, 0.0)
    real = flow.forward_with_log_prob

    def coarse(
        x0: Tensor, solver: Solver | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        theta, log_q = real(x0)
        return theta, log_q + error * x0[:, 0] / (solver or flow.solver).steps ** 2  # type: ignore[operator]

    flow.forward_with_log_prob = coarse  # type: ignore[method-assign]
    for error, start in (
        (0.3, "trust: "),
        (3.0, "trust after correction"),
        (80.0, "do not trust"),
    ):
        fixed = bf.correct(
            problem.model, flow, 500, "importance", seed=0, held_out=chains_of(problem)
        )
        assert fixed.verdict.startswith(start)
        assert fixed.info["solver_error"] == pytest.approx(error * 0.75 / 16, rel=0.4)
        assert ("a finer solver" in fixed.verdict) == (error > 1)


# ---------------------------------------- the result


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_a_seed_decides_everything(method: Any) -> None:
    problem = conjugate()
    one, same, other = (
        bf.correct(problem.model, near(problem, bend=0.5), 100, method, seed=s)
        for s in (5, 5, 6)
    )
    assert torch.equal(one.theta, same.theta)
    assert one.log_evidence == same.log_evidence
    assert one.verdict == same.verdict
    assert not torch.equal(one.theta[..., :20, :], other.theta[..., :20, :])


def test_a_generator_goes_on() -> None:
    problem, g = conjugate(), generator(0)
    first, second = (
        bf.correct(problem.model, near(problem), 100, "importance", seed=g)
        for _ in range(2)
    )
    assert not torch.equal(first.theta, second.theta)


def test_corrected_draws_are_draws(tmp_path: Any) -> None:
    problem = conjugate()
    fixed = bf.correct(
        problem.model, near(problem), 500, seed=0, held_out=chains_of(problem)
    )
    assert isinstance(fixed, bf.Draws)
    prediction = bf.predict(problem.model, fixed, problem.model.x[:3])
    pair = bf.predict(problem.model, (fixed.theta, fixed.log_weights), problem.model.x[:3])
    torch.testing.assert_close(prediction.mean, pair.mean)
    assert bf.diagnose(problem.model, fixed).kind == "weighted"
    moved = bf.correct(problem.model, near(problem), 500, "metropolis", seed=0)
    assert bf.diagnose(problem.model, moved).kind == "chains"
    loaded = bf.load(fixed.save(tmp_path / "fixed"))
    assert torch.equal(loaded.theta, fixed.theta)
    assert loaded.info["verdict"] == fixed.verdict
    assert loaded.log_evidence == fixed.log_evidence


def test_costs_are_counted() -> None:
    problem, counts = conjugate(), {"forward": 0, "inverse": 0, "gradients": 0}
    flow, model = near(problem), problem.model
    forward, inverse, gradient = (
        flow.forward_with_log_prob,
        flow.inverse_with_log_prob,
        model.log_joint_and_grad,
    )

    def counted(name: str, function: Callable) -> Callable:
        def call(x: Tensor, **options: Any) -> Any:
            counts[name] += len(x)
            return function(x, **options)

        return call

    flow.forward_with_log_prob = counted("forward", forward)  # type: ignore[method-assign]
    flow.inverse_with_log_prob = counted("inverse", inverse)  # type: ignore[method-assign]
    model.log_joint_and_grad = counted("gradients", gradient)  # type: ignore[method-assign]
    fixed = bf.correct(model, flow, 100, "metropolis", seed=0, held_out=chains_of(problem))
    assert fixed.info["density_solves"] == counts["forward"] + counts["inverse"]
    assert fixed.info["gradients_per_chain"] * fixed.n_chains == counts["gradients"]
    assert fixed.info["cpu_seconds"] > 0
    assert fixed.info["seconds"] > 0


def test_weighted_held_out_draws_count_by_their_weights() -> None:
    problem = conjugate()
    particles = bf.sample(problem.model, bf.SMC(particles=300), chains=3, seed=0)
    fixed = bf.correct(problem.model, near(problem), 800, seed=0, held_out=particles)
    assert fixed.verdict.startswith("trust after correction")
    value, error = fixed.info["evidences"]["bridge"]
    assert abs(value - problem.log_normaliser) < 4 * error
    junk = torch.cat([particles.flat, particles.flat + 100])  # without weight
    weights = torch.cat(
        [particles.log_weights.flatten(), torch.full((900,), -math.inf, dtype=F64)]
    )
    same = bf.correct(
        problem.model, near(problem), 800, seed=0, held_out=(junk[:1000], weights[:1000])
    )
    assert same.verdict.startswith("trust after correction")


# ---------------------------------------- parts


def test_the_shape_of_a_pareto_tail_is_found() -> None:
    for k in (0.3, 0.8):
        uniform = torch.rand(20_000, generator=generator(), dtype=F64)
        weights, khat = psis(-k * uniform.log())
        assert khat == pytest.approx(k, abs=0.1)
        assert float(weights.logsumexp(0)) == pytest.approx(0, abs=1e-9)


def test_weights_of_zero_and_equal_weights_are_smoothed() -> None:
    weights, khat = psis(torch.tensor([0.0, -math.inf, 0.0], dtype=F64))
    assert khat == 0
    assert weights.exp().tolist() == pytest.approx([0.5, 0.0, 0.5])
    assert kish_ess(weights) == pytest.approx(2)
    nothing, khat = psis(torch.full((5,), -math.inf, dtype=F64))
    assert khat == math.inf
    assert kish_ess(nothing) == 0
    assert log_mean(nothing) == (-math.inf, math.inf)


def test_the_mean_of_raw_weights_has_the_textbooks_error() -> None:
    weights = torch.randn(1000, generator=generator(), dtype=F64)
    value, error = log_mean(weights)
    ratio = weights.exp() / weights.exp().mean()
    assert value == pytest.approx(float(weights.exp().mean().log()))
    assert error == pytest.approx(float(ratio.std()) / math.sqrt(1000))
    split = log_mean(torch.cat([weights, weights + 1]), 1000, 1000)
    assert split[0] == pytest.approx(value + math.log((1 + math.e) / 2))
    together = log_mean(torch.cat([weights, weights + 1]))
    assert split[1] < together[1]  # what differs between strata is no error


def test_the_bridge_between_gaussians() -> None:
    """Both sides are independent draws: known evidence, honest errors, and none where the sides do
    not overlap.
    """
    scores = []
    for seed in range(40):
        g = generator(seed)
        ours, theirs = (
            torch.randn(400, generator=g, dtype=F64),
            0.3 + 0.8 * torch.randn(600, generator=g, dtype=F64),
        )

        def ratio(x: Tensor) -> Tensor:  # exp(2.5) N(0.3, 0.64) / N(0, 1)
            return 2.5 - math.log(0.8) - 0.5 * ((x - 0.3) / 0.8) ** 2 + 0.5 * x**2

        held = HeldOut(theirs.unsqueeze(1), (600, 1))
        value, error = bridge(ratio(ours), ratio(theirs), held)  # type: ignore[misc]
        scores.append((value - 2.5) / error)
    assert 0.7 < np.sqrt(np.mean(np.square(scores))) < 1.35
    assert np.abs(scores).max() < 4
    for gap in (30.0, 3000.0):  # each side where the other one hardly is
        assert bridge(ratio(ours) - gap, ratio(theirs) + gap, held) is None  # type: ignore[possibly-undefined]


def test_the_bridge_solves_meng_and_wongs_fixed_point() -> None:
    g = generator(0)
    forward, reverse = (
        torch.randn(300, generator=g, dtype=F64),
        0.5 + torch.randn(500, generator=g, dtype=F64),
    )
    value, _ = bridge(forward, reverse, HeldOut(torch.zeros(500, 1), (500, 1)))  # type: ignore[misc]
    ours, theirs, z = 300 / 800, 500 / 800, math.exp(value)
    above = (forward.exp() / (theirs * forward.exp() + ours * z)).mean()
    below = (1 / (theirs * reverse.exp() + ours * z)).mean()
    assert float(above / below) == pytest.approx(z)


def test_distances_are_kolmogorovs() -> None:
    g = generator(0)
    a, b = (
        torch.randn(70, 1, generator=g, dtype=F64),
        0.5 + torch.randn(90, 1, generator=g, dtype=F64).round(decimals=1),
    )
    equal = [torch.full((n,), -math.log(n), dtype=F64) for n in (70, 90)]
    expected = stats.ks_2samp(a[:, 0].numpy(), b[:, 0].numpy()).statistic
    assert ks_distance(a, equal[0], b, equal[1]) == pytest.approx(expected)
    assert ks_distance(a, equal[0], a + 0.01, equal[0], 0.02) == pytest.approx(0)
    assert ks_distance(a, equal[0], a + 0.03, equal[0], 0.02) > 0
    assert ks_distance(a + 0.03, equal[0], a, equal[0], 0.02) > 0
    twice = (
        torch.cat([a, a + 9]),
        torch.cat([equal[0], torch.full((70,), -math.inf, dtype=F64)]),
    )
    assert ks_distance(*twice, b, equal[1]) == pytest.approx(expected)
    infinite = torch.where(b > 1, math.inf, b)
    assert ks_distance(a, equal[0], infinite, equal[1]) >= float(
        (b > 1).double().mean() - (a > 1).double().mean()
    )


def test_the_heavy_tail_is_students() -> None:
    theta = torch.randn(3000, 3, generator=generator(), dtype=F64) @ torch.tensor(
        [[1.0, 0, 0], [0.5, 2.0, 0], [0, 0.3, 0.1]], dtype=F64
    )
    student = Student.fit(theta)
    shape = student.scale_tril @ student.scale_tril.T
    torch.testing.assert_close(shape, 1.5**2 * torch.cov(theta.T), rtol=0.02, atol=0.01)
    law = stats.multivariate_t(student.loc.numpy(), shape.numpy(), df=5)
    torch.testing.assert_close(
        student.log_prob(theta), torch.from_numpy(law.logpdf(theta.numpy()))
    )
    drawn = torch.linalg.solve_triangular(
        student.scale_tril, (student.sample(20_000, 0) - student.loc).T, upper=False
    )
    assert min(stats.kstest(row.numpy(), stats.t(5).cdf).pvalue for row in drawn) > 1e-4


def test_held_out_draws_are_thinned_along_their_chains() -> None:
    model = conjugate().model
    theta = torch.arange(6 * 500, dtype=F64).reshape(6, 500, 1).expand(6, 500, 4)
    kept = HeldOut.of(theta, model, 100)
    assert kept.shape == (6, 16)
    assert torch.equal(kept.theta[:16, 0].diff() > 0, torch.ones(15, dtype=torch.bool))
    assert kept.theta[0, 0] == 0
    assert kept.theta[15, 0] == 499
    many = HeldOut.of(theta.reshape(-1, 4), model, 100)
    assert many.shape == (100, 1)


def test_independent_draws_count_in_full_and_chains_by_their_ess() -> None:
    g, rho = generator(0), 0.9
    values = torch.zeros(8, 500, dtype=F64)
    state = torch.randn(8, generator=g, dtype=F64)
    for i in range(500):
        state = rho * state + math.sqrt(1 - rho**2) * torch.randn(8, generator=g, dtype=F64)
        values[:, i] = state
    held = HeldOut(torch.zeros(4000, 1), (8, 500))
    assert held.ess(values.flatten()) == pytest.approx(
        4000 * (1 - rho) / (1 + rho), rel=0.3
    )
    assert HeldOut(torch.zeros(4000, 1), (4000, 1)).ess(values.flatten()) == 4000
    assert HeldOut(torch.zeros(6, 1), (2, 3)).ess(torch.randn(6, generator=g)) == 2
    r_hat, ess = rhat_and_ess(values.unsqueeze(-1))
    assert r_hat < 1.05
    assert ess == pytest.approx(4000 * (1 - rho) / (1 + rho), rel=0.4)
    apart = values + 3 * torch.arange(8)[:, None]
    assert rhat_and_ess(torch.stack([values, apart], -1))[0] > 1.5


# ---------------------------------------- real flows


def gaussian_flow(problem: Conjugate, scale: float = 1.0, steps: int = 16) -> Flow:
    """Return the closed-form flow from the prior N(0, 1.5^2) to a Gaussian, in the prior's
    coordinates.
    """
    field = GaussianVelocity(problem.mean / 1.5, scale * problem.covariance / 2.25)
    return Flow.of(field, problem.model, solver=Solver("rk4", steps))


@pytest.mark.parametrize("method", METHODS)
def test_real_flows_are_corrected(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = conjugate()
    monkeypatch.setattr("bnnflow.transport.correction.chains.WARM_UP", 25)
    n = 50 if method == "neutra" else 400
    flow = gaussian_flow(problem, 1.7, steps=4)
    fixed = bf.correct(problem.model, flow, n, method, seed=0, held_out=chains_of(problem))
    # so few draws
    assert fixed.verdict.startswith("trust after correction") or method == "neutra"
    value, error = fixed.log_evidence
    assert error < 0.1
    assert abs(value - problem.log_normaliser) < 4 * error


def test_a_real_exact_flow_is_trusted_if_its_solver_is() -> None:
    problem = conjugate()
    fine = bf.correct(
        problem.model, gaussian_flow(problem), 500, seed=0, held_out=chains_of(problem)
    )
    assert fine.verdict.startswith("trust: ")
    assert fine.log_evidence[0] == pytest.approx(problem.log_normaliser, abs=0.01)
    coarse = bf.correct(
        problem.model, gaussian_flow(problem, steps=1), 400, "importance", seed=0
    )
    assert coarse.info["solver_error"] > 0.1
    assert "a finer solver" in coarse.verdict


def test_real_estimated_densities_are_noisy_and_said_to_be() -> None:
    problem = conjugate()
    flow = gaussian_flow(problem, 1.3)
    with pytest.raises(ValueError, match="biased"):
        bf.correct(problem.model, flow, 100, density=Density("hutchinson"))
    forced = bf.correct(
        problem.model,
        flow,
        100,
        "importance",
        force=True,
        seed=0,
        density=Density("hutchinson"),
    )
    assert forced.verdict.startswith("do not trust")


def test_the_public_name_is_the_function() -> None:
    assert bf.correct is correct_function
