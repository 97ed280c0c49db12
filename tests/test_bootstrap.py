"""Laws of flows that make their own targets: right where the truth is known, reproducible, and
honest on their cost.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bnnflow as bf
from bnnflow.transport import (
    GradientSteps,
    InformedVelocity,
    ResidualVelocity,
    Solver,
    bootstrap,
    fit_flow_without_draws,
)
from tests.problems import network, regression


def test_flow_without_draws_finds_a_conjugate_posterior():
    model, mean, covariance = regression(torch.float32)
    exact = bf.Gaussian(1.5 * mean, 1.5 * torch.linalg.cholesky(covariance))
    # A displacement that is far from exact, so that refinement has something to do.
    start = GradientSteps(1)
    flow = fit_flow_without_draws(
        model,
        targets=1500,
        proximal_step=start,
        velocity="residual",
        seed=0,
        training=bf.Training(steps=20, batch_size=64),
    )
    theta, log_q = flow.sample_with_log_prob(400, 1, solver=Solver(steps=24))
    assert isinstance(flow.velocity, ResidualVelocity)
    # the divergence KL(q, posterior)
    assert abs(float((log_q - exact.log_prob(theta)).mean())) < 0.15
    crude = bf.GaussNewtonFlow(model, start).sample_with_log_prob(400, 1)
    assert float((crude[1] - exact.log_prob(crude[0])).mean()) > 0.3
    assert len(flow.info["rounds"]) == 2
    assert 2 * 16 * 8 <= flow.info["gradients_per_target"] <= 2 * (16 * 16 + 5)


def test_flow_without_draws_is_reproducible_stored_and_checked(tmp_path):
    model = network("categorical", dtype=torch.float32)

    def make(seed: int) -> bf.Flow:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            field = InformedVelocity(model.spec, width=8, depth=1)
        return fit_flow_without_draws(
            model,
            targets=20,
            refine_steps=1,
            velocity=field,
            seed=seed,
            training=bf.Training(steps=4, batch_size=8),
        )

    first, again, other = make(0), make(0), make(1)
    assert torch.equal(first.sample(3, 0), again.sample(3, 0))
    assert not torch.equal(first.sample(3, 0), other.sample(3, 0))
    assert torch.allclose(
        bf.load(first.save(tmp_path / "flow"), model).sample(3, 0),
        first.sample(3, 0),
        atol=1e-5,
    )
    for options in ({"rounds": 0}, {"targets": 0}, {"training": bf.Training(steps=1)}):
        with pytest.raises(ValueError, match="at least"):
            fit_flow_without_draws(model, **options)


@pytest.mark.parametrize("where", ["fit_flow", "refine"])
def test_an_interrupt_ends_the_rounds(where, monkeypatch):
    """In the first round's training, which keeps its steps, or in the second round's refinement."""
    model = network("categorical", dtype=torch.float32)
    whole, calls = getattr(bootstrap, where), [0]

    def interrupted(*args, **options):
        calls[0] += 1
        if where == "refine" and calls[0] == 2:
            raise KeyboardInterrupt
        made = whole(*args, **options)
        if where == "fit_flow":
            made = replace(made, info=made.info | {"interrupted": True})
        return made

    monkeypatch.setattr(bootstrap, where, interrupted)
    flow = fit_flow_without_draws(
        model,
        rounds=3,
        targets=20,
        refine_steps=1,
        velocity="weights",
        training=bf.Training(steps=6, batch_size=8),
    )
    assert flow.info["interrupted"]
    assert len(flow.info["rounds"]) == 1
