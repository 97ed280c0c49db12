"""Predictions are mixtures over draws; every number here follows from that law."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.distributions import Normal

import bnnflow as bf
from bnnflow.draws import Draws
from bnnflow.model import BayesianModel, likelihoods
from bnnflow.predictive import metrics, predict

X = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
Y = torch.tensor([0.3, -0.2, 0.1, 0.8, -0.5], dtype=torch.float64)


def model_of(likelihood, outputs=1, y=Y, x=X):
    """A linear model: outputs = weight * x + bias, theta = (weights, biases, log scale if
    learned).
    """
    with torch.random.fork_rng(devices=[]):
        net = nn.Linear(x.shape[1], outputs).double()
    return BayesianModel(net, Normal(0.0, 1.0), likelihood, x, y)


def draws_of(model, n=7, seed=0):
    return model.sample_prior(n, seed)


def components(model, theta):
    """Means (draw, n) and standard deviations (draw, 1) of the mixture's components, by hand."""
    means = theta[:, :1] * X.T + theta[:, 1:2]
    scales = (
        theta[:, 2:3].exp()
        if theta.shape[1] == 3
        else torch.full_like(theta[:, :1], model.likelihood.scale)
    )
    return means.numpy(), scales.double().numpy()


@pytest.fixture(params=["fixed", "learned"])
def regression(request):
    scale = 0.3 if request.param == "fixed" else None
    return model_of(likelihoods.Gaussian(scale))


@pytest.fixture
def classes():
    y = torch.tensor([0, 1, 2, 1, 0])
    model = model_of(likelihoods.Categorical(), outputs=3, y=y)
    return model, draws_of(model, 11), y


# ---------------------------------------- the mixture


def test_log_prob_and_cdf_are_those_of_the_mixture(regression):
    theta = draws_of(regression)
    means, scales = components(regression, theta)
    prediction = predict(regression, theta, X)
    density = stats.norm.pdf(Y.numpy(), means, scales).mean(0)
    assert prediction.log_prob(Y).numpy() == pytest.approx(np.log(density), rel=1e-9)
    assert prediction.cdf(Y).numpy() == pytest.approx(
        stats.norm.cdf(Y.numpy(), means, scales).mean(0), rel=1e-9
    )


def test_log_prob_survives_where_densities_underflow(regression):
    theta = draws_of(regression)
    means, scales = components(regression, theta)
    far = Y + 200
    expected = np.logaddexp.reduce(
        stats.norm.logpdf(far.numpy(), means, scales), 0
    ) - math.log(len(theta))
    assert predict(regression, theta, X).log_prob(far).numpy() == pytest.approx(
        expected, rel=1e-9
    )


def test_law_of_total_variance(regression):
    theta = draws_of(regression)
    means, scales = components(regression, theta)
    p = predict(regression, theta, X)
    assert p.mean.numpy() == pytest.approx(means.mean(0), abs=1e-12)
    assert p.epistemic.numpy() == pytest.approx(means.std(0), abs=1e-12)
    assert p.aleatoric.numpy() == pytest.approx(
        np.sqrt((scales**2).mean(0).repeat(5)), rel=1e-9
    )
    assert torch.allclose(p.sd**2, p.epistemic**2 + p.aleatoric**2)


def test_epistemic_part_of_large_means_keeps_its_digits(regression):
    theta = draws_of(regression)
    theta[:, 1] += 1e7
    means, _ = components(regression, theta)
    assert predict(regression, theta, X).epistemic.numpy() == pytest.approx(
        means.std(0), rel=1e-6
    )


@pytest.mark.parametrize("spread", [1.0, 20.0, 1000.0])
def test_quantile_inverts_the_cdf(regression, spread):
    theta = draws_of(regression)
    theta[:, 1] *= spread  # components far apart: the cdf becomes a staircase
    p = predict(regression, theta, X)
    levels = [0.001, 0.05, 0.37, 0.5, 0.9, 0.999]
    found = p.quantile(levels)
    assert found.shape == (len(levels), 5)
    step = 1e-3 * p.sd  # the tolerance that is promised, whatever the mixture
    assert bool((found.diff(dim=0) > -step).all())
    for level, y in zip(levels, found, strict=True):
        assert bool((p.cdf(y - step) <= level + 1e-12).all())
        assert bool((p.cdf(y + step) >= level - 1e-12).all())
        if spread == 1:
            assert p.cdf(y).numpy() == pytest.approx(level, abs=1e-4)
    assert torch.equal(p.quantile(0.5), found[3])
    low, high = p.interval(0.9)
    assert torch.allclose(torch.stack([low, high]), p.quantile([0.05, 0.95]))


def test_samples_follow_the_mixture(regression):
    theta = draws_of(regression, 5)
    p = predict(regression, theta, X)
    y = p.sample(4000, seed=1)
    assert y.shape == (4000, 5)
    assert torch.equal(y, p.sample(4000, seed=1))
    for row in range(5):
        uniform = np.array([float(p.cdf(sample)[row]) for sample in y[:400]])
        assert stats.kstest(uniform, "uniform").pvalue > 1e-4


def test_samples_do_not_depend_on_chunks(regression):
    theta = draws_of(regression, 5)
    samples = [
        predict(regression, theta, X, chunk_size=size).sample(50, seed=3)
        for size in (1, 4, None)
    ]
    assert torch.allclose(samples[0], samples[1])
    assert torch.allclose(samples[0], samples[2])


def test_chunks_change_nothing(regression):
    theta = draws_of(regression, 13)
    whole, pieces = (
        predict(regression, theta, X),
        predict(regression, theta, X, chunk_size=4),
    )
    for what in ("mean", "sd", "epistemic", "aleatoric"):
        assert torch.allclose(getattr(whole, what), getattr(pieces, what), rtol=1e-10)
    assert torch.allclose(whole.log_prob(Y), pieces.log_prob(Y), rtol=1e-10)
    assert torch.allclose(
        whole.quantile([0.1, 0.9]), pieces.quantile([0.1, 0.9]), rtol=1e-8
    )


def test_weighted_draws_equal_repeated_draws(regression):
    theta = draws_of(regression, 3)
    repeated = theta[[0, 0, 0, 1]]
    # not normalised, one draw of weight zero
    weights = torch.tensor([3.0, 1.0, 0.0]).log() + 5
    chains = Draws(theta[None], torch.zeros(1, 3), log_weights=weights[None])
    for weighted in (
        predict(regression, (theta, weights), X),
        predict(regression, chains, X),
    ):
        plain = predict(regression, repeated, X)
        for what in ("mean", "sd", "epistemic"):
            assert torch.allclose(getattr(weighted, what), getattr(plain, what))
        assert torch.allclose(weighted.log_prob(Y), plain.log_prob(Y))
        assert torch.allclose(weighted.quantile(0.2), plain.quantile(0.2))
        assert metrics.crps(weighted, Y) == pytest.approx(metrics.crps(plain, Y), rel=1e-6)


def test_several_targets_and_heteroscedastic_noise():
    y = torch.stack([Y, -Y], 1)
    model = model_of(likelihoods.HeteroscedasticGaussian(), outputs=4, y=y)
    p = predict(model, draws_of(model), X)
    assert p.mean.shape == p.sd.shape == p.cdf(y).shape == (5, 2)
    assert p.quantile([0.1, 0.5, 0.9]).shape == (3, 5, 2)
    assert p.log_prob(y).shape == (5,)
    assert p.sample(6, seed=0).shape == (6, 5, 2)
    assert metrics.rowwise(p, y)["crps"].shape == (5,)
    # the joint density is a mixture of products, so marginals are checked through the cdf
    for target in range(2):
        below = torch.stack(
            [p.cdf(y + shift * torch.eye(2)[target])[:, target] for shift in (-50, 0, 50)]
        )
        assert bool((below.diff(dim=0) > 0).all())


def test_single_precision_models_agree_with_double():
    double = model_of(likelihoods.Gaussian(0.3))
    single = double.to(dtype=torch.float32)
    theta = draws_of(double)
    a, b = predict(double, theta, X), predict(single, theta.float(), X.float())
    assert torch.allclose(a.log_prob(Y), b.log_prob(Y.float()), atol=1e-5)
    assert b.mean.dtype == torch.float64


def test_classes_split_the_entropy(classes):
    model, theta, _ = classes
    p = predict(model, theta, X, chunk_size=3)
    probs = model.outputs(theta, X).softmax(-1)
    total = stats.entropy(probs.mean(0).numpy(), axis=-1)
    expected = stats.entropy(probs.numpy(), axis=-1).mean(0)
    assert torch.allclose(p.probs, probs.mean(0))
    assert p.probs.sum(-1).numpy() == pytest.approx(1)
    assert p.aleatoric.numpy() == pytest.approx(expected)
    assert p.epistemic.numpy() == pytest.approx(total - expected)
    assert torch.allclose(p.sd, probs.std(0, correction=0))


def test_log_prob_of_a_label_is_the_log_of_its_probability(classes):
    model, theta, y = classes
    p = predict(model, theta, X)
    assert torch.allclose(p.log_prob(y), p.probs.gather(1, y[:, None])[:, 0].log())
    frequencies = torch.nn.functional.one_hot(p.sample(20000, seed=0), 3).double().mean(0)
    assert (frequencies - p.probs).abs().max() < 5 * 0.5 / math.sqrt(20000)


def test_bernoulli_is_a_categorical_of_two():
    y = torch.tensor([0, 1, 1, 0, 1])
    bernoulli = model_of(likelihoods.Bernoulli(), y=y)
    categorical = model_of(likelihoods.Categorical(), outputs=2, y=y)
    theta = draws_of(bernoulli)
    zero = torch.zeros_like(theta[:, :1])
    both = torch.cat([zero, theta[:, :1], zero, theta[:, 1:]], 1)
    one, two = predict(bernoulli, theta, X), predict(categorical, both, X)
    assert torch.allclose(one.probs, two.probs)
    assert torch.allclose(one.log_prob(y), two.log_prob(y))


def test_a_likelihood_of_ones_own_needs_only_log_prob_and_mean():
    class LaplaceNoise:
        kind = "regression"
        parameters: dict = {}  # noqa: RUF012

        def validate(self, y, n_outputs):
            return y.reshape(len(y), -1)

        def log_prob(self, outputs, y, parameters):
            return (-(y - outputs).abs() - math.log(2)).sum(-1)

        def mean(self, outputs, parameters):
            return outputs

    model = model_of(LaplaceNoise())
    p = predict(model, draws_of(model), X)
    assert p.mean.shape == p.epistemic.shape == p.log_prob(Y).shape == (5,)
    with pytest.raises(ValueError, match="variance"):
        _ = p.sd
    with pytest.raises(ValueError, match="cdf"):
        p.cdf(Y)
    with pytest.raises(ValueError, match="sample"):
        p.sample(3, seed=0)


# ---------------------------------------- metrics


def test_scores_of_classes_by_hand():
    """Four rows whose probabilities are set through the biases of a network without inputs."""
    probs = torch.tensor([0.8, 0.2], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 0])
    x = torch.ones(4, 1, dtype=torch.float64)
    model = model_of(likelihoods.Categorical(), outputs=2, y=y, x=x)
    p = predict(model, torch.cat([torch.zeros(2, dtype=torch.float64), probs.log()]), x)
    assert metrics.accuracy(p, y) == 0.75
    assert metrics.brier(p, y) == pytest.approx((3 * 2 * 0.2**2 + 2 * 0.8**2) / 4)
    assert metrics.lppd(p, y) == pytest.approx((3 * math.log(0.8) + math.log(0.2)) / 4)
    assert metrics.ece(p, y) == pytest.approx(0.05)
    binned = metrics.reliability(p, y, bins=10)
    assert int(binned.rows[7]) == 4  # the bin (0.7, 0.8]
    assert int(binned.rows.sum()) == 4


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_every_confidence_falls_into_a_bin(bins):
    y = torch.tensor([0, 1, 0])
    x = torch.tensor([[0.0], [60.0], [-60.0]], dtype=torch.float64)
    model = model_of(likelihoods.Bernoulli(), y=y, x=x)
    # probabilities 1/2, 1 and 1 exactly
    p = predict(model, torch.tensor([20.0, 0.0], dtype=torch.float64), x)
    assert int(metrics.reliability(p, y, bins).rows.sum()) == 3
    assert metrics.ece(p, y, bins) == pytest.approx(0.5 / 3)


def test_crps_of_a_gaussian_is_its_closed_form():
    model = model_of(likelihoods.Gaussian(0.3))
    p = predict(model, torch.zeros(1, 2, dtype=torch.float64), X)
    for y in (Y, 10 * Y, 1e4 * Y):
        z = y.numpy() / 0.3
        closed = 0.3 * (
            z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi)
        )
        assert metrics.crps(p, y) == pytest.approx(closed.mean(), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_crps_of_a_mixture_is_its_integral(spread):
    model = model_of(likelihoods.Gaussian(0.3))
    theta = spread * draws_of(model, 4)
    means, scales = components(model, theta)

    def expected(y, row):
        def absolute(m, s):  # E|N(m, s^2)|
            return s * math.sqrt(2 / math.pi) * math.exp(
                -(m**2) / (2 * s**2)
            ) + m * math.erf(m / s / math.sqrt(2))

        centre, s = means[:, row], float(scales[0, 0])
        first = np.mean([absolute(m - y, s) for m in centre])
        second = np.mean(
            [absolute(a - b, s * math.sqrt(2)) for a in centre for b in centre]
        )
        return first - second / 2

    exact = np.mean([expected(float(Y[row]), row) for row in range(5)])
    p = predict(model, theta, X)
    assert metrics.crps(p, Y) == pytest.approx(exact, abs=1e-4 * float(p.sd.max()))
    direct, _ = integrate.quad(
        lambda z: (stats.norm.cdf(z, means[:, 0], 0.3).mean() - (z >= float(Y[0]))) ** 2,
        means[:, 0].min() - 4,
        means[:, 0].max() + 4,
        points=[float(Y[0])],
        limit=400,
    )
    assert float(metrics.rowwise(p, Y)["crps"][0]) == pytest.approx(
        direct, abs=1e-4 * float(p.sd.max())
    )


def test_rmse_and_rowwise_agree_with_the_means(regression):
    p = predict(regression, draws_of(regression), X)
    rows = metrics.rowwise(p, Y)
    assert metrics.rmse(p, Y) == pytest.approx(float((p.mean - Y).square().mean().sqrt()))
    assert metrics.lppd(p, Y) == pytest.approx(float(rows["log_prob"].mean()))
    assert metrics.crps(p, Y) == pytest.approx(float(rows["crps"].mean()))


def test_coverage_of_the_true_model_is_nominal():
    n = 2000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    model = model_of(likelihoods.Gaussian(0.3), x=X, y=Y)
    p = predict(model, model.sample_prior(50, seed=3), x)
    y = p.sample(n, seed=4).diagonal()  # independent rows, each with a draw of its own
    assert stats.kstest(metrics.pit(p, y).numpy(), "uniform").pvalue > 1e-3
    for level in (0.1, 0.5, 0.9):
        assert abs(metrics.coverage(p, y, level) - level) < 4 * math.sqrt(
            level * (1 - level) / n
        )
        low, high = p.interval(level)
        inside = ((y >= low) & (y <= high)).double().mean()
        assert metrics.coverage(p, y, level) == pytest.approx(float(inside), abs=1.01 / n)


def test_draws_of_a_conjugate_posterior_give_its_predictive_density():
    """Bayesian linear regression in closed form: N(X m, X S X^T + s^2)."""
    model = model_of(likelihoods.Gaussian(0.3))
    design = torch.cat([X, torch.ones_like(X)], 1).numpy()
    covariance = np.linalg.inv(design.T @ design / 0.09 + np.eye(2))
    mean = covariance @ design.T @ Y.numpy() / 0.09
    theta = torch.from_numpy(
        np.random.default_rng(0).multivariate_normal(mean, covariance, 40_000)
    )
    p = predict(model, theta, X)
    sd = np.sqrt((design @ covariance * design).sum(1) + 0.09)
    assert p.log_prob(Y).numpy() == pytest.approx(
        stats.norm.logpdf(Y.numpy(), design @ mean, sd), abs=0.01
    )
    assert p.quantile(0.95).numpy() == pytest.approx(
        stats.norm.ppf(0.95, design @ mean, sd), abs=0.01
    )


# ---------------------------------------- borders


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda m, t: predict(m, t[:, :1], X), "length"),
        (lambda m, t: predict(m, t[:0], X), "no draws"),
        (lambda m, t: predict(m, t * math.nan, X), "7 of 7 draws"),
        (lambda m, t: predict(m, t, X[:0]), "no rows"),
        (lambda m, t: predict(m, t, X * math.nan), "NaN"),
        (lambda m, t: predict(m, t, X, chunk_size=0), "chunk_size"),
        (lambda m, t: predict(m, (t, torch.full((7,), -math.inf)), X), "weight zero"),
        (lambda m, t: predict(m, (t, torch.full((7,), math.nan)), X), "NaN"),
        (lambda m, t: predict(m, (t, torch.zeros(6)), X), "6 log weights"),
        (lambda m, t: predict(m, t, X).quantile(1.0), "between 0 and 1"),
        (lambda m, t: predict(m, t, X).quantile([]), "between 0 and 1"),
        (lambda m, t: predict(m, t, X).interval(0.0), "between 0 and 1"),
        (lambda m, t: predict(m, t, X).probs, "classification"),
        (lambda m, t: predict(m, t, X).log_prob(Y[:3]), "3 rows"),
        (lambda m, t: predict(m, t, X).sample(0, seed=0), "at least 1"),
        (lambda m, t: metrics.accuracy(predict(m, t, X), Y), "classification"),
        (lambda m, t: metrics.coverage(predict(m, t, X), Y, 1.0), "between 0 and 1"),
    ],
)
def test_bad_input_is_refused_in_words(broken, message):
    model = model_of(likelihoods.Gaussian(0.3))
    with pytest.raises(ValueError, match=message):
        broken(model, draws_of(model))


def test_regression_is_not_asked_of_classes(classes):
    model, theta, y = classes
    p = predict(model, theta, X)
    for asked in (
        lambda: p.quantile(0.5),
        lambda: p.cdf(y),
        lambda: metrics.rmse(p, y),
        lambda: metrics.crps(p, y),
    ):
        with pytest.raises(ValueError, match="regression"):
            asked()
    with pytest.raises(ValueError, match="label 3"):
        metrics.accuracy(p, torch.tensor([0, 1, 3, 0, 0]))


def test_columns_of_a_frame_are_those_of_training():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        np.random.default_rng(0).normal(size=(9, 2)), columns=["a", "b"]
    )
    with torch.random.fork_rng(devices=[]):
        net = nn.Linear(2, 1).double()
    model = BayesianModel(
        net, Normal(0.0, 1.0), likelihoods.Gaussian(0.3), frame, frame["a"]
    )
    theta = model.sample_prior(3, seed=0)
    right = predict(model, theta, frame).mean
    assert torch.equal(predict(model, theta, frame.to_numpy()).mean, right)
    for wrong in (frame[["b", "a"]], frame.rename(columns={"a": "c"}), frame.assign(c=1.0)):
        with pytest.raises(
            ValueError, match="x must have the columns of training, 'a', 'b', got"
        ):
            predict(model, theta, wrong)


def test_a_prediction_that_keeps_its_outputs_says_the_same(seeded) -> None:
    """Of all rows and of some, by all draws and by some; the network is evaluated once."""
    with seeded(0):
        net = torch.nn.Sequential(
            torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)
        )
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(1))
    model = bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.HeteroscedasticGaussian(), x, x.sum(1)
    )
    theta = model.sample_prior(50, seed=0)
    rows = torch.tensor([3, 7, 8])
    for draws in (theta, (theta, theta[:, 0].double())):
        plain = bf.predict(model, draws, x)
        kept = plain.evaluated()
        assert kept.outputs is not None
        for change in (
            lambda p: p,
            lambda p: p.subset(rows),
            lambda p: p.thinned(20),
            lambda p: p.subset(rows).select(torch.tensor([4, 1])),
        ):
            a, b = change(plain), change(kept)
            assert torch.allclose(a.mean, b.mean, rtol=1e-6, atol=1e-6)
            assert torch.allclose(a.quantile(0.9), b.quantile(0.9), atol=1e-5)
            assert torch.equal(a.log_weights, b.log_weights)
            assert b.outputs is not None
            assert b.outputs.shape == (len(b.theta), len(b), 2)


def test_draws_that_are_chosen_count_alike(seeded) -> None:
    with seeded(0):
        net = torch.nn.Linear(1, 1)
    x = torch.linspace(-1, 1, 5)[:, None]
    model = bf.BayesianModel(net, bf.priors.Normal(), bf.likelihoods.Gaussian(0.1), x, x)
    theta = model.sample_prior(1000, seed=0)
    weights = 2 * theta[:, 0].double()
    whole = bf.predict(model, (theta, weights), x)
    some = whole.thinned(400)
    assert len(some.theta) == 400
    assert torch.allclose(some.log_weights.exp(), torch.full((400,), 1 / 400).double())
    error = whole.epistemic / 400**0.5
    assert bool(((some.mean - whole.mean).abs() < 3 * error).all())
    even = bf.predict(model, theta, x)
    assert even.thinned(1000) is even
    assert torch.equal(even.thinned(2).theta, theta[[0, 999]])
