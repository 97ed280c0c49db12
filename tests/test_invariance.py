"""What exact transitions tell of independent draws: nothing of those of the posterior, and by how
much others are off.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.diagnosis import invariance
from bnnflow.diagnosis.invariance import drift
from bnnflow.verdicts import MOVED, P_VALUE
from tests.faults import Problem
from tests.problems import F64, built, generator, normal
from tests.test_transported import bent as learned_prior
from tests.test_transported import perceptron


def exact(problem: Problem, draws: int = 100) -> Tensor:
    """Return independent draws of the posterior, ``(4 draws, dim)``."""
    return problem.theta(draws=draws).flatten(0, 1)


def functions(model: bf.BayesianModel, theta: Tensor) -> Tensor:
    return model.outputs(theta, model.x)[..., 0]


def seen(problem: Problem, theta: Tensor) -> bool:
    """Whether a drift would be told of."""
    found = drift(problem.model, theta, problem.x)
    return found.p_value <= P_VALUE / 2 and found.shift > MOVED.good


@pytest.mark.parametrize("draws", [25, 128])
def test_draws_of_the_posterior_are_left_alone(draws: int) -> None:
    problems = [Problem(seed) for seed in range(40)]
    assert sum(seen(each, exact(each, draws)) for each in problems) <= 2


def test_draws_that_resemble_their_neighbours_are_worth_fewer() -> None:
    """As those of a chain that is given as bare weights do."""
    count = 0
    for problem in map(Problem, range(40)):
        theta = exact(problem)
        slow = theta - theta.mean(0)
        for i in range(1, len(slow)):
            slow[i] = 0.8 * slow[i - 1] + 0.6 * slow[i]
        count += seen(problem, theta.mean(0) + slow)
    assert count <= 3


@pytest.mark.parametrize(
    ("away", "wider", "least", "most"),
    [
        (0.6, 1.0, 0.35, 0.9),
        (2.0, 1.0, 1.1, 1.8),
        (0.0, 0.5, 0.4, 1.0),
        (0.0, 2.0, 0.4, 1.0),
    ],
)
def test_draws_in_the_wrong_place_or_of_the_wrong_width_are_moved(
    away: float, wider: float, least: float, most: float
) -> None:
    problem = Problem(0)
    theta = exact(problem)
    mean, spread = theta.mean(0), theta - theta.mean(0)
    # along the leading direction, by which functions differ most
    way = torch.linalg.eigh(torch.cov(theta.T)).eigenvectors[:, -1]
    wrong = mean + wider * spread + away * (spread @ way).std() * way
    assert least < drift(problem.model, wrong, problem.x).shift < most
    told = bf.diagnose(problem.model, wrong)
    assert told.verdict == "do not trust"
    assert any(
        "transitions" in each.why and "refine" in each.next for each in told.draws.findings
    )


def test_what_stays_is_said_to_stay() -> None:
    problem = Problem(3)
    told = bf.diagnose(problem.model, exact(problem))
    assert told.verdict == "approximate: compare with an exact sampler"
    assert "leave alone" in told.headline
    assert told.draws.figures["drift"] < 0.4


def test_a_mean_field_posterior_is_seen_where_steins_identity_is_not() -> None:
    """The Gaussian of best fit has the posterior's mean, and its precisions one by one: averaged
    over weights its configurational temperature is 1, whatever correlations are lost.
    """
    x = normal(60, 1, seed=3) + torch.tensor([[4.0]], dtype=F64)
    model = bf.BayesianModel(
        built(lambda: nn.Linear(1, 1)),
        priors.Normal(),
        likelihoods.Gaussian(0.5),
        x,
        x[:, 0],
    )
    design = torch.cat([x, torch.ones_like(x)], 1)
    precision = design.T @ design / 0.25 + torch.eye(2, dtype=F64)
    mean = torch.linalg.solve(precision, design.T @ x[:, 0] / 0.25)
    theta = mean + normal(500, 2, seed=4) / precision.diag().sqrt()
    found = bf.diagnose(model, theta)
    assert found.draws.figures["temperature"] == pytest.approx(1, abs=0.15)
    assert found.verdict == "do not trust"
    assert found.draws.figures["drift"] > 0.4


def test_a_learned_noise_scale_that_is_off_is_seen() -> None:
    problem = Problem(2)
    model = bf.BayesianModel(
        problem.net(), priors.Normal(), likelihoods.Gaussian(), *problem.fitted
    )
    draws = bf.sample(
        model, bf.HMC(), chains=64, warmup=150, draws=8, seed=0, progress=False
    ).flat
    assert drift(model, draws, model.x).p_value > 0.01
    wider = draws.clone()
    wider[:, -1] += 0.1  # the logarithm of the scale
    assert bool(
        (
            model.likelihood_parameters(wider)["scale"]
            > 1.05 * model.likelihood_parameters(draws)["scale"]
        ).all()
    )
    assert drift(model, wider, model.x).shift > 0.5


def test_dear_gradients_are_not_taken(monkeypatch) -> None:
    """A network that shares weights costs more than it has of them."""
    images = normal(200, 1, 12, 12)
    net = built(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 1),
        )
    )
    model = bf.BayesianModel(
        net, priors.Normal(), likelihoods.Gaussian(0.5), images, images[:, 0, 0, 0]
    )
    monkeypatch.setattr(invariance, "refine", lambda *a, **k: pytest.fail("was moved"))
    assert drift(model, model.sample_prior(500, seed=0), images[:10]) is None
    problem = Problem(0)
    assert drift(problem.model, exact(problem, 15), problem.x) is None


def test_ctrl_c_is_not_swallowed(monkeypatch) -> None:
    problem = Problem(0)

    def interrupted(model, theta, *given, **named):
        moved = bf.refine(model, theta, 1, progress=False)
        moved.info["interrupted"] = True
        return moved

    monkeypatch.setattr(invariance, "refine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bf.diagnose(problem.model, exact(problem))


def test_a_classifier_is_judged_by_its_probabilities() -> None:
    """Draws of one output's bias from its prior change no probability; of the weights they do."""
    x = normal(80, 2, seed=5)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    model = bf.BayesianModel(
        built(lambda: nn.Linear(2, 3)),
        priors.Normal(),
        likelihoods.Categorical(),
        x,
        labels,
    )
    draws = bf.sample(
        model, bf.HMC(), chains=64, warmup=150, draws=8, seed=0, progress=False
    ).flat
    assert drift(model, draws, x).p_value > 0.01
    common = 5 * torch.randn(len(draws), 1, generator=generator(), dtype=F64)
    shifted = draws.clone()
    shifted[:, 6:] += common  # all biases alike
    assert drift(model, shifted, x).p_value > 0.01
    assert drift(model, model.sample_prior(512, seed=0), x).shift > 0.4


def test_a_learned_prior_s_map_counts_once_for_all_rows(monkeypatch) -> None:
    """Draws under one are moved too, and told from those of the prior."""
    model = perceptron()
    carried = model.transported(learned_prior(model))
    few = carried.subset(slice(0, 3))
    more = invariance._multiplications(carried) - invariance._multiplications(few)
    plain = invariance._multiplications(model)
    assert more == plain * (len(model.x) - 3) // len(model.x)
    assert invariance._multiplications(few) > 100 * plain
    found = drift(carried, carried.sample_prior(80, seed=0), model.x)
    assert found is not None
    assert found.shift > MOVED.bad
    monkeypatch.setattr(invariance, "_MAPPED", 1e5)
    assert drift(carried, carried.sample_prior(80, seed=0), model.x) is None
