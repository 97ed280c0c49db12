"""Models are compared by rows that they have not seen, and nothing is called equal that is only
unknown.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow import likelihoods, metrics, priors
from bnnflow.comparison import pseudo_bma, stacking
from bnnflow.comparison.models import difference
from bnnflow.comparison.unseen import folds_of
from bnnflow.predictive import Prediction
from tests.problems import built, conjugate, generator, normal

NOISE, SCALE = 0.5, 1.5


def line(n=30, features=3, outlier=0.0, seed=1, temperature=1.0):
    """Linear regression with known noise."""
    g = generator(seed)
    x = torch.randn(n, features, generator=g, dtype=torch.float64)
    y = x.sum(1) + NOISE * torch.randn(n, generator=g, dtype=torch.float64)
    y[0] += outlier
    x[0] *= 1 + (outlier != 0)
    net = built(lambda: nn.Linear(features, 1))
    parts = priors.Normal(SCALE), likelihoods.Gaussian(NOISE)
    return bf.BayesianModel(net, *parts, x, y, temperature=temperature)


def posterior(model, rows=slice(None)):
    """Mean and covariance of the weights given some rows."""
    x, y = model.x[rows], model.y[rows, 0]
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    eye = torch.eye(design.shape[1], dtype=x.dtype)
    covariance = torch.linalg.inv(design.T @ design / NOISE**2 + eye / SCALE**2)
    return covariance @ design.T @ y / NOISE**2, model.temperature * covariance


def exact_draws(model, n=4000, seed=0):
    mean, covariance = posterior(model)
    noise = torch.randn(n, len(mean), generator=generator(seed), dtype=torch.float64)
    theta = mean + noise @ torch.linalg.cholesky(covariance).T
    return bf.Draws(theta[None], model.log_joint(theta)[None])


def predictive(model, left_out, row):
    """The exact log predictive density of a row without some rows."""
    rest = torch.tensor([i for i in range(len(model.x)) if i not in set(left_out)])
    mean, covariance = posterior(model, rest)
    at = torch.cat([model.x[row], torch.ones(1, dtype=torch.float64)])
    sd = (NOISE**2 + at @ covariance @ at).sqrt()
    return float(torch.distributions.Normal(at @ mean, sd).log_prob(model.y[row, 0]))


def exact_loo(model):
    return torch.tensor([predictive(model, [row], row) for row in range(len(model.x))])


# ---------------------------------------- leave one out


def test_leave_one_out_of_a_linear_model_is_exact():
    model = line()
    score = bf.compare({"line": (model, exact_draws(model))}).scores["line"]
    exact = exact_loo(model)
    assert (score.pointwise - exact).abs().max() < 0.1
    assert score.elpd == pytest.approx(float(exact.sum()), abs=0.2)
    assert score.se == pytest.approx(math.sqrt(30) * float(exact.std()), rel=0.02)
    assert score.khat.max() < 0.7
    assert score.refitted == score.unresolved == ()
    seen = bf.predict(model, exact_draws(model)).log_prob(model.y).sum()
    assert score.p_loo == pytest.approx(float(seen - exact.sum()), abs=0.2)
    assert 2 < score.p_loo < 5  # of four weights


def test_a_row_that_weights_cannot_leave_out_is_left_out_exactly():
    model = line(outlier=4.0)
    draws, exact = exact_draws(model), exact_loo(model)
    raw = bf.compare({"line": (model, draws)}, refits=0)
    weighed = raw.scores["line"]
    assert weighed.khat[0] > 0.7
    assert weighed.refitted == ()
    assert "are not to be relied on" in str(raw)
    found = bf.compare({"line": (model, draws)}, progress=False)
    score = found.scores["line"]
    assert 0 in score.refitted
    assert score.refitted == weighed.unresolved
    assert score.unresolved == ()
    assert "predicted by draws without them" in str(found)
    assert (score.pointwise - exact).abs().max() < 0.3
    assert (weighed.pointwise - exact).abs().max() > 1
    assert torch.equal(score.pointwise[1:7], weighed.pointwise[1:7])
    one = bf.compare({"line": (model, draws)}, refits=1).scores["line"]
    assert one.refitted == (0,)
    assert set(one.unresolved) == set(score.refitted) - {0}


def test_tempered_draws_are_those_of_the_tempered_posterior_of_the_rest():
    model = line(temperature=0.5, outlier=2.0)
    score = bf.compare({"cold": (model, exact_draws(model))}).scores["cold"]
    exact = exact_loo(model)
    assert (score.pointwise - exact).abs().max() < 0.15
    assert score.log_evidence is None


def test_weighted_draws_count_by_their_weights():
    model = line()
    mean, covariance = posterior(model)
    wide = bf.Gaussian(mean, 1.3 * torch.linalg.cholesky(covariance))
    theta = wide.sample(20_000, 0)
    log_weights = model.log_joint(theta) - wide.log_prob(theta)
    draws = bf.Draws(
        theta[None], model.log_joint(theta)[None], log_weights=log_weights[None]
    )
    score = bf.compare({"weighted": (model, draws)}).scores["weighted"]
    assert (score.pointwise - exact_loo(model)).abs().max() < 0.1
    approximate = replace(draws, log_weights=None, posterior=wide, info={"method": "VI"})
    other = bf.compare({"known density": (model, approximate)}).scores["known density"]
    assert (other.pointwise - exact_loo(model)).abs().max() < 0.1


@pytest.mark.parametrize(
    ("known", "message"), [(False, "of no posterior"), (True, "too far from")]
)
def test_draws_of_something_else_are_refused_by_name(known, message):
    model = line()
    mean, covariance = posterior(model)
    beside = bf.Gaussian(mean + 1, torch.linalg.cholesky(covariance))
    theta = beside.sample(1000, 0)
    given = beside if known else None
    info = {"method": "DeepEnsemble"}
    draws = bf.Draws(theta[None], model.log_joint(theta)[None], posterior=given, info=info)
    with pytest.raises(ValueError, match=f"mine: .*{message}.*bf.refine"):
        bf.compare({"mine": (model, draws)})


# ---------------------------------------- folds


def test_folds_of_a_linear_model_are_exact():
    model = line()
    made = bf.compare({"line": (model, exact_draws(model))}, folds=5, seed=3)
    exact = torch.empty(30, dtype=torch.float64)
    for rows in folds_of(30, 5, 3):
        for row in rows.tolist():
            exact[row] = predictive(model, rows.tolist(), row)
    score = made.scores["line"]
    assert (score.pointwise - exact).abs().max() < 0.2
    assert score.elpd == pytest.approx(float(exact.sum()), abs=0.5)
    assert score.khat is None
    assert score.p_loo is None
    assert made.criterion == "5-fold cross-validation"


def test_folds_of_an_approximation_go_by_its_weights():
    """Laplace is the posterior of a linear model."""
    model = line()
    draws = bf.sample(model, bf.Laplace(), draws=4000, seed=0)
    compared = bf.compare({"Laplace": (model, draws)}, folds=5, seed=0)
    for rows in folds_of(30, 5, 0):
        for row in rows.tolist():
            right = predictive(model, rows.tolist(), row)
            assert abs(float(compared.scores["Laplace"].pointwise[row]) - right) < 0.15


def test_nine_draws_are_too_few_to_be_carried():
    model = line(outlier=8.0)
    draws = exact_draws(model, 9)
    with pytest.raises(ValueError, match="nine: folds need at least 10 draws"):
        bf.compare({"nine": (model, draws)}, folds=5)
    assert bf.compare({"nine": (model, draws)}).scores["nine"].unresolved


def test_folds_may_be_fitted_by_the_caller():
    model = line()
    sizes = []

    def refit(part):
        sizes.append(len(part.x))
        return exact_draws(part, n=500)

    draws = replace(exact_draws(model, 100), info={"method": "DeepEnsemble"})
    bf.compare({"line": (model, draws)}, folds=7, refit={"line": refit})
    assert sorted(sizes) == [25] * 2 + [26] * 5
    with pytest.raises(ValueError, match=r"line: .*of no posterior"):
        bf.compare({"line": (model, draws)}, folds=7)
    with pytest.raises(TypeError, match="refit of line must return Draws"):
        bf.compare({"line": (model, draws)}, folds=7, refit={"line": lambda part: part.x})


@pytest.mark.parametrize(("n", "folds"), [(10, 2), (10, 3), (7, 7)])
def test_every_row_is_in_one_fold(n, folds):
    parts = folds_of(n, folds, 0)
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# ---------------------------------------- weights of models


def best_by_grid(values):
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    mixed = torch.logaddexp(
        values[:, :1] + grid.log(), values[:, 1:] + torch.log1p(-grid)
    ).sum(0)
    return float(grid[mixed.argmax()])


@pytest.mark.parametrize("seed", range(5))
def test_stacking_maximises_the_log_score(seed):
    values = 2 * normal(40, 2, seed=seed)
    assert float(stacking(values)[0]) == pytest.approx(best_by_grid(values), abs=1e-4)


@pytest.mark.parametrize("models", [1, 2, 5, 12])
def test_stacking_weights_are_a_maximum_under_their_constraints(models):
    """At the maximum the mean ratio of a model's density to the mixture's is one for all models in
    use, and below one for the others.
    """
    values = normal(60, models, seed=models) + torch.linspace(
        0, 1, models, dtype=torch.float64
    )
    weights = stacking(values - 1000)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert (weights >= 0).all()
    mixture = (values + weights.log()).logsumexp(1, keepdim=True)
    slopes = (values - mixture).exp().mean(0)
    assert slopes.max() < 1 + 1e-4
    assert (slopes[weights > 1e-3] - 1).abs().max() < 1e-3


def test_two_models_that_are_half_right_beat_each_together():
    density = torch.full((40, 2), -5.0, dtype=torch.float64)
    density[:20, 0] = density[20:, 1] = -1.0
    weights = stacking(density)
    torch.testing.assert_close(weights, torch.full((2,), 0.5, dtype=torch.float64))
    together = (density + weights.log()).logsumexp(1).sum()
    assert together > density.sum(0).max() + 40


def test_pseudo_bma_weights_are_cautious():
    values = normal(50, 2, seed=1)
    values[:, 0] += 0.2
    weights = pseudo_bma(values, seed=2)
    assert float(weights.sum()) == pytest.approx(1)
    sharp = values.sum(0).softmax(0)
    assert 0.5 < weights[0] < sharp[0]
    assert torch.equal(weights, pseudo_bma(values, seed=2))
    with pytest.raises(ValueError, match="log_densities"):
        pseudo_bma(values[:, 0])
    with pytest.raises(ValueError, match="log_densities"):
        stacking(values.log())


# ---------------------------------------- what is said


def test_identical_models_are_equal():
    model = line()
    draws = exact_draws(model)
    made = bf.compare({"a": (model, draws), "b": (model, draws)})
    assert made.scores["a"].difference.standing == "best"
    assert made.scores["b"].difference.standing == "equal"
    assert made.scores["b"].difference.elpd == 0
    assert sum(made.weights.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("gap", "spread", "n", "standing"),
    [
        (0.0, 0.01, 100, "equal"),
        (-0.01, 0.01, 100, "equal"),
        (-1.0, 0.1, 100, "worse"),
        (-0.05, 0.01, 100, "worse"),
        (-0.01, 1.0, 100, "undecided"),
        (-0.1, 1.0, 100, "undecided"),
        (-1.0, 0.0, 1, "undecided"),
    ],
)
def test_a_wide_interval_is_not_equality(gap, spread, n, standing):
    best = normal(n, seed=1)
    noise = normal(n, seed=2)
    noise = (noise - noise.mean()) / noise.std() if n > 1 else noise
    found = difference(best + gap + spread * noise, best, 4.0)
    assert found.standing == standing
    assert difference(best, best, 4.0).standing == "best"


def test_a_wrong_model_is_worse_and_gets_no_weight():
    model = line(60)
    blind = bf.BayesianModel(
        built(lambda: nn.Linear(1, 1)),
        model.prior,
        model.likelihood,
        model.x[:, :1],
        model.y,
    )
    fitted = {"blind": (blind, exact_draws(blind)), "right": (model, exact_draws(model))}
    made = bf.compare(fitted)
    assert made.best == "right"
    assert list(made.scores) == ["right", "blind"]
    assert made.scores["blind"].difference.standing == "worse"
    assert made.weights["blind"] < 0.05
    text = str(made)
    assert "(worse)" in text
    assert text.startswith("PSIS leave-one-out; equal: 95% of the difference within 4 nats")
    assert json.loads(json.dumps(made.to_dict()))["best"] == "right"
    assert repr(made).startswith("ModelComparison(")
    prediction = made.predict({"right": model.x, "blind": model.x[:, :1]})
    assert isinstance(prediction, Prediction)
    assert metrics.lppd(prediction, model.y) == pytest.approx(
        metrics.lppd(bf.predict(*fitted["right"]), model.y), abs=0.05
    )
    with pytest.raises(ValueError, match="x has no rows for right"):
        made.predict({"blind": model.x[:, :1]})


def test_evidences_stand_side_by_side_with_their_errors():
    problem = conjugate()
    draws = bf.sample(problem.model, bf.SMC(particles=500), seed=0, progress=False)
    plain = bf.Draws(problem.posterior.sample(1000, 0)[None], torch.zeros(1, 1000))
    made = bf.compare({"smc": (problem.model, draws), "exact": (problem.model, plain)})
    value, error = made.scores["smc"].log_evidence
    assert abs(value - problem.log_normaliser) < 4.5 * error
    assert made.scores["exact"].log_evidence is None
    assert made.to_dict()["models"]["smc"]["log_evidence"] == (value, error)
    assert f"{value:.2f} ± {error:.2f}" in str(made)


# ---------------------------------------- refusals


def test_other_data_are_refused_by_name():
    model = line()
    good = model, exact_draws(model, 100)
    shorter = model.subset(slice(0, 20))
    shifted = bf.BayesianModel(
        model.net, model.prior, model.likelihood, model.x, model.y + 1
    )
    turned = bf.BayesianModel(
        model.net, model.prior, model.likelihood, model.x.flip(0), model.y.flip(0)
    )
    for other in (shorter, shifted, turned):
        with pytest.raises(
            ValueError, match="second and first are models of other targets"
        ):
            bf.compare({"first": good, "second": (other, exact_draws(other, 100))})
    net = built(lambda: nn.Linear(3, 1))
    counts = bf.BayesianModel(
        net, model.prior, likelihoods.Poisson(), model.x, model.y.abs().floor()
    )
    theta = counts.sample_prior(50, 0)
    draws = bf.Draws(theta[None], counts.log_joint(theta)[None])
    with pytest.raises(ValueError, match="probabilities of counts and densities"):
        bf.compare({"first": good, "second": (counts, draws)})


def test_arguments_are_checked_by_name():
    model = line()
    pair = model, exact_draws(model, 100)
    with pytest.raises(ValueError, match="at least one model"):
        bf.compare({})
    with pytest.raises(TypeError, match=r"models\['a'\]"):
        bf.compare({"a": model})
    with pytest.raises(ValueError, match="refit names 'b'"):
        bf.compare({"a": pair}, folds=2, refit={"b": exact_draws})
    with pytest.raises(ValueError, match="with folds only"):
        bf.compare({"a": pair}, refit={"a": exact_draws})
    with pytest.raises(ValueError, match="folds must be between 2"):
        bf.compare({"a": pair}, folds=31)
    with pytest.raises(ValueError, match="margin"):
        bf.compare({"a": pair}, margin=0)
    other = replace(pair[1], info={"model": "2:abc"})
    with pytest.raises(ValueError, match="a: these are draws of another model"):
        bf.compare({"a": (model, other)})
    with pytest.raises(ValueError, match="not fitted"):
        bf.compare({"a": bf.BayesianMLPRegressor()})


def test_estimators_compare_and_predict_tables():
    x = normal(30, 2, seed=1).numpy()
    y = 900 + 50 * x[:, 0] + 50 * normal(30, seed=2).numpy()
    sizes = {"network": (3,), "method": bf.SMC(particles=100), "n_draws": 200}
    fitted = {
        name: bf.BayesianMLPRegressor(likelihood=name, **sizes).fit(x, y)
        for name in ("normal", "student")
    }
    made = bf.compare(fitted, refits=0, progress=False)
    prediction = made.predict(x[:5])
    assert len(prediction) == 5
    mixed = sum(
        weight * fitted[name].predict(x[:5]) for name, weight in made.weights.items()
    )
    np.testing.assert_allclose(prediction.mean, mixed)
