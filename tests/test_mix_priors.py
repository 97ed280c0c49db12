"""A task under the mixture of a learned prior and a plain one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.comparison import PriorMixture
from bnnflow.predictive import prior_p_value
from bnnflow.transport import Flow, Solver
from tests.problems import F64, built, conjugate, normal
from tests.test_transported import Still, Wind

FEW = bf.SMC(particles=400, moves=3, max_leapfrog=8)
ROWS, NOISE = 5, 0.5


def line(by: float, rows: int = ROWS, seed: int = 0) -> bf.BayesianModel:
    """A linear model, y = by (1 + x) + noise, under N(0, 1)."""
    x = normal(rows, 1, seed=seed)
    net = built(lambda: torch.nn.Linear(1, 1), F64)
    y = by * (1 + x[:, 0]) + NOISE * normal(rows, seed=seed + 1)
    return bf.BayesianModel(net, priors.Normal(1.0), likelihoods.Gaussian(NOISE), x, y)


def shifted(model: bf.BayesianModel, by: float) -> Flow:
    """A flow whose push-forward is N(by, 1)."""
    wind = Wind(torch.full((2,), by, dtype=F64))
    return Flow.of(wind, model, solver=Solver("euler", 1))


def log_evidence(model: bf.BayesianModel, by: float) -> float:
    """Return that of the prior N(by, 1), in closed form."""
    design = torch.cat([model.x, torch.ones(len(model.x), 1, dtype=F64)], 1)
    covariance = design @ design.T + NOISE**2 * torch.eye(len(design), dtype=F64)
    law = torch.distributions.MultivariateNormal(by * design.sum(1), covariance)
    return float(law.log_prob(model.y[:, 0]))


@pytest.fixture(scope="module")
def model() -> bf.BayesianModel:
    return line(1.0)


@pytest.fixture(scope="module")
def mixed(model: bf.BayesianModel) -> PriorMixture:
    return bf.mix_priors(model, shifted(model, 2.0), 0.3, smc=FEW, progress=False)


def test_shares_are_those_of_the_evidences(
    model: bf.BayesianModel, mixed: PriorMixture
) -> None:
    learned, plain = (log_evidence(model, by) for by in (2.0, 0.0))
    factor, error = mixed.log_bayes_factor
    assert factor == pytest.approx(learned - plain, abs=5 * error)
    assert 0 < error < 0.2
    odds = 0.3 / 0.7 * math.exp(factor)
    assert mixed.probability == pytest.approx(odds / (1 + odds), rel=1e-9)
    right = np.logaddexp(math.log(0.3) + learned, math.log(0.7) + plain)
    assert mixed.log_evidence[0] == pytest.approx(right, abs=5 * mixed.log_evidence[1])
    assert 0 < mixed.log_evidence[1] <= error


def test_predictions_are_mixed_by_them(mixed: PriorMixture) -> None:
    x = torch.tensor([[-1.0], [0.5], [2.0]], dtype=F64)
    parts = [
        bf.predict(model, draws, x).mean
        for model, draws in zip(mixed.models, mixed.draws, strict=True)
    ]
    p = mixed.probability
    torch.testing.assert_close(mixed.predict(x).mean, p * parts[0] + (1 - p) * parts[1])
    assert len(mixed.predict()) == ROWS


def test_draws_that_are_there_are_taken(mixed: PriorMixture) -> None:
    prior = shifted(mixed.models[1], 2.0)
    again = bf.mix_priors(mixed.models[1], prior, 0.3, draws=mixed.draws)
    assert again.probability == mixed.probability
    assert again.draws == mixed.draws


@pytest.mark.parametrize(
    ("by", "factor", "error", "p_value", "family"),
    [
        (0.0, 1.0, 0.1, 0.4, "like"),
        (0.0, -2.9, 0.1, 0.4, "like"),
        (0.0, -3.1, 0.1, 0.4, "unlike"),
        (0.0, -3.1, 2.0, 0.4, "undecided"),
        (0.0, 1.0, 0.1, 0.01, "unlike"),
        (0.0, 5.0, 1.1, None, "undecided"),
    ],
)
def test_what_is_said_of_a_task(
    mixed: PriorMixture,
    by: float,
    factor: float,
    error: float,
    p_value: float | None,
    family: str,
) -> None:
    ours, theirs = mixed.draws
    told = replace(
        mixed,
        draws=(
            replace(ours, log_evidence=(factor, error)),
            replace(theirs, log_evidence=(0.0, 0.0)),
        ),
        p_value=p_value,
    )
    assert told.family == family
    text = {"like": "is like those", "unlike": "is not like", "undecided": "too uncertain"}
    assert text[family] in str(told)
    assert ("as unlikely" in str(told)) == (p_value is not None)
    assert family in repr(told)


def test_a_task_of_another_family_is_told() -> None:
    inside, outside = line(3.0), line(-3.0)
    like, unlike = (
        bf.mix_priors(each, shifted(each, 3.0), smc=FEW, progress=False)
        for each in (inside, outside)
    )
    assert (like.family, unlike.family) == ("like", "unlike")
    assert like.probability > 0.9 > 0.1 > unlike.probability
    of_inside, of_outside = (
        bf.diagnose(each.models[0], each.draws[0]).model for each in (like, unlike)
    )
    said = "not like those that the prior was learned from"
    assert said in str(of_outside)
    assert said not in str(of_inside)


def test_p_values_of_the_prior_s_own_data_are_uniform() -> None:
    """Whatever the number of draws that the evidence is estimated by."""
    blank = line(0.0)
    theta = blank.sample_prior(200, seed=1)
    y = blank.outputs(theta, blank.x)[..., 0] + NOISE * normal(200, ROWS, seed=2)
    found = torch.tensor(
        [
            prior_p_value(
                bf.BayesianModel(blank.net, blank.prior, blank.likelihood, blank.x, each),
                draws=20,
                replicates=49,
                seed=seed,
            )
            for seed, each in enumerate(y)
        ]
    )
    levels = torch.linspace(0.1, 0.9, 9)
    share = (found[:, None] <= levels).double().mean(0)
    assert bool(((share - levels).abs() < 4 * (levels * (1 - levels) / 200).sqrt()).all())


def test_p_values_of_the_evidence_in_closed_form() -> None:
    """Of a linear model the rank of y among data sets of the prior is known."""
    model = line(2.0)
    design = torch.cat([model.x, torch.ones(ROWS, 1, dtype=F64)], 1)
    covariance = design @ design.T + NOISE**2 * torch.eye(ROWS, dtype=F64)
    law = torch.distributions.MultivariateNormal(torch.zeros(ROWS, dtype=F64), covariance)
    own: Tensor = law.log_prob(model.y[:, 0])
    # the quadratic form of a normal law is chi-squared
    distance = -2 * (own - law.log_prob(law.mean))
    right = 1 - float(torch.special.gammainc(distance.new_tensor(ROWS / 2), distance / 2))
    found = prior_p_value(model, draws=4000, replicates=999)
    assert found == pytest.approx(right, abs=4 * (right * (1 - right) / 999) ** 0.5 + 0.01)


def test_classes_have_a_p_value_too() -> None:
    net = built(lambda: torch.nn.Linear(1, 2), F64)
    x = normal(8, 1)
    given = priors.Normal(1.0), likelihoods.Categorical()
    model = bf.BayesianModel(net, *given, x, (x[:, 0] > 0).long())
    assert 0.05 < prior_p_value(model) <= 1


def test_ctrl_c_is_not_swallowed(mixed: PriorMixture, monkeypatch) -> None:
    broken_off = replace(mixed.draws[0], info={"interrupted": True})
    monkeypatch.setattr("bnnflow.comparison.priors.sample", lambda *a, **k: broken_off)
    with pytest.raises(KeyboardInterrupt):
        bf.mix_priors(mixed.models[1], shifted(mixed.models[1], 2.0))


def test_bad_input_is_named(mixed: PriorMixture) -> None:
    learned, plain = mixed.draws
    model = mixed.models[1]
    prior = shifted(model, 2.0)
    with pytest.raises(ValueError, match="share"):
        bf.mix_priors(model, prior, 1.0)
    with pytest.raises(ValueError, match=r"draws\[1\] have no log_evidence"):
        bf.mix_priors(model, prior, draws=(learned, replace(plain, log_evidence=None)))
    with pytest.raises(ValueError, match="draws of another model"):
        bf.mix_priors(model, prior, draws=(plain, learned))
    cold = bf.BayesianModel(
        model.net, model.prior, model.likelihood, model.x, model.y, temperature=0.5
    )
    with pytest.raises(ValueError, match="temperature 1"):
        bf.mix_priors(cold, prior)
    other = conjugate().model
    with pytest.raises(ValueError, match="other weights"):
        bf.mix_priors(model, Flow.of(Still(), other))
