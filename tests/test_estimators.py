"""Laws of the estimators: whose checks they pass, units, weights, tables, files."""

from __future__ import annotations

import itertools
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_diabetes, load_iris
from sklearn.impute import SimpleImputer
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import bnnflow as bf
from bnnflow import BayesianMLPClassifier, BayesianMLPRegressor, storage
from bnnflow.estimators import base, recipe
from bnnflow.estimators.table import columns_of
from tests.problems import one_in
from tests.processes import run

QUICK = bf.DeepEnsemble(members=4, steps=100)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def waves(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x = rng(seed).uniform(-2, 2, (n, 2))
    return x, 50 + 10 * np.sin(2 * x[:, 0]) + rng(seed + 1).normal(0, 1, n)


def houses(n: int = 40) -> tuple[pd.DataFrame, pd.Series]:
    g = rng(3)
    kind = g.choice(["flat", "house", "loft"], n)
    size = g.uniform(20, 200, n)
    frame = pd.DataFrame({"size": size, "kind": kind, "new": g.random(n) > 0.5})
    price = 1000 * size * (1 + 0.3 * (kind == "loft")) + g.normal(0, 5000, n)
    return frame, pd.Series(price, name="price")


@pytest.fixture(scope="module")
def fitted() -> BayesianMLPRegressor:
    """A regressor at its defaults, on 100 rows of the diabetes data."""
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    return BayesianMLPRegressor().fit(X[:100], y[:100])


def hurried(monkeypatch: pytest.MonkeyPatch, **lengths: float) -> None:
    """Make the recipe short: one round of chains that are not made longer, unless said."""
    short = {"STEPS": 100, "WARM_UP": 20, "DRAWS": 10, "CHEAP": 0, "SMALL": 1e9}
    for name, value in (short | lengths).items():
        monkeypatch.setattr(recipe, name, value)


# ---------------------------------------- scikit-learn


@parametrize_with_checks([BayesianMLPRegressor(), BayesianMLPClassifier()])
def test_scikit_learn_accepts_them_at_their_defaults(
    estimator, check, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checks fit 170 tables, and what they ask does not depend on how far the chains run.
    hurried(monkeypatch, STEPS=150, WARM_UP=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def test_they_work_where_scikit_learn_puts_them() -> None:
    frame, price = houses()
    columns = make_column_transformer(
        (OneHotEncoder(sparse_output=False), ["kind"]), (StandardScaler(), ["size"])
    )
    pipe = make_pipeline(
        columns.set_output(transform="pandas"), BayesianMLPRegressor(method=QUICK)
    )
    assert cross_val_score(pipe, frame, price, cv=2).shape == (2,)
    search = GridSearchCV(
        pipe, {"bayesianmlpregressor__network": [(4,), (6,)]}, cv=2, n_jobs=2
    )
    with joblib.parallel_config("threading"):
        search.fit(frame, price)
    assert search.best_params_["bayesianmlpregressor__network"] in [(4,), (6,)]
    again = clone(search.best_estimator_).fit(frame, price)
    assert np.array_equal(again.predict(frame), search.predict(frame))


def test_threads_are_what_n_jobs_says_and_then_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    x, y = waves(20)
    monkeypatch.setattr(
        "bnnflow.estimators.base.sample",
        lambda *a, **k: (seen.append(torch.get_num_threads()), bf.sample(*a, **k))[1],
    )
    before = torch.get_num_threads()
    BayesianMLPRegressor((4,), method=QUICK, n_jobs=before + 1).fit(x, y)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


# ---------------------------------------- laws


def test_predictions_follow_the_units() -> None:
    """A table in other units, with its rows in another order, gives the same predictions."""
    x, y = waves()
    fit = BayesianMLPRegressor((8,), method=QUICK).fit(x, y)
    order = rng(5).permutation(len(x))
    other = BayesianMLPRegressor((8,), method=QUICK)
    other.fit((1e5 * x - 3e6)[order], (1e4 * y + 1e9)[order])
    mean, sd = fit.predict(x, return_std=True)
    mean2, sd2 = other.predict(1e5 * x - 3e6, return_std=True)
    np.testing.assert_allclose((mean2 - 1e9) / 1e4, mean, rtol=2e-3)
    np.testing.assert_allclose(sd2 / 1e4, sd, rtol=2e-2)
    interval, interval2 = fit.predict_interval(x), other.predict_interval(1e5 * x - 3e6)
    np.testing.assert_allclose((interval2 - 1e9) / 1e4, interval, rtol=5e-3)


@pytest.mark.parametrize("kind", [BayesianMLPRegressor, BayesianMLPClassifier])
def test_weights_count_rows(kind) -> None:
    x, y = waves(30)
    y = y if kind is BayesianMLPRegressor else y > 50
    weights = rng(2).integers(0, 4, 30)
    weighted = kind((4,), method=QUICK).fit(x, y, sample_weight=weights)
    repeated = kind((4,), method=QUICK).fit(np.repeat(x, weights, 0), np.repeat(y, weights))
    assert torch.equal(weighted.draws_.theta, repeated.draws_.theta)
    assert len(weighted.model_.x) == weights.sum()


@pytest.mark.parametrize("kind", [BayesianMLPRegressor, BayesianMLPClassifier])
@pytest.mark.parametrize(
    "weights", [rng(2).uniform(0, 4, 30), np.r_[900, [1] * 28, 0], np.full(30, 1e-9)]
)
def test_any_weights_count_rows(kind, weights, tmp_path: Path) -> None:
    """Fractions, and numbers so large that rows are not repeated."""
    x, y = waves(30)
    y = y if kind is BayesianMLPRegressor else y > 50
    fit = kind((4,), method=QUICK).fit(x, y, weights)
    counted = fit.model_.row_weights.numpy()
    assert sorted(counted) == sorted(weights[weights > 0])
    order = rng(3).permutation(30)
    same = kind((4,), method=QUICK).fit(x[order], y[order], weights[order])
    assert torch.equal(same.draws_.theta, fit.draws_.theta)
    again = bf.load(fit.save(tmp_path / "fit.npz"))
    assert torch.equal(again.model_.row_weights, fit.model_.row_weights)
    np.testing.assert_array_equal(again.predict(x), fit.predict(x))
    assert fit.diagnose(x, y).verdict
    plain = kind((4,), method=QUICK).fit(x, y)
    assert not np.array_equal(plain.predict_dist(x).mean, fit.predict_dist(x).mean)


def test_weights_move_predictions_to_what_they_count() -> None:
    """Two lines in one table: the one whose rows count hardly at all is forgotten."""
    x = np.repeat(np.linspace(-1, 1, 60)[:, None], 2, 0)
    first = np.tile([True, False], 60)
    y = np.where(first, x[:, 0], -x[:, 0]) + 0.1 * rng(0).standard_normal(120)
    fit = BayesianMLPRegressor((4,), method=bf.HMC(), n_draws=200)
    for heavy in (first, ~first):
        fit.fit(x, y, np.where(heavy, 1.5, 1e-3))
        at_end = fit.predict([[0.9]]).item()
        assert at_end == pytest.approx(0.9 if heavy[0] else -0.9, abs=0.25)


def test_the_same_state_gives_the_same_fit() -> None:
    x, y = waves(20)

    def theta(state) -> torch.Tensor:
        made = BayesianMLPRegressor((4,), method=QUICK, random_state=state)
        return made.fit(x, y).draws_.theta

    assert torch.equal(theta(3), theta(3))
    assert torch.equal(theta(np.random.RandomState(1)), theta(np.random.RandomState(1)))
    assert not torch.equal(theta(3), theta(4))
    assert not torch.equal(theta(None), theta(None))
    state = torch.get_rng_state()
    theta(0)
    assert torch.equal(state, torch.get_rng_state())


def test_several_targets() -> None:
    x, y = waves(40)
    both = np.column_stack([y, 1e-3 * x[:, 1] - 7])
    fit = BayesianMLPRegressor((8,), method=QUICK).fit(x, both)
    mean, sd = fit.predict(x, return_std=True)
    assert mean.shape == sd.shape == (40, 2)
    assert fit.predict_interval(x[:3]).shape == (3, 2, 2)
    assert fit.predict_quantiles(x[:3], [0.1, 0.5, 0.9]).shape == (3, 3, 2)
    assert fit.sample_y(x[:3], 5).shape == (3, 2, 5)
    assert np.abs(mean[:, 1] + 7).max() < 0.01


def test_predictions_agree_with_one_another(fitted: BayesianMLPRegressor) -> None:
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    rows = X[100:120]
    low, median, high = fitted.predict_quantiles(rows).T
    np.testing.assert_allclose(
        fitted.predict_interval(rows, 0.9), np.column_stack([low, high])
    )
    assert ((low < median) & (median < high)).all()
    dist = fitted.predict_dist(rows)
    mean, sd = fitted.predict(rows, return_std=True)
    np.testing.assert_array_equal(dist.mean.numpy(), mean)
    np.testing.assert_allclose(dist.epistemic.square() + dist.aleatoric.square(), sd**2)
    drawn = fitted.sample_y(rows, 4000, random_state=1)
    assert drawn.shape == (20, 4000)
    assert (np.abs(drawn.mean(1) - mean) < 6 * sd / np.sqrt(4000)).all()
    assert np.array_equal(fitted.predict(rows, return_std=False), fitted.predict(rows))
    # in units of y: the density of the target, not of a standardised one
    cdf = dist.cdf(y[100:120].to_numpy() + 0.01) - dist.cdf(y[100:120].to_numpy() - 0.01)
    torch.testing.assert_close(
        dist.log_prob(y[100:120].to_numpy()).exp(), cdf / 0.02, rtol=1e-3, atol=1e-6
    )


def test_the_default_fit_of_diabetes_is_calibrated(fitted: BayesianMLPRegressor) -> None:
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    inside = 0
    interval = fitted.predict_interval(X[100:], 0.9)
    inside = ((y[100:] >= interval[:, 0]) & (y[100:] <= interval[:, 1])).mean()
    assert 0.84 < inside < 0.96
    assert fitted.score(X[100:], y[100:]) > 0.35
    assert fitted.draws_.info["rounds"] >= 1
    assert fitted.draws_.info["monte_carlo_error"] < recipe.SMALL
    assert fitted.draws_.n_chains * fitted.draws_.n_draws <= 2 * fitted.n_draws


# ---------------------------------------- likelihoods


@pytest.mark.parametrize(
    ("name", "targets", "shown"),
    [
        ("auto", lambda g: g.normal(0, 1, 200), "Standardised(HeteroscedasticStudentT)"),
        ("auto", lambda g: g.integers(3, 9, 200), "Levels"),
        ("auto", lambda g: g.poisson(8, 300), "NegativeBinomial"),
        (
            "auto",
            lambda g: np.exp(2 * g.normal(0, 1, 200)),
            "LogNormal(Standardised(Gaussian))",
        ),
        ("normal", lambda g: g.normal(5, 1, 200), "Standardised(Gaussian)"),
        ("student", lambda g: g.standard_t(3, 200), "Standardised(StudentT)"),
        ("lognormal", lambda g: g.uniform(1, 2, 200), "LogNormal"),
        ("gamma", lambda g: g.gamma(2, 1e6, 200), "Standardised(Gamma)"),
        ("poisson", lambda g: g.poisson(3, 200), "Poisson"),
        ("negative_binomial", lambda g: g.poisson(3, 200), "NegativeBinomial"),
        ("ordinal", lambda g: g.integers(0, 30, 200), "Levels"),
        (bf.likelihoods.Gaussian(2.0), lambda g: g.normal(0, 2, 200), "Gaussian"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_likelihoods_by_name_and_by_looks(name, targets, shown) -> None:
    g = rng(4)
    y = targets(g).astype(float)
    x = g.normal(0, 1, (len(y), 2))
    settled = bf.DeepEnsemble(members=4, steps=500, learning_rate=0.03)
    fit = BayesianMLPRegressor((4,), likelihood=name, method=settled).fit(x, y)
    assert fit.likelihood_.startswith(shown), fit.likelihood_
    interval = fit.predict_interval(x, 0.9)
    inside = (y >= interval[:, 0]) & (y <= interval[:, 1])
    assert 0.6 < inside.mean() <= 1
    spread = y.max() - y.min()
    assert (np.abs(fit.predict(x) - y.mean()) < spread).all()
    assert np.isfinite(fit.predict_dist(x).log_prob(y).numpy()).all()


def test_the_choice_is_said() -> None:
    x, _ = waves(50)
    fit = BayesianMLPRegressor((4,), method=QUICK).fit(x, rng(1).integers(3, 9, 50))
    assert "6 values, all whole" in fit.likelihood_
    classes = BayesianMLPClassifier((4,), likelihood="ordinal", method=QUICK)
    classes.fit(x, rng(1).integers(3, 6, 50))
    assert isinstance(classes.model_.likelihood, bf.likelihoods.Ordinal)
    np.testing.assert_allclose(classes.predict_proba(x).sum(1), 1)


# ---------------------------------------- tables


def test_a_frame_with_categories_and_missing_values_in_six_lines() -> None:
    df, y = houses(60)
    df.loc[[3, 7], "size"] = np.nan
    df_new = df[:5]
    fill = SimpleImputer(strategy="most_frequent").set_output(transform="pandas")
    reg = BayesianMLPRegressor(method=QUICK).fit(fill.fit_transform(df), y)
    low, high = reg.predict_interval(fill.transform(df_new), level=0.9).T
    assert (low < high).all()
    assert reg.table_.inputs == ["size", "kind=flat", "kind=house", "kind=loft", "new"]


def test_names_are_kept_and_checked() -> None:
    frame, price = houses()
    fit = BayesianMLPRegressor((4,), method=QUICK).fit(frame, price)
    assert list(fit.feature_names_in_) == ["size", "kind", "new"]
    for wrong in (frame[["kind", "size", "new"]], frame.drop(columns="new")):
        with pytest.raises(ValueError, match="feature names should match"):
            fit.predict(wrong)
    with pytest.warns(
        UserWarning, match=r"never saw count as none of its levels: kind \(1 rows\)"
    ):
        fit.predict(
            pd.DataFrame({"size": [50.0, 60.0], "kind": ["flat", "castle"], "new": [0, 1]})
        )


def test_polars_is_read_like_pandas() -> None:
    polars = pytest.importorskip("polars")
    frame, price = houses()
    other = polars.DataFrame({name: frame[name].to_list() for name in frame})
    first = BayesianMLPRegressor((4,), method=QUICK).fit(frame, price)
    second = BayesianMLPRegressor((4,), method=QUICK).fit(
        other, polars.Series(price.to_list())
    )
    assert np.array_equal(first.predict(frame), second.predict(other))
    with pytest.raises(ValueError, match=r"missing values in size \(1 rows\)"):
        first.predict(other.with_columns(size=polars.Series([None, *frame["size"][1:]])))


def test_columns_of_every_pandas_type() -> None:
    n = 30
    g = rng(6)
    frame = pd.DataFrame(
        {
            "whole": pd.array(g.integers(0, 9, n), dtype="Int64"),
            "real": pd.array(g.normal(0, 1, n), dtype="Float64"),
            "flag": pd.array(g.random(n) > 0.5, dtype="boolean"),
            "word": pd.array(g.choice(["a", "b"], n), dtype="string"),
            "kind": pd.Categorical(g.choice(["x", "y", "z"], n)),
            "same": 1.0,
        }
    )
    with pytest.warns(UserWarning, match="never change are left out: same"):
        fit = BayesianMLPRegressor((4,), method=QUICK).fit(frame, g.normal(0, 1, n))
    words = ["word=a", "word=b", "kind=x", "kind=y", "kind=z"]
    assert fit.table_.inputs == ["whole", "real", "flag", *words]
    assert fit.predict(frame).shape == (n,)


def test_many_categories_are_pooled() -> None:
    names = [f"street {i % 70}" for i in range(140)]
    frame = pd.DataFrame({"where": names, "size": np.arange(140.0)})
    with pytest.warns(UserWarning, match="70 categories: the rarest 20 count as one"):
        fit = BayesianMLPRegressor((4,), method=QUICK).fit(frame, rng().normal(0, 1, 140))
    assert len(fit.table_.inputs) == 51
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit.predict(frame)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([1.0, np.nan, 2.0, None], r"missing values in bad \(2 rows\).*SimpleImputer"),
        (["a", None, "b", "c"], r"missing values in bad \(1 rows\)"),
        (pd.array([1, None, 2, 3], dtype="Int64"), r"missing values in bad \(1 rows\)"),
        ([1.0, np.inf, 2.0, 3.0], "infinity in bad"),
        (pd.date_range("2024-01-01", periods=4), "'bad' holds dates"),
        ([1j, 2j, 3j, 4j], "Complex data not supported"),
    ],
)
def test_bad_columns_are_named(column, message: str) -> None:
    frame = pd.DataFrame({"fine": [1.0, 2.0, 4.0, 3.0], "bad": column})
    with pytest.raises(ValueError, match=message):
        BayesianMLPRegressor(method=QUICK).fit(frame, [1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    ("settings", "fit", "message"),
    [
        ({"network": (0,)}, {}, "network must be at least 1"),
        ({"network": 16}, {}, "network must be the widths"),
        ({"activation": "relú"}, {}, "activation must be one of"),
        ({"likelihood": "cauchy"}, {}, "likelihood must be one of"),
        ({"method": "hmc"}, {}, "method must be 'auto' or one of bnnflow's"),
        ({"budget": -1}, {}, "budget must be positive"),
        ({"n_draws": 0}, {}, "n_draws must be at least 1"),
        ({"n_jobs": 1.5}, {}, "n_jobs must be an integer"),
        ({"likelihood": "lognormal"}, {"y": -1.0}, "needs positive y"),
        ({"likelihood": "poisson"}, {"y": 0.5}, "counts are the whole numbers"),
        ({"likelihood": "ordinal"}, {"y": 0.5}, "needs whole numbers as levels"),
        ({}, {"y": np.nan}, "contains NaN"),
        ({}, {"weights": -1.0}, "sample_weight must not be negative"),
        ({}, {"weights": np.inf}, "sample_weight cannot be taken"),
    ],
)
def test_bad_input_is_named_before_any_work(
    settings, fit, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnnflow.estimators.base.sample", None)
    monkeypatch.setattr("bnnflow.estimators.base.automatic", None)
    x, y = waves(20)
    y = np.abs(y)
    y[0] = fit.get("y", y[0])
    weights = np.full(20, 1.0)
    weights[:10] = fit.get("weights", 1.0)
    with pytest.raises((ValueError, TypeError), match=message):
        BayesianMLPRegressor(**settings).fit(x, y, weights)


def test_what_cannot_be_learned_is_refused() -> None:
    x, y = waves(20)
    with pytest.raises(ValueError, match="y has only one value, 3"):
        BayesianMLPRegressor().fit(x, np.full(20, 3.0))
    with pytest.raises(ValueError, match="one class only, 'a'"):
        BayesianMLPClassifier().fit(x, ["a"] * 20)
    with pytest.raises(ValueError, match="labels are missing"):
        BayesianMLPClassifier().fit(x, np.array(["a", None] * 10, dtype=object))
    with pytest.raises(ValueError, match="no column that changes"):
        BayesianMLPRegressor().fit(np.ones((20, 2)), y)
    fit = BayesianMLPClassifier((4,), method=QUICK).fit(x, y > 50)
    with pytest.raises(ValueError, match="labels that training never saw"):
        fit.report(None, x, np.array(["no"] * 20))
    reg = BayesianMLPRegressor((4,), method=QUICK).fit(x, y)
    for level in (0, 1, 1.5, np.nan):
        with pytest.raises(ValueError, match="level must be"):
            reg.predict_interval(x, level)
    with pytest.raises(ValueError, match="quantiles must lie strictly between 0 and 1"):
        reg.predict_quantiles(x, [0.5, 1.0])


FEW = "X has 20 rows and y has 5"


@pytest.mark.parametrize("kind", [BayesianMLPRegressor, BayesianMLPClassifier])
def test_errors_speak_of_the_arguments_of_the_caller(kind) -> None:
    """X and y, whatever the functions inside call them."""
    x, y = waves(20)
    y = y if kind is BayesianMLPRegressor else y > 50
    fit = kind((4,), method=QUICK).fit(x, y)
    asked = {
        "diagnose": fit.diagnose,
        "to_arviz": fit.to_arviz,
        "report": lambda X, y: fit.report(None, X, y),
        "score": fit.score,
    }
    for name, ask in asked.items():
        gone = y.astype(object)
        gone[1] = np.nan
        bad = [
            (x, y[:5], FEW),
            (x, gone, "y (contains NaN|has labels)"),
            ([["a"]] * 20, y, "X cannot be taken"),
        ]
        bad += [(x, np.stack([y, y], 1), "^y ")]
        if name != "score":
            bad += [(None, y, "y needs its X")]
        if name == "report":
            bad += [(x, None, "X needs its y")]
        for rows, targets, message in bad:
            with pytest.raises(ValueError, match=message):
                ask(rows, targets)
    with pytest.raises(ValueError, match=FEW):
        kind((4,), method=QUICK).fit(x, y[:5])


@pytest.mark.parametrize("targets", [1, 2])
def test_scores_are_those_of_scikit_learn(targets: int) -> None:
    x, y = waves(40)
    y = np.stack([y, -y * y], 1)[:, :targets].squeeze()
    fit = BayesianMLPRegressor((4,), method=QUICK).fit(x, y)
    weights = np.linspace(0.1, 2.3, 40)
    assert fit.score(x, y, weights) == r2_score(y, fit.predict(x), sample_weight=weights)
    labels = np.where(x[:, 0] > 0, "up", "down")
    fit = BayesianMLPClassifier((4,), method=QUICK).fit(x, labels)
    labels[0] = "never seen"
    expected = accuracy_score(labels, fit.predict(x), sample_weight=weights)
    assert fit.score(x, labels, weights) == expected


# ---------------------------------------- methods, networks, interrupts


@pytest.mark.parametrize(
    "method",
    [bf.HMC(), bf.Laplace(), bf.VI(steps=50), bf.SWAG(), bf.MCDropout(steps=50)],
    ids=lambda method: type(method).__name__,
)
def test_any_method(method, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"HMC": {"chains": 4, "warmup": 20, "draws": 20}}.get(type(method).__name__, {})
    monkeypatch.setattr(
        "bnnflow.estimators.base.sample", lambda *a, **k: bf.sample(*a, **k, **short)
    )
    x, y = waves(40)
    fit = BayesianMLPRegressor((4,), likelihood="normal", method=method).fit(x, y)
    assert np.isfinite(fit.predict(x)).all()
    assert fit.draws_.info["method"] == type(method).__name__


def test_weights_of_draws_count() -> None:
    """Particles of unequal weight: predictions are the weighted ones, from a file too."""
    x, y = waves(20)
    fit = BayesianMLPRegressor((2,), likelihood="normal", method=QUICK).fit(x, y)
    before = fit.predict(x)
    log_weights = torch.tensor([[0.0, -1.0, -2.0, -50.0]], dtype=torch.float64)
    fit.draws_ = replace(fit.draws_, log_weights=log_weights)
    inputs = torch.from_numpy(fit.table_.transform(columns_of(x))).float()
    each = [bf.predict(fit.model_, theta[None], inputs).mean for theta in fit.draws_.flat]
    expected = (log_weights.softmax(1)[0, :, None] * torch.stack(each)).sum(0)
    np.testing.assert_allclose(fit.predict(x), expected, rtol=1e-5)
    assert np.abs(fit.predict(x) - before).max() > 1e-3


def test_a_network_of_ones_own(seeded) -> None:
    x, y = waves(40)
    with seeded(0):
        net = nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))
    fit = BayesianMLPRegressor(net, method=QUICK).fit(x, y)
    assert fit.model_.dim == sum(p.numel() for p in net.parameters()) + 1  # excess_df
    assert fit.predict(x).shape == (40,)
    with pytest.raises(
        ValueError, match="cannot be written to a file: pickle the estimator"
    ):
        fit.save("never.bnn")
    with pytest.raises(ValueError, match="does not fit net"):
        BayesianMLPRegressor(net[3], method=QUICK).fit(x, y)


def test_an_interrupt_keeps_the_rounds_that_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = itertools.count()
    real = recipe.warm_start

    def interrupted(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(recipe, "warm_start", interrupted)
    hurried(monkeypatch, SMALL=0.0)
    x, y = waves(30)
    with pytest.warns(UserWarning, match="interrupted: keeping the 1 rounds"):
        fit = BayesianMLPRegressor((4,)).fit(x, y)
    assert fit.draws_.info["interrupted"]
    assert fit.draws_.n_chains == recipe.CHAINS
    assert fit.predict(x).shape == (30,)


def test_chains_are_added_while_they_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = waves(30)

    def rounds(small: float, budget: float | None) -> int:
        hurried(monkeypatch, SMALL=small)
        fit = BayesianMLPRegressor((4,), budget=budget).fit(x, y)
        assert fit.draws_.n_chains == recipe.CHAINS * fit.draws_.info["rounds"]
        assert fit.model_.fingerprint() == fit.draws_.info["model"]
        return fit.draws_.info["rounds"]

    assert rounds(1e9, None) == 1
    assert rounds(0.0, None) == recipe.ROUNDS
    assert rounds(0.0, 1e-9) == 1


@pytest.mark.parametrize(
    ("cheap", "times"), [(1e9, recipe.LONGER), (30 * 25 * 2, 2), (0, 1)]
)
def test_cheap_chains_are_made_longer(
    cheap: float, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "_RISE", -1e9)  # no chain has arrived
    hurried(monkeypatch, CHEAP=cheap, WARM_UP=5)
    x, y = waves(30)
    fit = BayesianMLPRegressor((4,), budget=1e-9, n_draws=10**6).fit(x, y)
    assert fit.draws_.n_draws == 10 * times


@pytest.mark.parametrize(("cheap", "times"), [(1e9, recipe.SETTLING), (0, 1)])
def test_chains_that_have_arrived_go_on_where_that_is_cheap(
    cheap: float, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "_RISE", 1e9)
    monkeypatch.setattr(recipe, "ENERGY_VARIANCE", 1e9)
    hurried(monkeypatch, CHEAP=cheap, WARM_UP=5)
    x, y = waves(30)
    fit = BayesianMLPRegressor((4,), budget=1e-9, n_draws=10**6).fit(x, y)
    assert fit.draws_.n_draws == 10 * times


def test_a_stage_of_large_energy_errors_is_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hurried(monkeypatch, CHEAP=0, WARM_UP=5)
    x, y = waves(30)
    for bound, stages in (
        (0.0, {"start", "short", "long", "again"}),
        (1e9, {"start", "short"}),
    ):
        monkeypatch.setattr(recipe, "ENERGY_VARIANCE", bound)
        monkeypatch.setattr(recipe, "_RISE", 1e9)
        place = tmp_path / str(bound)
        fit = BayesianMLPRegressor((4,), budget=1e-9).fit(x, y, checkpoint=place)
        assert fit.draws_.n_draws == 10
        assert {each.name for each in (place / "round-1").iterdir()} == stages


def test_networks_of_a_large_table_are_trained_to_the_mode(
    monkeypatch: pytest.MonkeyPatch, seeded
) -> None:
    x, y = waves(60)
    y = (y - y.mean()) / y.std()
    with seeded(0):
        net = nn.Linear(x.shape[1], 1)
    data = map(torch.tensor, (x, y))
    model = bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.5), *data
    )
    monkeypatch.setattr(recipe, "LARGE", 59)
    monkeypatch.setattr(recipe, "EPOCHS", 20_000)
    start = recipe.warm_start(model, 3, torch.Generator().manual_seed(0))
    ones = np.column_stack([x, np.ones(len(x))])
    mode = np.linalg.solve(ones.T @ ones + 0.25 * np.eye(ones.shape[1]), ones.T @ y)
    np.testing.assert_allclose(start, np.tile(mode, (3, 1)), atol=0.02)


@pytest.mark.parametrize(("bound", "steps"), [("EPOCHS", 3), ("TRAINING", 2)])
def test_training_on_a_large_table_is_bounded(
    bound: str, steps: int, monkeypatch: pytest.MonkeyPatch, seeded
) -> None:
    """By how often it sees each row, and by its arithmetic."""
    x, y = waves(60)
    with seeded(0):
        net = nn.Linear(x.shape[1], 1)
    model = bf.BayesianModel(net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.5), x, y)
    work = {"EPOCHS": recipe._BATCH / 60, "TRAINING": recipe._BATCH * model.dim}
    monkeypatch.setattr(recipe, "LARGE", 59)
    monkeypatch.setattr(recipe, bound, steps * work[bound])
    real, made = recipe.Adam.step, []

    def counted(*args: Any) -> torch.Tensor:
        made.append(1)
        return real(*args)

    monkeypatch.setattr(recipe.Adam, "step", counted)
    recipe.warm_start(model, 3, torch.Generator().manual_seed(0))
    assert len(made) == steps


def test_a_large_table_gets_shorter_chains_of_wider_networks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hurried(monkeypatch, WARM_UP=40, DRAWS=40, EPOCHS=20)
    monkeypatch.setattr(recipe, "_RISE", 1e9)
    monkeypatch.setattr(recipe, "ENERGY_VARIANCE", 1e9)
    x, y = waves(30)
    labels = y > y.mean()

    def fitted_with(large: int, kind: Any, y: np.ndarray) -> tuple[int, list[int]]:
        for where in (recipe, base):
            monkeypatch.setattr(where, "LARGE", large)
        fit = kind(n_draws=10**6).fit(x, y)
        widths = [
            each.out_features for each in fit.model_.net if isinstance(each, nn.Linear)
        ]
        return fit.draws_.n_draws, widths

    assert fitted_with(30, BayesianMLPRegressor, y) == (40, [16, 16, 2])
    assert fitted_with(29, BayesianMLPRegressor, y) == (10, [32, 32, 2])
    assert fitted_with(7, BayesianMLPRegressor, y) == (10, [48, 48, 2])
    assert fitted_with(7, BayesianMLPClassifier, labels) == (10, [48, 2])


def test_a_killed_fit_does_not_train_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hurried(monkeypatch)
    x, y = waves(30)

    def fit(place: Path) -> BayesianMLPRegressor:
        return BayesianMLPRegressor((4,)).fit(x, y, checkpoint=place)

    def killed(*args: object) -> None:
        raise RuntimeError("killed")

    whole, real = fit(tmp_path / "whole"), recipe._stage
    monkeypatch.setattr(recipe, "_stage", killed)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "cut")
    monkeypatch.setattr(recipe, "_stage", real)
    monkeypatch.setattr(recipe, "warm_start", killed)
    assert torch.equal(fit(tmp_path / "cut").draws_.theta, whole.draws_.theta)


@pytest.mark.parametrize("far", [1e3, 1e5, 1e9])
def test_one_wild_value_does_not_set_the_units(far: float) -> None:
    g = np.random.default_rng(0)
    x = g.normal(size=(150, 2))
    y = np.sin(x[:, 0]) + 0.1 * g.normal(size=150)
    y[0] = far
    fit = BayesianMLPRegressor((8,), budget=1e-6).fit(x, y)
    low, high = fit.predict_interval(x[1:]).T
    assert np.median(high - low) < 0.6
    assert "the middle half sets its units" in fit.likelihood_
    normal = BayesianMLPRegressor((8,), likelihood="normal", method=QUICK).fit(x, y)
    assert "middle half" not in normal.likelihood_


@pytest.mark.parametrize("factor", [1e300, 1e-310])
def test_units_beyond_floating_point_are_refused(factor: float) -> None:
    x, y = waves(30)
    with pytest.raises(
        ValueError, match=r"y has a standard deviation of .*: give it in other"
    ):
        BayesianMLPRegressor().fit(x, factor * y)


def test_quantiles_beyond_floating_point_are_unknown() -> None:
    x, y = waves(30)
    fit = BayesianMLPRegressor((4,), activation="relu", budget=1e-6).fit(x, y)
    with np.errstate(over="ignore"):
        assert np.isnan(fit.predict_quantiles(np.full((1, x.shape[1]), 1.7e308))).all()


def test_rows_far_away_leave_the_rest_of_a_table_alone() -> None:
    g = np.random.default_rng(0)
    x = g.uniform(-2, 2, (120, 1))
    y = 100 + 10 * x[:, 0] + g.normal(0, 1, 120)
    y[::12] += 60
    fit = BayesianMLPRegressor((8,), likelihood="auto").fit(x, y)
    inside = np.abs(fit.predict_quantiles(x, 0.5)[:, 0] - 100 - 10 * x[:, 0]) < 3
    assert inside.mean() > 0.95
    assert (
        float(fit.draws_.theta[..., -1].exp().median()) < 2
    )  # degrees of freedom beyond two


@pytest.mark.parametrize(
    ("kind", "given", "layers"),
    [
        (BayesianMLPRegressor, {}, "Linear Tanh Linear Tanh Linear"),
        (BayesianMLPRegressor, {"activation": "gelu"}, "Linear GELU Linear GELU Linear"),
        (BayesianMLPRegressor, {"network": [3]}, "Linear Tanh Linear"),
        (BayesianMLPClassifier, {}, "Linear ReLU Linear"),
        (BayesianMLPClassifier, {"network": ()}, "Linear"),
    ],
)
def test_networks_by_default_and_by_name(kind, given, layers: str) -> None:
    x, y = waves(30)
    y = y if kind is BayesianMLPRegressor else y > 50
    net = kind(**given, method=QUICK).fit(x, y).model_.net
    assert " ".join(type(layer).__name__ for layer in net) == layers


def test_few_rows_of_many_columns_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "AFFORDABLE", 0)
    monkeypatch.setattr(recipe, "DRAWS", 20)
    x, y = waves(40)
    fit = BayesianMLPRegressor((4,), budget=1e-9).fit(x, y)
    assert "batch_size=40," in fit.draws_.info["settings"]


def test_many_rows_are_sampled_by_mini_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "AFFORDABLE", 0)
    monkeypatch.setattr(recipe, "DRAWS", 40)
    x, y = waves(1200)
    fit = BayesianMLPRegressor((8,), budget=1e-9).fit(x, y)
    assert "SGHMC" in fit.draws_.info["settings"]
    assert fit.score(x, y) > 0.8


# ---------------------------------------- reports and files


def test_diagnosis_and_report(fitted: BayesianMLPRegressor, tmp_path) -> None:
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    held_out = fitted.diagnose(X[100:200], y[100:200])
    assert held_out.looked_at == "held-out rows"
    assert held_out.predictions.grade in ("yes", "with care")
    assert fitted.diagnose(X[100:130]).looked_at != "held-out rows"
    assert fitted.diagnose().verdict
    path = tmp_path / "report.html"
    made = fitted.report(path, X[100:200], y[100:200])
    assert path.stat().st_size > 10_000
    expected = bf.metrics.lppd(fitted.predict_dist(X[100:200]), y[100:200].to_numpy())
    assert made.table[0]["lppd"] == pytest.approx(expected, abs=1e-3)


def test_a_file_gives_the_same_predictions_in_another_process(
    fitted: BayesianMLPRegressor, tmp_path
) -> None:
    X, _ = load_diabetes(return_X_y=True, as_frame=True)
    path = fitted.save(tmp_path / "model.bnn")
    assert path.stat().st_size < 2_000_000
    X[100:110].to_csv(tmp_path / "rows.csv", index=False)
    script = (
        "import sys, bnnflow as bf, pandas as pd, numpy as np;"
        f"m = bf.load({str(path)!r}); X = pd.read_csv({str(tmp_path / 'rows.csv')!r});"
        f"np.save({str(tmp_path / 'found.npy')!r}, m.predict_interval(X))"
    )
    assert run(script) == 0
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert np.array_equal(np.load(tmp_path / "found.npy"), fitted.predict_interval(rows))
    again = bf.load(path)
    assert again.get_params() == fitted.get_params()
    assert again.diagnose(rows).verdict == fitted.diagnose(rows).verdict
    assert again.likelihood_ == fitted.likelihood_


def test_a_file_of_before_targets_had_names_has_none(
    fitted: BayesianMLPRegressor, tmp_path
) -> None:
    X, _ = load_diabetes(return_X_y=True, as_frame=True)
    header, arrays = storage.read(fitted.save(tmp_path / "new.bnn"), {"estimator": 1})
    del header["targets"]
    again = bf.load(storage.write(tmp_path / "old.bnn", "estimator", 1, header, arrays))
    assert again.target_names_ == []
    assert np.array_equal(again.predict(X[:5]), fitted.predict(X[:5]))


@pytest.mark.parametrize("way", ["file", "pickle", "joblib"])
@pytest.mark.parametrize("labels", [["no", "yes"], [3, 7], [False, True]], ids=str)
def test_classifiers_are_kept(way: str, labels: list, tmp_path) -> None:
    x, y = waves(40)
    frame = pd.DataFrame(x, columns=["a", "b"]).assign(
        c=np.where(x[:, 1] > 0, "up", "down")
    )
    prior, method = bf.priors.FanIn(), bf.DeepEnsemble(members=3, steps=20)
    fit = BayesianMLPClassifier((4,), prior=prior, method=method)
    fit.fit(frame, np.array(labels)[(y > 50).astype(int)])
    if way == "file":
        again = bf.load(fit.save(tmp_path / "m.bnn"))
        assert repr(again.prior) == repr(prior)
        assert again.method == method
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(fit))
    else:
        joblib.dump(fit, tmp_path / "m.joblib")
        again = joblib.load(tmp_path / "m.joblib")
    assert np.array_equal(again.predict_proba(frame), fit.predict_proba(frame))
    assert np.array_equal(again.predict(frame), fit.predict(frame))
    assert again.classes_.dtype == fit.classes_.dtype
    with pytest.raises(ValueError, match="feature names should match"):
        again.predict(frame[["b", "a", "c"]])


def test_iris() -> None:
    x, y = load_iris(return_X_y=True)
    order = rng(1).permutation(150)
    train, test = order[:120], order[120:]
    fit = BayesianMLPClassifier(budget=1e-9).fit(x[train], y[train])
    p = fit.predict_proba(x[test])
    assert fit.score(x[test], y[test]) > 0.9
    assert -np.log(p[np.arange(30), y[test]]).mean() < 0.25
    np.testing.assert_allclose(np.exp(fit.predict_log_proba(x[test])), p)
    assert set(fit.sample_y(x[test], 7).ravel()) <= {0, 1, 2}


def test_a_sampler_that_was_chosen_goes_on_from_its_checkpoint(tmp_path) -> None:
    x, y = waves(12)
    fit = BayesianMLPRegressor((2,), likelihood="normal", method=bf.SMC(particles=10))
    whole = fit.fit(x, y).draws_.theta
    kept = fit.fit(x, y, checkpoint=tmp_path / "run").draws_.theta
    assert torch.equal(kept, whole)
    assert torch.equal(fit.fit(x, y, checkpoint=tmp_path / "run").draws_.theta, whole)
    with pytest.raises(ValueError, match="holds another run: its seed"):
        fit.set_params(random_state=1).fit(x, y, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="not checkpoint"):
        fit.set_params(method=QUICK).fit(x, y, checkpoint=tmp_path / "other")


# ---------------------------------------- whether intervals hold


def simulated(noise: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a smooth function with noise of standard deviation 2, on average."""
    g = rng(seed)
    x = g.normal(0, 1, (n, 3))
    e = {
        "constant": 2 * g.normal(0, 1, n),
        "varying": (0.5 + 1.5 * np.abs(x[:, 1])) * g.normal(0, 1, n),
        "skewed": 2 * (g.exponential(1, n) - 1),
    }[noise]
    return x, 3 * np.sin(x[:, 0]) + x[:, 1] ** 2 - x[:, 2] + e


@pytest.mark.validate
def test_intervals_cover_what_they_say() -> None:
    """At defaults over 200 data sets, each with 1,000 fresh rows."""
    levels = np.array([0.5, 0.9, 0.95])
    sizes = np.geomspace(50, 1000, 67).round().astype(int)
    inside = []
    for seed, (n, noise) in enumerate(
        itertools.product(sizes, ["constant", "varying", "skewed"])
    ):
        law = BayesianMLPRegressor().fit(*simulated(noise, n, seed))
        x, y = simulated(noise, 1000, 10_000 + seed)
        p = law.predict_dist(x).cdf(y).numpy()
        inside.append((np.abs(p[:, None] - 0.5) <= levels / 2).mean(0))
    assert np.abs(np.mean(inside, 0) - levels).max() < 0.02, np.mean(inside, 0)


@pytest.mark.parametrize("frames", one_in(2, [True, False]))
def test_a_report_calls_targets_what_the_frame_called_them(frames, tmp_path, monkeypatch):
    """And the program at its foot fits the estimator again."""
    x, noise = rng(0).normal(size=(40, 2)), rng(1).normal(size=(2, 40))
    y = pd.DataFrame({"height": x[:, 0] + noise[0], "<weight>": 3 * x.sum(1) + noise[1]})
    y = y if frames else y["<weight>"]
    fitted = bf.BayesianMLPRegressor((3,), method=bf.Laplace(), random_state=0).fit(x, y)
    assert fitted.target_names_ == (["height", "<weight>"] if frames else ["<weight>"])
    units = ["m", "kg"] if frames else ["kg"]
    fitted.save(tmp_path / "fitted.bnn")
    again = bf.load(tmp_path / "fitted.bnn")
    assert again.target_names_ == fitted.target_names_
    made = again.report(None, x[:9], y[:9], units=units)
    assert made.sections[0].names.target(len(units) - 1) == "<weight> (kg)"
    assert "<weight>" not in made.html()
    names = {"X": x, "y": y, "X_test": x[:9], "y_test": y[:9]}
    monkeypatch.chdir(tmp_path)
    exec(made.sections[0].program, names)
    assert np.array_equal(names["estimator"].draws_.theta, fitted.draws_.theta)
    assert (tmp_path / "report.html").exists()


def test_a_report_calls_classes_by_their_labels() -> None:
    x = np.random.default_rng(0).normal(size=(40, 2))
    labels = np.where(x[:, 0] > 0, "yes & no", "<maybe>")
    fitted = bf.BayesianMLPClassifier((3,), method=bf.Laplace(), random_state=0)
    page = fitted.fit(x, labels).report(None, x[:9], labels[:9]).html()
    assert "&lt;maybe&gt;" in page
    assert "<maybe>" not in page


def test_labels_that_are_missing_are_told() -> None:
    x = np.random.default_rng(0).normal(size=(30, 2))
    labels = np.where(x[:, 0] > 0, "yes", "no").astype(object)
    fitted = bf.BayesianMLPClassifier((3,), method=bf.Laplace(), random_state=0)
    fitted.fit(x, labels)
    labels[4] = None
    for ask in (fitted.diagnose, lambda x, y: fitted.report(None, x, y)):
        with pytest.raises(ValueError, match=r"training never saw: \[None\]"):
            ask(x, labels)
