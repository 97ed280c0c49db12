"""A prior learned from many tasks."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.transport import Flow, Solver, WeightsVelocity
from bnnflow.transport.learned_prior import log_evidence_by_prior
from tests.problems import F64, built, conjugate, generator

TRAINING = bf.Training(steps=150, batch_size=64)


def task(
    seed: int, n: int = 12, width: int = 4, noise: float = 0.2, scale: float = 1.0
) -> bf.BayesianModel:
    """A sine wave of one's own, around 1.5."""
    g = generator(100 + seed)
    height, shift = torch.rand(2, generator=g)
    x = 4 * torch.rand(n, 1, generator=g) - 2
    y = 1.5 + (0.5 + height) * torch.sin(x[:, 0] + 6 * shift)
    y = y + noise * torch.randn(n, generator=g)

    def perceptron() -> nn.Module:
        return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))

    net = built(perceptron, torch.float32)
    return bf.BayesianModel(net, priors.Normal(scale), likelihoods.Gaussian(noise), x, y)


def posterior(model: bf.BayesianModel, seed: int) -> bf.Draws:
    return bf.sample(
        model, bf.HMC(max_leapfrog=16), chains=8, warmup=60, draws=8, seed=seed
    )


@pytest.fixture(scope="module")
def tasks() -> list[bf.BayesianModel]:
    return [task(seed) for seed in range(16)]


@pytest.fixture(scope="module")
def draws(tasks: list[bf.BayesianModel]) -> list[bf.Draws]:
    return [posterior(each, seed) for seed, each in enumerate(tasks)]


def small(model: bf.BayesianModel) -> WeightsVelocity:
    return built(
        lambda: WeightsVelocity(model.spec, width=16, depth=1, architecture="signed"),
        torch.float32,
    )


def fitted(tasks: list[bf.BayesianModel], draws: list[bf.Draws], **options: object) -> Flow:
    given = {
        "velocity": small(tasks[0]),
        "training": TRAINING,
        "seed": 0,
        "draws_per_task": 48,
    }
    return bf.fit_prior(tasks, draws, **(given | options))


def test_evidence_of_unseen_tasks_rises(
    tasks: list[bf.BayesianModel], draws: list[bf.Draws]
) -> None:
    flow = fitted(tasks, draws)
    assert flow.info["rounds"] == 1
    assert len(flow.info["held_out_tasks"]) == 2
    assert flow.info["tasks"] == 14
    assert flow.info["log_evidence"][0] > flow.info["log_evidence_plain"]
    unseen = [task(seed) for seed in range(1000, 1020)]
    theta = flow.sample(4096, 1), unseen[0].sample_prior(4096, 1)
    ours, plain = (log_evidence_by_prior(unseen, each) for each in theta)
    gain = ours - plain
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))
    # it is a prior that samplers take, and that knows the symmetries
    carried = unseen[0].transported(replace(flow, solver=Solver("midpoint", 2)))
    assert carried.symmetries().sign == {"h1"}
    assert bool(carried.log_joint(carried.sample_prior(4, 0)).isfinite().all())


def test_a_second_round_goes_on_from_the_first(
    tasks: list[bf.BayesianModel], draws: list[bf.Draws]
) -> None:
    few = {"training": bf.Training(steps=10, batch_size=64), "draws_per_task": 8}
    one = fitted(tasks[:2], draws[:2], **few)
    two = fitted(tasks[:2], draws[:2], rounds=2, **few)
    assert two.info["rounds"] == 2
    assert two.info["log_evidence"][0] == one.info["log_evidence"][0]
    best = max(two.info["log_evidence"])
    kept = two.sample(5, 0).equal(one.sample(5, 0))
    assert kept == (best == one.info["log_evidence"][0])


def test_posteriors_are_sampled_where_none_are_given() -> None:
    tasks = [task(seed, n=5, width=2) for seed in range(2)]
    flow = bf.fit_prior(
        tasks, velocity=small(tasks[0]), training=bf.Training(steps=2), seed=0
    )
    assert flow.sample(3).shape == (3, 7)
    assert flow.info["tasks"] == 1


def test_the_same_seed_gives_the_same_prior(
    tasks: list[bf.BayesianModel], draws: list[bf.Draws]
) -> None:
    few = bf.Training(steps=5)
    first, second = (fitted(tasks[:4], draws[:4], training=few) for _ in range(2))
    assert first.sample(3, 0).equal(second.sample(3, 0))
    other = fitted(tasks[:4], draws[:4], training=few, seed=1)
    assert not other.sample(3, 0).equal(first.sample(3, 0))


def test_evidence_by_draws_of_a_prior_is_the_closed_form() -> None:
    model = conjugate().model
    theta = model.sample_prior(200_000, 0)
    design = torch.cat([model.x[:3], torch.ones(3, 1, dtype=F64)], 1)
    covariance = 0.25 * torch.eye(3, dtype=F64) + 2.25 * design @ design.T
    law = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=F64), covariance)
    (found,) = log_evidence_by_prior([model], theta)
    assert abs(float(found - law.log_prob(model.y[:3].flatten()))) < 0.05


def test_a_flow_goes_back_where_it_came_from(tasks: list[bf.BayesianModel]) -> None:
    flow = Flow.of(small(tasks[0]), tasks[0], solver=Solver("rk4", 12))
    x0 = torch.randn(4, flow.dim, generator=generator(0))
    torch.testing.assert_close(flow.inverse(flow.forward(x0)), x0, rtol=1e-3, atol=1e-3)


def test_bad_input_is_named(tasks: list[bf.BayesianModel], draws: list[bf.Draws]) -> None:
    def refuse(message: str, given: list, of: list[bf.Draws] | None = None) -> None:
        with pytest.raises(ValueError, match=message):
            bf.fit_prior(given, of)

    refuse("tasks must be at least 2", [])
    refuse("tasks must be at least 2", tasks[:1])
    refuse(r"tasks\[1\] has another network", [tasks[0], task(1, width=5)])
    refuse(r"tasks\[1\] has another prior", [tasks[0], task(1, scale=2.0)])
    rough = bf.BayesianModel(
        tasks[0].net, tasks[0].prior, likelihoods.StudentT(4.0, 0.2), tasks[0].x, tasks[0].y
    )
    refuse(r"tasks\[1\] has another likelihood", [tasks[0], rough])
    carried = tasks[1].transported(Flow.of(small(tasks[0]), tasks[0]))
    refuse(r"tasks\[1\] must be a model of weights", [tasks[0], carried])
    refuse("draws must be as many as tasks", tasks[:3], draws[:2])
    refuse(r"draws\[0\]: these are draws of another model", tasks[:2], draws[1::-1])
    networks = replace(draws[1], info={"method": "DeepEnsemble"})
    refuse(r"draws\[1\] of DeepEnsemble", tasks[:2], [draws[0], networks])
    broken = replace(draws[1], theta=torch.full_like(draws[1].theta, torch.nan))
    refuse(r"draws\[1\] are NaN", tasks[:2], [draws[0], broken])
    with pytest.raises(TypeError, match=r"tasks\[1\] must be a BayesianModel"):
        bf.fit_prior([tasks[0], "another"])  # type: ignore[list-item]  # what is refused
