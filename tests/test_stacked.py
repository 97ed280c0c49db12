"""A mixture of models is a prediction: everything that it says follows from its parts."""

import pytest
import torch
from torch import nn

from bnnflow import BayesianModel, likelihoods, metrics, predict, priors
from bnnflow.predictive import Prediction, Stacked, stacked
from tests.problems import built, chain, normal

LIKELIHOODS = {
    "normal": (lambda: likelihoods.Gaussian(0.3), 1, lambda x: x.sum(1)),
    "varying": (lambda: likelihoods.HeteroscedasticGaussian(), 2, lambda x: x.sum(1)),
    "student": (lambda: likelihoods.StudentT(), 1, lambda x: x.sum(1)),
    "lognormal": (
        lambda: likelihoods.LogNormal(likelihoods.Gaussian(0.3)),
        1,
        lambda x: x.sum(1).exp(),
    ),
    "several": (lambda: likelihoods.Gaussian(0.3), 2, lambda x: x),
    "poisson": (lambda: likelihoods.Poisson(), 1, lambda x: torch.arange(len(x)) % 5),
    "negative": (
        lambda: likelihoods.NegativeBinomial(),
        1,
        lambda x: torch.arange(len(x)) % 5,
    ),
    "classes": (lambda: likelihoods.Categorical(), 3, lambda x: torch.arange(len(x)) % 3),
    "ordered": (lambda: likelihoods.Ordinal(3), 1, lambda x: torch.arange(len(x)) % 3),
}
MIXTURES = [
    ("normal", "varying"),
    ("student", "normal"),
    ("lognormal", "lognormal"),
    ("lognormal", "normal"),
    ("several", "several"),
    ("poisson", "negative"),
    ("classes", "ordered"),
]
X = 0.5 * normal(12, 2, seed=1)


def part(kind, width, draws):
    likelihood, outputs, targets = LIKELIHOODS[kind]
    net = built(lambda: chain(2, width, outputs, activation=nn.Tanh))
    model = BayesianModel(net, priors.Normal(0.5), likelihood(), X, targets(X))
    return predict(model, model.sample_prior(draws, seed=width), X)


@pytest.fixture(params=MIXTURES, ids="-".join)
def mixture(request):
    first, second = request.param
    parts = part(first, 3, 40), part(second, 5, 70)
    return stacked(parts, torch.tensor([0.3, 0.7])), parts, LIKELIHOODS[first][2](X)


def test_densities_and_moments_are_those_of_the_mixture(mixture):
    made, (a, b), y = mixture
    assert isinstance(made, Stacked)
    assert isinstance(made, Prediction)
    assert repr(made).startswith("Stacked(n=12, models=2, draws=110")
    torch.testing.assert_close(made.weights, torch.tensor([0.3, 0.7], dtype=torch.float64))
    density = 0.3 * a.log_prob(y).exp() + 0.7 * b.log_prob(y).exp()
    torch.testing.assert_close(made.log_prob(y), density.log())
    torch.testing.assert_close(made.mean, 0.3 * a.mean + 0.7 * b.mean)
    if made.kind == "classification":
        torch.testing.assert_close(made.probs, 0.3 * a.probs + 0.7 * b.probs)
        torch.testing.assert_close(made.aleatoric, 0.3 * a.aleatoric + 0.7 * b.aleatoric)
        assert metrics.brier(made, y) <= 0.3 * metrics.brier(a, y) + 0.7 * metrics.brier(
            b, y
        )
        return
    second = 0.3 * (a.sd**2 + a.mean**2) + 0.7 * (b.sd**2 + b.mean**2)
    torch.testing.assert_close(made.sd, (second - made.mean**2).sqrt())
    torch.testing.assert_close(made.sd**2, made.epistemic**2 + made.aleatoric**2)
    at = a.quantile(0.6)
    torch.testing.assert_close(made.cdf(at), 0.3 * a.cdf(at) + 0.7 * b.cdf(at))


def test_quantiles_invert_the_mixture(mixture):
    made, _, y = mixture
    if made.kind == "classification":
        with pytest.raises(ValueError, match="defined for regression"):
            made.quantile(0.5)
        return
    for level in (0.05, 0.5, 0.99):
        found = made.quantile(level)
        if made.discrete:
            assert (made.cdf(found) >= level).all()
            assert (made.cdf(found - 1) < level).all()
        else:
            torch.testing.assert_close(
                made.cdf(found), torch.full_like(found, level), atol=1e-4, rtol=0
            )
    together = made.quantile([0.05, 0.5, 0.99])
    assert torch.equal(together[1], made.quantile(0.5))
    assert (made.interval(0.9)[0] <= made.interval(0.5)[0]).all()
    assert 0 <= metrics.coverage(made, y, 0.9) <= 1
    assert metrics.crps(made, y) > 0


def test_samples_come_from_the_mixture(mixture):
    made, parts, _ = mixture
    drawn = made.sample(6000, seed=1)
    assert torch.equal(drawn[:5], made.sample(6000, seed=1)[:5])
    if made.kind == "classification":
        share = (drawn == 1).double().mean(0)
        sd = (made.probs[:, 1] * (1 - made.probs[:, 1])).sqrt()
        assert ((share - made.probs[:, 1]).abs() / (sd / 6000**0.5)).max() < 4.5
        return
    middle = parts[0].quantile(0.5)
    below = made.cdf(middle)
    share = (drawn <= middle).double().mean(0)
    assert ((share - below).abs() / (below * (1 - below) / 6000).sqrt()).max() < 4.5


def test_functions_and_weights_stand_side_by_side(mixture):
    made, _, _ = mixture
    functions = torch.cat(list(made.functions()))
    assert len(functions) == len(made.log_weights) == 110
    mean = torch.tensordot(made.log_weights.exp(), functions, 1)
    torch.testing.assert_close(mean.reshape(made.mean.shape), made.mean)


def test_one_model_alone_is_itself():
    a, b = part("normal", 3, 40), part("normal", 5, 70)
    alone = stacked([a, b], torch.tensor([2.0, 0.0]))
    assert torch.equal(alone.mean, a.mean)
    torch.testing.assert_close(alone.quantile([0.1, 0.9]), a.quantile([0.1, 0.9]))
    assert torch.equal(alone.sample(50, seed=3), a.sample(50, seed=3))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5], "one for each prediction"),
        ([1.5, -0.5], "negative"),
        ([0.0, 0.0], "zero"),
        ([float("nan"), 1.0], "negative"),
    ],
)
def test_weights_that_are_none_are_refused(weights, message):
    parts = part("normal", 3, 10), part("normal", 5, 10)
    with pytest.raises(ValueError, match=message):
        stacked(parts, torch.tensor(weights))


@pytest.mark.parametrize("other", ["classes", "poisson", "several"])
def test_predictions_of_other_targets_are_refused(other):
    with pytest.raises(ValueError, match="the same kind of targets"):
        stacked([part("normal", 3, 10), part(other, 3, 10)], torch.ones(2))


def test_predictions_of_other_rows_are_refused():
    a, b = part("normal", 3, 10), part("normal", 5, 10)
    with pytest.raises(ValueError, match="the same rows"):
        stacked([a, predict(b.model, b.theta, X[:5])], torch.ones(2))
