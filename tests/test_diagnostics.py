"""What ArviZ computes is the same from both of its generations, at every scale of the draws; what
is computed here is the same as there.
"""

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import genpareto

from bnnflow.diagnostics import ess, import_arviz, psis, rhat

SCALES = [1e-30, 1e-8, 1.0, 1e8, 1e30]


def autoregressive(
    rho: float, chains: int = 4, draws: int = 2000, seed: int = 0
) -> np.ndarray:
    """Chains of variance 1 whose mean is worth (1 - rho) / (1 + rho) of their draws."""
    noise = np.random.default_rng(seed).normal(size=(chains, draws))
    values = np.empty_like(noise)
    values[:, 0] = noise[:, 0]
    for i in range(1, draws):
        values[:, i] = rho * values[:, i - 1] + np.sqrt(1 - rho**2) * noise[:, i]
    return values


SERIES = {
    "independent": lambda g, shape: g.normal(size=shape),
    "slow": lambda g, shape: g.normal(size=shape).cumsum(1),
    "alternating": lambda g, shape: (
        (-1.0) ** np.arange(shape[1]) + g.normal(size=shape) / 9
    ),
    "apart": lambda g, shape: g.normal(size=shape) + 2 * g.normal(size=(shape[0], 1)),
    "counts": lambda g, shape: g.poisson(3.0, shape).astype(float),
    "rare": lambda g, shape: (g.random(shape) < 0.1).astype(float),
    "constant": lambda g, shape: np.full(shape, 3.0),
}


@pytest.mark.filterwarnings("ignore")  # of ArviZ, about what has no answer
@pytest.mark.parametrize("shape", [(1, 4), (2, 5), (3, 8), (2, 51), (4, 200), (50, 6)])
@pytest.mark.parametrize("kind", SERIES)
def test_r_hat_and_effective_sizes_are_those_of_arviz(kind, shape):
    arviz = import_arviz()
    values = SERIES[kind](np.random.default_rng(0), shape)
    values = (
        values - values[0, 0]
    )  # as they are standardised here: rounding makes and breaks ties
    values = values / (np.abs(values).max() or 1.0)
    if len(values) > 1:
        np.testing.assert_allclose(rhat(values), float(arviz.rhat(values)), rtol=1e-8)
    for method, prob in (("bulk", None), ("mean", None), ("tail", (0.05, 0.95))):
        options = {} if prob is None else {"prob": prob}
        expected = float(arviz.ess(values, method=method, **options))
        np.testing.assert_allclose(ess(values, method), expected, rtol=1e-8)


@pytest.mark.parametrize("method", ["bulk", "tail", "mean"])
def test_what_has_no_answer_is_not_a_number_and_alone_so(method):
    values = np.random.default_rng(0).normal(size=(4, 60, 3))
    whole, r_hat = ess(values, method), rhat(values)
    values[2, 7, 1] = np.nan
    for found, before in ((ess(values, method), whole), (rhat(values), r_hat)):
        assert np.isnan(found).tolist() == [False, True, False]
        assert found[[0, 2]].tolist() == before[[0, 2]].tolist()
    assert np.isnan(ess(values[:, :3], method)).all()
    assert np.isnan(rhat(values[:, :3])).all()
    assert np.isnan(rhat(values[:1])).all()


def test_blocks_of_quantities_change_nothing(monkeypatch):
    values = np.random.default_rng(0).normal(size=(2, 20, 9))
    whole = rhat(values), *(ess(values, method) for method in ("bulk", "tail", "mean"))
    monkeypatch.setattr("bnnflow.diagnostics.BLOCK", 2 * 20 * 4)
    parts = rhat(values), *(ess(values, method) for method in ("bulk", "tail", "mean"))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("method", ["bulk", "mean"])
def test_effective_sizes_of_autoregressive_chains(rho, method):
    assert ess(autoregressive(rho), method) == pytest.approx(
        8000 * (1 - rho) / (1 + rho), rel=0.15
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", ["bulk", "tail", "mean"])
def test_effective_sizes_and_r_hat_know_no_unit(scale, method):
    values = autoregressive(0.6)
    assert ess(scale * values, method) == pytest.approx(ess(values, method), rel=1e-6)
    assert rhat(scale * values) == pytest.approx(rhat(values), rel=1e-6)


def test_r_hat_sees_a_shifted_chain():
    values = autoregressive(0.0)
    assert rhat(values) < 1.01
    values[0] += 1
    assert rhat(values) > 1.05


def test_quantities_keep_their_shape():
    values = np.stack([autoregressive(0.0), autoregressive(0.9)], -1)[..., None]
    assert ess(values, "bulk").shape == rhat(values).shape == (2, 1)
    assert ess(values, "bulk")[0, 0] > 5 * ess(values, "bulk")[1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_smoothed_weights_are_in_the_order_of_the_raw_ones(seed):
    raw = 2 * np.random.default_rng(seed).normal(size=1000)
    smoothed, khat = psis(raw)
    assert np.corrcoef(raw, smoothed)[0, 1] > 0.99
    assert (np.diff(smoothed[np.argsort(raw)]) >= 0).all()
    assert logsumexp(smoothed) == pytest.approx(0, abs=1e-9)
    body = np.argsort(raw)[:800]  # all but the tail keep their ratios
    assert np.ptp((smoothed - raw)[body]) == pytest.approx(0, abs=1e-9)
    assert 0.2 < khat < 1.2


@pytest.mark.parametrize("shape", [0.1, 0.4, 0.7])
def test_k_hat_is_the_shape_of_the_tail(shape):
    found = [
        psis(np.log(genpareto.rvs(shape, size=4000, random_state=seed)))[1]
        for seed in range(5)
    ]
    assert np.mean(found) == pytest.approx(shape, abs=0.12)


@pytest.mark.parametrize("shift", [-1e6, 0.0, 1e6])
def test_smoothing_knows_no_unit(shift):
    raw = np.random.default_rng(0).normal(size=500)
    smoothed, khat = psis(raw)
    moved, same = psis(raw + shift)
    assert np.allclose(moved, smoothed, atol=1e-6)
    assert same == pytest.approx(khat, abs=1e-6)


@pytest.mark.parametrize("scale", [1e2, 1e5])
def test_very_heavy_tails_have_a_large_k_hat_and_no_warning(scale, recwarn):
    """Their quantiles overflow, and are cut off at the largest weight."""
    for seed in range(5):
        raw = scale * np.random.default_rng(seed).standard_t(1, size=4096)
        smoothed, khat = psis(raw)
        assert khat > 1
        assert logsumexp(smoothed) == pytest.approx(0, abs=1e-9)
        assert smoothed.max() <= 0
    assert not recwarn.list
