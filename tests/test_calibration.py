"""Class probabilities that are as sure as rows that were left out say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.calibration import Calibration
from bnnflow.predictive import Calibrated, calibrate, stacked

F64 = torch.float64
SURER = Calibration((1.0, 3.0), (0.25, 0.75), 2.0, 1.0)


def logits(n: int, classes: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, classes, generator=g, dtype=F64)


def labelled(log_probs: Tensor, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.multinomial(log_probs.exp(), 1, generator=g).squeeze(1)


# ---------------------------------------- powers


@pytest.mark.parametrize("power", [0.5, 1.5, 2.5])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_power_that_labels_were_made_by_is_found(power: float, classes: int) -> None:
    true = logits(2000, classes, 0)
    labels = labelled(true.log_softmax(-1), 1)
    found = Calibration.learned((true / power).log_softmax(-1), labels)
    assert found is not None
    assert found.gain > 3 * found.error
    assert abs(found.power / power - 1) < 0.15


def test_probabilities_that_are_right_are_left_alone() -> None:
    """A gain above its standard error comes by chance, and is small then."""
    given = [logits(150, 3, seed).log_softmax(-1) for seed in range(40)]
    found = [
        Calibration.learned(each, labelled(each, 100 + seed))
        for seed, each in enumerate(given)
    ]
    changed = [each for each in found if each is not None]
    assert len(changed) <= 12
    assert all(0.6 < each.power < 1.7 for each in changed)


def test_rows_that_are_all_right_make_nobody_certain() -> None:
    log_probs = torch.tensor([[0.9, 0.1]] * 50, dtype=F64).log()
    found = Calibration.learned(log_probs, torch.zeros(50, dtype=torch.long))
    assert found is not None
    assert 0.9 < float(found(log_probs)[0, 0].exp()) < 0.999


def test_classes_have_no_order_and_one_row_is_enough() -> None:
    log_probs = logits(60, 4, 0).log_softmax(-1)
    labels, order = labelled(2 * log_probs.log_softmax(-1), 1), torch.tensor([2, 0, 3, 1])
    one = Calibration.learned(log_probs, labels)
    other = Calibration.learned(log_probs[:, order], order.argsort()[labels])
    assert one is not None
    assert other is not None
    np.testing.assert_allclose(one.weights, other.weights, rtol=1e-9)
    assert Calibration.learned(log_probs[:1], labels[:1]) is None


def test_a_calibrated_probability_is_the_mean_over_powers() -> None:
    probs = logits(7, 3, 0).softmax(-1)
    cubes = probs**3 / (probs**3).sum(-1, keepdim=True)
    torch.testing.assert_close(SURER(probs.log()).exp(), 0.25 * probs + 0.75 * cubes)
    assert SURER.power == 2.5
    certain = torch.tensor([[0.0, -torch.inf]], dtype=F64)
    assert SURER(certain).exp().tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    "change",
    [{"powers": [1.0]}, {"powers": [0.0, 3.0]}, {"weights": [0.5, 0.7]}],
    ids=str,
)
def test_a_description_that_is_none_is_refused(change: dict[str, list[float]]) -> None:
    plain = SURER.describe()
    assert Calibration.from_description(plain) == SURER
    with pytest.raises(ValueError, match="positive powers whose weights sum to one"):
        Calibration.from_description(plain | change)


# ---------------------------------------- predictions


def model_of(likelihood: likelihoods.Likelihood, outputs: int) -> bf.BayesianModel:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=g, dtype=F64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long() * (outputs != 1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    return bf.BayesianModel(net, priors.Normal(), likelihood, x, y)


LIKELIHOODS = {
    "categorical": (likelihoods.Categorical(), 3),
    "bernoulli": (likelihoods.Bernoulli(), 1),
    "ordinal": (likelihoods.Ordinal(3), 1),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_draw_moves_along_with_the_mean(name: str) -> None:
    model = model_of(*LIKELIHOODS[name])
    plain = bf.Draws(model.sample_prior(30, 0).unsqueeze(0), torch.zeros(1, 30, dtype=F64))
    draws = replace(plain, calibration=SURER)
    before, after = bf.predict(model, plain), bf.predict(model, draws)
    assert isinstance(after, Calibrated)
    assert not isinstance(before, Calibrated)
    expected = SURER(before.probs.log()).exp()
    torch.testing.assert_close(after.probs, expected)
    each = torch.cat(list(after.functions()))
    torch.testing.assert_close(each.mean(0), expected)
    torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:2], dtype=F64))
    assert (each >= 0).all()
    log_prob = expected.log().gather(1, model.y.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(after.log_prob(model.y), log_prob)
    total = torch.special.entr(expected).sum(-1)
    torch.testing.assert_close(after.epistemic + after.aleatoric, total)
    drawn = torch.nn.functional.one_hot(after.sample(4000, 0), expected.shape[1])
    assert float((drawn.double().mean(0) - expected).abs().max()) < 0.04
    both = stacked([before, after], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(both.probs, 0.5 * (before.probs + expected))


def test_a_file_keeps_the_calibration(tmp_path: Path) -> None:
    draws = bf.Draws(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=F64))
    assert bf.load(draws.save(tmp_path / "plain.npz")).calibration is None
    draws = replace(draws, calibration=SURER)
    found = bf.load(draws.save(tmp_path / "draws.npz")).calibration
    assert found.powers == SURER.powers
    assert found.weights == SURER.weights


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_are_weighed_as_if_rows_were_left_out(
    monkeypatch, temperature: float
) -> None:
    """Two parameters on a grid: the draws without a row are known."""
    x = torch.tensor([[-2.0], [-0.3], [0.1], [0.4], [1.5]], dtype=F64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Linear(1, 1).double()
    y = torch.tensor([0, 1, 0, 1, 1])
    model = bf.BayesianModel(
        net, priors.Normal(), likelihoods.Bernoulli(), x, y, temperature=temperature
    )
    grid = torch.cartesian_prod(*2 * [torch.linspace(-5, 5, 161, dtype=F64)])
    weights = model.log_joint(grid).softmax(0)
    chosen = torch.multinomial(
        weights, 4000, True, generator=torch.Generator().manual_seed(0)
    )
    theta = grid[chosen].unsqueeze(0)
    draws = bf.Draws(theta, model.log_joint(theta))
    expected = []
    for row in range(5):
        rest = model.subset((torch.arange(5) != row).nonzero().squeeze(1))
        without = rest.log_joint(grid).softmax(0)
        expected.append(without @ model.outputs(grid, x[row : row + 1])[:, 0, 0].sigmoid())
    seen: list[Tensor] = []
    monkeypatch.setattr(
        Calibration, "learned", lambda log_probs, labels: seen.append(log_probs)
    )
    calibrate(model, draws)
    torch.testing.assert_close(
        seen[0][:, 1].exp(), torch.stack(expected), atol=0.03, rtol=0
    )


# ---------------------------------------- the estimator


@pytest.fixture(scope="module")
def clean() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Many inputs, few rows, labels without noise: a posterior average is too unsure."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(700, 8))
    y = np.array(["left", "right"])[(x[:, :3].sum(1) > 0).astype(int)]
    return x[:200], y[:200], x[200:], y[200:]


def test_a_classifier_that_is_too_unsure_becomes_surer(clean, tmp_path: Path) -> None:
    x, y, x_new, y_new = clean
    fitted = bf.BayesianMLPClassifier((8,), budget=1e-6).fit(x, y)
    calibration = fitted.draws_.calibration
    assert calibration is not None
    assert calibration.power > 1.2
    assert fitted.calibration_ == str(calibration)
    probs = fitted.predict_proba(x_new)
    plain = bf.predict(
        fitted._wide, replace(fitted.draws_, calibration=None), fitted._encoded(x_new)
    ).probs.numpy()
    assert (probs.argmax(1) == plain.argmax(1)).mean() > 0.99
    right = np.arange(len(y_new)), np.searchsorted(fitted.classes_, y_new)
    assert -np.log(probs[right]).mean() < -np.log(plain[right]).mean() - 0.01
    made = fitted.report(None, x_new, y_new).table[0]
    assert made["lppd"] == pytest.approx(np.log(probs[right]).mean(), abs=1e-4)
    again = bf.load(fitted.save(tmp_path / "fitted.bnn"))
    assert np.array_equal(again.predict_proba(x_new), probs)
    assert again.calibration_ == fitted.calibration_


def test_labels_at_random_are_not_made_surer(clean) -> None:
    x = clean[0]
    y = np.random.default_rng(1).integers(0, 2, len(x))
    fitted = bf.BayesianMLPClassifier((8,), budget=1e-6).fit(x, y)
    calibration = fitted.draws_.calibration
    assert calibration is None or calibration.power < 1.1


def test_draws_of_a_named_method_are_left_as_they_are(clean) -> None:
    fitted = bf.BayesianMLPClassifier((4,), method=bf.DeepEnsemble(2, 20)).fit(*clean[:2])
    assert fitted.draws_.calibration is None
    assert fitted.calibration_.startswith("none")
