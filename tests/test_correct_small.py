"""Corrections of models of few weights: closed forms in any units, many short chains, the cheapest
rule.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.draws import as_theta
from bnnflow.gaussian import Gaussian
from bnnflow.inference.mcmc.hmc import rotation
from bnnflow.inference.mcmc.trajectories import metropolis
from bnnflow.transport import Density, Flow, GaussianVelocity, GaussNewtonFlow, Solver
from bnnflow.transport.correction.importance import rhat_and_ess
from bnnflow.transport.correction.latent import Latent, log_normal
from bnnflow.types import Trace
from tests.problems import (
    F64,
    built,
    check_moments,
    collected,
    conjugate,
    generator,
    one_in,
)

MODULE = importlib.import_module("bnnflow.transport.correction.latent")


def linear(
    unit: float = 1.0, inputs: float = 1.0
) -> tuple[bf.BayesianModel, Tensor, Tensor, float]:
    """Return a linear regression in other units, with mean, covariance and log evidence of its
    posterior.
    """
    g = generator(1)
    x = torch.randn(30, 2, generator=g, dtype=F64)
    y = (
        x @ torch.tensor([1.0, -0.5], dtype=F64)
        + 0.3
        + 0.5 * torch.randn(30, generator=g, dtype=F64)
    )
    x, y, noise = inputs * x, unit * y, 0.5 * unit
    scale = unit * torch.tensor([1 / inputs, 1 / inputs, 1.0], dtype=F64)
    prior = priors.PerTensor(
        {"weight": td.Normal(0.0, unit / inputs), "bias": td.Normal(0.0, unit)}
    )
    net = built(lambda: nn.Linear(2, 1))
    model = bf.BayesianModel(
        net, prior, likelihoods.Gaussian(noise), x.float(), y.float().unsqueeze(1)
    )
    design = torch.cat([model.x.double(), torch.ones(30, 1, dtype=F64)], 1) * scale / noise
    targets = model.y.double().squeeze(1) / noise
    precision = design.T @ design + torch.eye(3, dtype=F64)
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (design.T @ targets)
    energy = targets @ targets - mean @ precision @ mean
    evidence = (
        -0.5 * energy
        - 0.5 * precision.logdet()
        - 15 * math.log(2 * math.pi)
        - 30 * math.log(noise)
    )
    return model, scale * mean, scale[:, None] * covariance * scale, float(evidence)


def check_draws(fixed: bf.Draws, mean: Tensor, covariance: Tensor, ess: float) -> None:
    theta, weights = as_theta(fixed)
    share = (
        torch.full((len(theta),), 1 / len(theta), dtype=F64)
        if weights is None
        else weights.exp()
    )
    sd = covariance.diagonal().sqrt()
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance / sd / sd[:, None]),
        ((theta - mean) / sd).T,
        upper=False,
    )
    assert ((share * white).sum(1).abs() < 4.5 / math.sqrt(ess)).all()
    assert ((share * (white**2 - 1)).sum(1).abs() < 4.5 * math.sqrt(2 / ess)).all()


# ---------------------------------------- the closed form, in any units


UNITS = [(1.0, 1.0), (1e-8, 1.0), (1.0, 1e-8), (1e8, 1.0), (1.0, 1e8)]


@pytest.mark.parametrize(
    ("method", "unit", "inputs"),
    [
        *(("importance", *units) for units in UNITS[:3]),
        ("smc", *UNITS[3]),
        ("metropolis", *UNITS[4]),
        *(
            pytest.param(method, *units, marks=pytest.mark.validate)
            for method, others in (
                ("importance", UNITS[3:]),
                ("smc", UNITS[:3]),
                ("metropolis", UNITS[:3]),
            )
            for units in others
        ),
    ],
)
def test_a_linear_regression_is_corrected_in_any_units(
    method: Any, unit: float, inputs: float
) -> None:
    model, mean, covariance, evidence = linear(unit, inputs)
    flow = GaussNewtonFlow(model, solver=Solver(steps=6))
    fixed = bf.correct(model, flow, 300, method, seed=0)
    assert fixed.verdict.startswith("trust after correction")
    assert fixed.ess > 150
    check_draws(fixed, mean, covariance, min(fixed.ess, 300))
    value, error = fixed.log_evidence
    assert error < 0.2
    assert abs(value - evidence) < 4 * error + 0.02


# ---------------------------------------- many short chains


def slow(values: Tensor, rho: float, g: torch.Generator) -> Tensor:
    """Turn noise ``(chain, draw)`` into stationary autoregressions."""
    state, found = values[:, 0], [values[:, 0]]
    for noise in values[:, 1:].unbind(1):
        state = rho * state + math.sqrt(1 - rho * rho) * noise
        found.append(state)
    return torch.stack(found, 1)


@pytest.mark.parametrize("rho", [0.0, 0.3, -0.3])
def test_short_chains_count_by_what_their_means_tell(rho: float) -> None:
    """The variance of a mean of L draws of an autoregression is known, and more than n draws are
    never claimed.
    """
    chains, draws = 2000, 8
    values = slow(
        torch.randn(chains, draws, generator=generator(), dtype=F64), rho, generator(1)
    )
    lags = torch.arange(1, draws)
    truth = chains * draws / float(1 + 2 * ((1 - lags / draws) * rho**lags).sum())
    r_hat, ess = rhat_and_ess(values.unsqueeze(-1))
    assert ess == pytest.approx(min(truth, chains * draws), rel=0.15)
    assert (r_hat < 1.05) == (rho <= 0)
    assert (
        rhat_and_ess(
            (
                values + 3 * torch.randn(chains, 1, generator=generator(2), dtype=F64)
            ).unsqueeze(-1)
        )[0]
        > 2
    )


@pytest.mark.parametrize("method", one_in(2, ["metropolis", "neutra"]))
def test_chains_are_many_where_they_forget(method: Any) -> None:
    model, mean, covariance, _ = linear()
    near = GaussNewtonFlow(model, solver=Solver(steps=6))
    fixed = bf.correct(model, near, 600, method, seed=0)
    assert fixed.theta.shape[:2] == (75, 8)
    assert fixed.info["r_hat"] < 1.1
    check_draws(fixed, mean, covariance, fixed.ess)


def test_chains_are_few_where_they_do_not_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mean, covariance, _ = linear()
    root = torch.as_tensor(model.flat_prior.scale).expand(3).double()
    # far from the posterior
    wide = GaussianVelocity(mean / root + 2, 0.2 * torch.eye(3, dtype=F64))
    monkeypatch.setattr("bnnflow.transport.correction.chains.WARM_UP", 20)
    far = bf.correct(
        model, Flow.of(wide, model, solver=Solver(steps=6)), 600, "metropolis", seed=0
    )
    assert far.theta.shape[0] == 12
    check_draws(far, mean, covariance, far.ess)


@pytest.mark.parametrize("about", ["posterior", "source"])
def test_rotations_keep_the_posterior_and_have_no_error_in_their_own_gaussian(
    about: str,
) -> None:
    problem = conjugate()
    root = torch.linalg.cholesky(problem.covariance)
    own = Gaussian(problem.mean, root)
    around = (
        own
        if about == "posterior"
        else Gaussian(torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64))
    )
    target = torch.no_grad()(problem.model.log_joint_and_grad)
    kernel = metropolis(
        target,
        rotation(target, around),
        1.5 if about == "posterior" else 0.05,
        4,
        torch.ones(4),
    )
    draws = collected(kernel, problem.posterior.sample(20, generator(1)), 400, generator(2))
    rate = draws.stats["acceptance_rate"]
    assert rate.min() > 1 - 1e-9 if about == "posterior" else rate.mean() > 0.4
    check_moments(draws.theta, problem.mean, problem.covariance)


# ---------------------------------------- the cheapest rule


@functools.cache
def log_weights(solver: Solver) -> Tensor:
    model, *_ = linear()
    flow = GaussNewtonFlow(model, solver=solver)
    theta, log_q = flow.forward_with_log_prob(flow.start(80, 3))
    return model.log_joint(theta).double() - log_q


def error_of(solver: Solver) -> float:
    error = log_weights(solver) - log_weights(Solver("rk4", 24))
    return float(error.square().mean().sqrt())


@pytest.mark.crossed
@pytest.mark.parametrize("solver", ["midpoint", "rk4"])
@pytest.mark.parametrize("steps", [8, 16])
def test_the_cheapest_rule_within_the_tolerance_is_taken(solver: Any, steps: int) -> None:
    model, *_ = linear()
    flow = GaussNewtonFlow(model, solver=Solver(solver, steps))
    latent = Latent(flow, model, Density(), generator())
    latent.settle(flow.start(80, 3))
    fewer = [s for s in (steps // 4, 3 * steps // 8, steps // 2) if s >= 4]
    errors = [error_of(Solver("rk4", s)) for s in fewer]
    good = [s for s, error in zip(fewer, errors, strict=True) if error <= 0.01]
    assert latent.flow.solver == (Solver("rk4", good[0]) if good else Solver(solver, steps))
    assert (latent.error is None) == (not good)
    if latent.error is not None:
        assert latent.error.rms == pytest.approx(
            errors[fewer.index(good[0])], rel=0.5, abs=1e-4
        )
    fixed = bf.correct(model, flow, 100, "importance", seed=0)
    assert fixed.info["solver_steps"] == latent.flow.solver.steps
    assert fixed.info["solver_error"] < 0.1


@pytest.mark.parametrize(
    ("trace", "solver"), [("hutchinson", "midpoint"), ("exact", "dopri5")]
)
def test_no_rule_is_sought_for_estimates_or_adaptive_solvers(
    trace: Trace, solver: Any
) -> None:
    model, *_ = linear()
    flow = GaussNewtonFlow(model, solver=Solver(solver, 8))
    latent = Latent(flow, model, Density(trace), generator())
    latent.settle(flow.start(64, 0))
    assert latent.flow is flow
    assert latent.error is None
    assert latent.solves == 0


def test_a_rule_that_nothing_matches_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, *_ = linear()
    monkeypatch.setattr(MODULE, "TOLERANCE", 0.0)
    flow = GaussNewtonFlow(model, solver=Solver(steps=16))
    latent = Latent(flow, model, Density(), generator())
    latent.settle(flow.start(64, 0))
    assert latent.flow is flow
    assert latent.error is None


def test_the_latent_density_does_not_depend_on_the_company() -> None:
    model, *_ = linear()
    latent = Latent(
        GaussNewtonFlow(model, solver=Solver(steps=8)), model, Density(), generator()
    )
    x0 = latent.flow.start(40, 0)
    whole, halves = latent.forward(x0), [latent.forward(part) for part in x0.split(20)]
    torch.testing.assert_close(
        whole.log_weight,
        torch.cat([half.log_weight for half in halves]),
        rtol=1e-5,
        atol=1e-4,
    )
    value, _ = latent.log_density_and_grad(x0)
    torch.testing.assert_close(
        value, whole.log_weight + log_normal(x0), rtol=1e-4, atol=1e-3
    )
