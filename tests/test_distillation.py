"""Laws of distilled flow maps: they land where the flow does, in few evaluations, and claim no
density.
"""

from __future__ import annotations

import pytest
import torch

import bnnflow as bf
from bnnflow.transport import GaussNewtonFlow, InformedVelocity, Solver, distil
from tests.problems import network


def small(model: bf.BayesianModel) -> InformedVelocity:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return InformedVelocity(model.spec, width=16, depth=2)


def test_map_lands_closer_to_the_flow_than_its_solver_with_as_many_evaluations():
    model = network("categorical", dtype=torch.float32)
    draws = bf.refine(model, bf.GaussNewtonFlow(model).sample(200, 0), 2, seed=1)
    flow = bf.fit_flow(
        model,
        draws,
        velocity=small(model),
        seed=0,
        training=bf.Training(steps=60, batch_size=64),
    )
    fast = distil(
        flow, 4, trajectories=400, seed=1, training=bf.Training(steps=120, batch_size=32)
    )
    x0 = flow.start(300, 9)
    truth = flow.forward(x0, solver=Solver(steps=24))
    mapped = fast.sample(300, 9)  # from the same x0
    with torch.no_grad():
        crude = flow.forward(x0, solver=Solver("euler", 4))
    spread = truth.std(0)
    errors = [
        float(((each - truth) / spread).square().mean().sqrt()) for each in (mapped, crude)
    ]
    assert errors[0] < 0.8 * errors[1]
    assert fast.info["approximate"]
    assert not hasattr(fast, "log_prob")


def test_map_is_reproducible_stored_and_checked(tmp_path):
    model = network("learned", dtype=torch.float32)
    flow = bf.fit_flow(
        model,
        model.sample_prior(100, 0),
        velocity=small(model),
        training=bf.Training(steps=3, batch_size=16),
    )
    first, again = (
        distil(
            flow, 3, trajectories=50, seed=4, training=bf.Training(steps=3, batch_size=16)
        )
        for _ in range(2)
    )
    assert torch.equal(first.sample(5, 0), again.sample(5, 0))
    loaded = bf.load(first.save(tmp_path / "map"), model)
    assert torch.allclose(loaded.sample(5, 0), first.sample(5, 0), atol=1e-5)
    with pytest.raises(ValueError, match="needs its model"):
        bf.load(tmp_path / "map.npz")
    with pytest.raises(ValueError, match="no parameters"):
        distil(GaussNewtonFlow(model))
    with pytest.raises(ValueError, match="at least 1"):
        distil(flow, 0)
