"""A prior learned from many tasks."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.transport import Flow, Solver, WeightsVelocity, learned_prior
from bnnflow.transport.learned_prior import log_evidence_by_prior
from tests.problems import F64, built, conjugate, generator
from tests.processes import run_ranks

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


def nudged(model: bf.BayesianModel, theta: Tensor, steps: int, **options: Any) -> bf.Draws:
    """Stand in for `refine`."""
    moved = theta + 0.01 * torch.randn(theta.shape, generator=generator(options["seed"]))
    return bf.Draws(moved[None], torch.zeros(1, len(moved)))


QUICK = {"_WARMUP": 10, "_LONGEST": 8, "_PRIOR_DRAWS": 64, "refine": nudged}


def short(tasks: list[bf.BayesianModel], **options: object) -> Flow:
    """Fit without draws, in few steps."""
    few = {"velocity": small(tasks[0]), "training": bf.Training(steps=4), "seed": 0}
    return bf.fit_prior(tasks, **(few | {"draws_per_task": 8} | options))


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> list[bf.BayesianModel]:
    for name, value in QUICK.items():
        monkeypatch.setattr(learned_prior, name, value)
    return [task(seed, n=5, width=2) for seed in range(4)]


def test_a_prior_is_learned_on_where_it_was_killed(
    few_tasks: list[bf.BayesianModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = short(few_tasks, rounds=2)
    sampled, calls = learned_prior.sample, []

    def until_the_third(*arguments: object, **options: object) -> bf.Draws:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sampled(*arguments, **options)

    monkeypatch.setattr(learned_prior, "sample", until_the_third)
    place = bf.Checkpoint(tmp_path / "prior", resume=True)
    with pytest.raises(KeyboardInterrupt):
        short(few_tasks, checkpoint=place)
    one = short(few_tasks, checkpoint=place)
    assert len(calls) == 5, "two tasks were kept"
    assert one.info["rounds"] == 1
    two = short(few_tasks, checkpoint=place, rounds=2)
    assert len(calls) == 5, "all tasks were kept"
    assert two.info["log_evidence"] == whole.info["log_evidence"]
    assert two.sample(3, 0).equal(whole.sample(3, 0))
    monkeypatch.setattr(learned_prior, "refine", None)
    again = short(few_tasks, checkpoint=place, rounds=2)
    assert again.sample(3, 0).equal(whole.sample(3, 0))
    with pytest.raises(ValueError, match="holds a fit already"):
        short(few_tasks, checkpoint=tmp_path / "prior")
    for other in ({"seed": 1}, {"draws_per_task": 9}, {"held_out": 0.5}):
        with pytest.raises(ValueError, match="other settings, another seed or other data"):
            short(few_tasks, checkpoint=place, **other)
    with pytest.raises(ValueError, match="other settings, another seed or other data"):
        short(few_tasks[::-1], checkpoint=place)


def test_two_processes_learn_one_prior(tmp_path: Path) -> None:
    program = f"""
import json, os
import bnnflow as bf
from bnnflow.transport import learned_prior
from tests.test_learned_prior import QUICK, short, task
vars(learned_prior).update(QUICK)
tasks = [task(seed, n=5, width=2) for seed in range(3)]
place = bf.Checkpoint("{tmp_path / "prior"}", resume=True)
for rounds in (1, 2):
    flow = short(tasks, checkpoint=place, rounds=rounds)
total = float(flow.sample(5, 0).double().sum())
with open(f"{tmp_path}/{{os.environ['RANK']}}.json", "w") as file:
    json.dump([total, flow.info["log_evidence"]], file)
"""
    assert run_ranks(program) == [0, 0]
    first, second = ((tmp_path / f"{rank}.json").read_text() for rank in (0, 1))
    assert first == second
    assert len(json.loads(first)[1]) == 2


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
