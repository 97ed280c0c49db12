"""Laws of guidance: its sign, its closed form, and what it may be applied to."""

from __future__ import annotations

import math

import pytest
import torch

import bnnflow as bf
from bnnflow.transport import (
    AffinePath,
    Flow,
    GaussianVelocity,
    GaussNewtonFlow,
    Solver,
    Source,
)
from tests.problems import F64, network, regression


@pytest.mark.crossed
@pytest.mark.parametrize("schedule", ["linear", "variance_preserving"])
@pytest.mark.parametrize("as_function", [False, True])
def test_guiding_the_prior_by_a_likelihood_gives_the_posterior(schedule, as_function):
    model, mean, covariance = regression()
    identity = GaussianVelocity(
        torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64), AffinePath(schedule)
    )
    guide = model.log_likelihood if as_function else model
    flow = Flow.of(identity, model).guided(guide, steps=16, max_norm=math.inf)
    theta = flow.sample(400, 0, solver=Solver("rk4", 8)) / 1.5
    assert ((theta.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max() < 4.5 / 20
    assert torch.allclose(
        torch.cov(theta.T), covariance, atol=0.3 * float(covariance.diagonal().max())
    )


def test_guided_density_integrates_the_guided_field():
    model, *_ = regression()
    flow = Flow.of(
        GaussianVelocity(torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64)), model
    )
    guided = flow.guided(model, 0.5, steps=1)
    theta, log_q = guided.sample_with_log_prob(3, 0, solver=Solver("rk4", 24))
    assert torch.allclose(
        guided.log_prob(theta, solver=Solver("rk4", 24)), log_q, atol=1e-3
    )
    assert not torch.allclose(flow.log_prob(theta), log_q, atol=0.1)


def test_strength_attracts_repels_and_may_follow_the_time():
    base, task = network("categorical"), network("categorical")
    other = bf.BayesianModel(task.net, task.prior, task.likelihood, task.x, task.y.roll(1))
    flow = GaussNewtonFlow(base, solver=Solver(steps=12))

    def score(flow: Flow) -> float:
        return float(other.log_likelihood(flow.sample(200, 0)).mean())

    late = flow.guided(other, lambda t: (t > 0.5).to(t))
    scores = [
        score(each)
        for each in (flow.guided(other, -0.3), flow, late, flow.guided(other, 1.0))
    ]
    assert scores == sorted(scores)
    assert scores[3] > scores[1] + 2
    assert torch.equal(flow.guided(other, 0.0).sample(5, 0), flow.sample(5, 0))


def test_guidance_works_from_any_source_and_checks_the_guide():
    model = network("gaussian")
    flow = GaussNewtonFlow(model, source=Source.scaled(model, 0.7), solver=Solver(steps=8))
    guided = flow.guided(lambda theta: -50 * theta[:, 0].square(), 1.0)
    assert (
        guided.sample(200, 0)[:, 0].abs().mean()
        < 0.8 * flow.sample(200, 0)[:, 0].abs().mean()
    )
    with pytest.raises(ValueError, match="the guide has"):
        flow.guided(network("gaussian", width=3))
    with pytest.raises(ValueError, match="cannot save"):
        guided.save("never")
